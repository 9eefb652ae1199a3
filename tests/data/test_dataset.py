import io
from collections import Counter, defaultdict

import numpy as np
import pytest

from neuroloop.core.errors import InvalidSource, NeuroLoopError
from neuroloop.core.schemas import LABELS, PARTS, Snapshot
from neuroloop.data.audit import audit
from neuroloop.data.dataset import (
    FRACTIONS,
    Arrays,
    augmented_epochs,
    canonical_arrays,
    make_split,
    pack,
    registry,
    unpack,
)
from neuroloop.imaging.augment import AugmentParams
from neuroloop.imaging.canonical import canonicalize
from neuroloop.imaging.decode import decode, encode_png

from .drawn import four_classes, picture, snapshot_of


def split_of(files, **options):
    snapshot = snapshot_of(files)
    return make_split(snapshot, audit(snapshot, lambda entry: files[entry.path]), **options)


@pytest.fixture(scope="module")
def files():
    """50 unlike pictures a class, some of them with mirrored copies; the last glioma has eleven."""
    made = four_classes(50)
    for order, label in enumerate(LABELS):
        for number in range(0, 20, 2):
            made[f"{label}/m{number:03d}.png"] = encode_png(
                np.ascontiguousarray(picture(1000 * order + number)[:, ::-1])
            )
    made |= {f"glioma/c{n:02d}.png": made["glioma/049.png"] for n in range(11)}
    return made


@pytest.fixture(scope="module")
def split(files):
    return split_of(files)


def test_no_group_stands_in_two_parts_and_no_image_is_lost(files, split):
    parts = defaultdict(set)
    for entry in split.entries:
        parts[entry.group].add(entry.part)
    assert all(len(each) == 1 for each in parts.values())
    assert len(parts) == 200
    assert {entry.path for entry in split.entries} == set(files)


def test_every_class_is_divided_in_the_wanted_fractions(split):
    for label in LABELS:
        counts = Counter(entry.part for entry in split.entries if entry.label == label)
        for part in PARTS:
            assert counts[part] / counts.total() == pytest.approx(FRACTIONS[part], abs=0.03)


def test_the_split_depends_on_content_and_seed_and_not_on_order_or_names(files, split):
    renamed = {f"{path.split('/')[0]}/{n}.png": data for n, (path, data) in enumerate(reversed(files.items()))}
    again = split_of(renamed)
    assert {e.sha256: e.part for e in again.entries} == {e.sha256: e.part for e in split.entries}
    assert registry(split_of(files, seed=1)) != registry(split)


def test_frozen_images_keep_their_part_and_new_twins_follow_them(files, split):
    frozen = registry(split)
    more = dict(files)
    for n in range(30):
        more[f"pituitary/new{n}.png"] = encode_png(picture(70_000 + n))
    test_path = next(e.path for e in split.of("test") if e.label == "glioma")
    mirrored = decode(files[test_path])[::-1]
    more["glioma/twin.png"] = encode_png(np.ascontiguousarray(mirrored))
    grown = split_of(more, frozen=frozen, seed=5)
    now = {entry.path: entry.part for entry in grown.entries}
    assert all(now[entry.path] == entry.part for entry in split.entries)
    assert now["glioma/twin.png"] == "test"
    assert {now[f"pituitary/new{n}.png"] for n in range(30)} == set(PARTS)
    assert registry(grown, frozen) == {**frozen, **{e.sha256: e.part for e in grown.entries}}


def test_a_new_image_that_ties_two_frozen_parts_together_is_quarantined():
    base = four_classes(20)
    one, other = picture(0) / 2.0, picture(1) / 2.0

    def between(degrees):  # two unlike pictures span a plane; the correlation in it is the cosine of the angle
        angle = np.radians(degrees)
        return encode_png((np.cos(angle) * one + np.sin(angle) * other).astype(np.uint8))

    base["glioma/000.png"], base["glioma/001.png"] = between(0), between(25)
    first = split_of(base)
    groups = {entry.path: entry.group for entry in first.entries}
    assert groups["glioma/000.png"] != groups["glioma/001.png"]
    frozen = registry(first)
    by_path = {entry.path: entry.sha256 for entry in first.entries}
    frozen[by_path["glioma/000.png"]], frozen[by_path["glioma/001.png"]] = "train", "test"
    later = split_of({**base, "glioma/bridge.png": between(12.5)}, frozen=frozen)
    parts = {entry.path: (entry.part, entry.group) for entry in later.entries}
    assert parts["glioma/000.png"][0] == "train"
    assert parts["glioma/001.png"][0] == "test"
    assert parts["glioma/000.png"][1] != parts["glioma/001.png"][1]
    (kept_out,) = later.quarantined
    assert kept_out.path == "glioma/bridge.png"
    assert "both test and train" in kept_out.reason


def test_a_class_of_one_picture_over_and_over_cannot_be_divided():
    files = {path: data for path, data in four_classes(12).items() if not path.startswith("notumor")}
    files |= {f"notumor/{n}.png": encode_png(picture(2000)) for n in range(12)}
    with pytest.raises(InvalidSource, match=r"similar images must stay together.*no notumor in .*12 pituitary"):
        split_of(files)


def test_quarantined_images_stand_in_no_part(files):
    bad = {**files, "glioma/bad.jpg": b"x"}
    result = split_of(bad)
    assert "glioma/bad.jpg" not in {entry.path for entry in result.entries}
    assert [each.path for each in result.quarantined] == ["glioma/bad.jpg"]


def test_canonical_arrays_hold_the_canonical_form_of_each_entry_in_order(files, split):
    entries = split.of("calibration", "test")
    arrays = canonical_arrays(entries, lambda entry: files[entry.path], 48)
    assert arrays.images.shape == (len(entries), 48, 48)
    assert arrays.paths == tuple(entry.path for entry in entries)
    assert [LABELS[n] for n in arrays.labels] == [entry.label for entry in entries]
    assert arrays.groups.tolist() == [entry.group for entry in entries]
    for n in (0, len(entries) - 1):
        np.testing.assert_array_equal(arrays.images[n], canonicalize(decode(files[entries[n].path]), 48))


def marked(labels, groups):
    """Uniform images whose grey is their index, so that augmentation leaves them recognisable."""
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None] * np.ones((1, 32, 32), np.uint8)
    paths = tuple(str(n) for n in range(len(labels)))
    return Arrays(images, np.array(labels, np.int64), np.array(groups, np.int64), paths)


def test_a_shard_has_one_member_of_each_group_and_smaller_classes_are_topped_up():
    # class 0: groups of 1, 1, 2, 3 images; class 1: groups of 1 and 4
    arrays = marked([0] * 7 + [1] * 5, [0, 1, 2, 2, 3, 3, 3, 4, 5, 5, 5, 5])
    seen = set()
    for images, labels in augmented_epochs(
        arrays, epochs=30, generator=np.random.default_rng(0), params=AugmentParams()
    ):
        chosen = images[:, 16, 16].astype(int)
        seen |= set(chosen.tolist())
        np.testing.assert_array_equal(arrays.labels[chosen], labels)
        per_group = Counter(arrays.groups[chosen].tolist())
        assert per_group == {0: 1, 1: 1, 2: 1, 3: 1, 4: 2, 5: 2}
    assert seen == set(range(12))


def test_shards_are_augmented_differ_from_one_another_and_repeat_with_the_seed(files, split):
    arrays = canonical_arrays(split.of("validation"), lambda entry: files[entry.path], 32)

    def shards():
        return list(augmented_epochs(arrays, epochs=2, generator=np.random.default_rng(4), params=AugmentParams()))

    (first, _), (second, _) = shards()
    np.testing.assert_array_equal(first, shards()[0][0])
    assert not np.array_equal(first, second)
    originals = {image.tobytes() for image in arrays.images}
    assert sum(image.tobytes() in originals for image in first) < 0.1 * len(first)


def test_arrays_survive_packing(files, split):
    arrays = canonical_arrays(split.of("calibration"), lambda entry: files[entry.path], 32)
    again = Arrays.from_bytes(arrays.to_bytes())
    np.testing.assert_array_equal(again.images, arrays.images)
    assert again.images.dtype == np.uint8
    assert again.labels.tolist() == arrays.labels.tolist()
    assert again.paths == arrays.paths
    assert arrays.to_bytes() == again.to_bytes()


def test_nothing_that_needs_pickle_is_packed_or_unpacked():
    with pytest.raises(NeuroLoopError, match="cannot be packed"):
        pack(a=np.array([{"x": 1}], dtype=object))
    buffer = io.BytesIO()
    np.savez(buffer, a=np.array([{"x": 1}], dtype=object))
    with pytest.raises(NeuroLoopError, match="no packed arrays"):
        unpack(buffer.getvalue())
    with pytest.raises(NeuroLoopError, match="no packed arrays"):
        unpack(b"garbage")


def test_a_snapshot_without_a_class_cannot_be_divided(files):
    snapshot = snapshot_of(files)
    result = audit(snapshot, lambda entry: files[entry.path])
    three = Snapshot(**{**snapshot.__dict__, "images": tuple(e for e in snapshot.images if e.label != "glioma")})
    with pytest.raises(InvalidSource, match="no glioma in test"):
        make_split(three, result)
