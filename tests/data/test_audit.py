import io
import os

import numpy as np
import pytest
from PIL import Image

from neuroloop.adapters.folder import FolderStore
from neuroloop.core.errors import InvalidSource
from neuroloop.core.schemas import LABELS
from neuroloop.data import audit_report
from neuroloop.data.audit import Audit, audit, judge, look, own_split, refuse_leaks
from neuroloop.data.dataset import canonical_arrays, make_split
from neuroloop.imaging.decode import encode_png
from neuroloop.model import evaluation

from .drawn import ct, four_classes, picture, snapshot_of


def audited(files, **options):
    return audit(snapshot_of(files), lambda entry: files[entry.path], **options)


def jpeg(pixels):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=80)
    return out.getvalue()


def test_identical_recompressed_resized_and_mirrored_images_share_a_group():
    files = four_classes(6)
    pixels = picture(0, 64)
    files["glioma/copy.png"] = files["glioma/000.png"]
    files["glioma/jpeg.jpg"] = jpeg(pixels)
    files["glioma/mirror.png"] = encode_png(np.ascontiguousarray(pixels[:, ::-1]))
    files["glioma/large.png"] = encode_png(np.kron(pixels, np.ones((2, 2), np.uint8)))
    result = audited(files)
    same = {result.groups[f"glioma/{name}"] for name in ("000.png", "copy.png", "jpeg.jpg", "mirror.png", "large.png")}
    assert len(same) == 1
    assert len(set(result.groups.values())) == 24
    assert (result.largest_group, result.identical, result.mixed_groups) == (5, 1, 0)


def test_groups_reach_across_blocks_of_the_search():
    files = {f"{LABELS[n % 4]}/{n:04d}.png": encode_png(picture(n % 1100, 32)) for n in range(1104)}
    # 1100 = 4 * 275, so the last four repeat the first four, class and all, from another block.
    result = audited(files)
    for n in range(4):
        assert result.groups[f"{LABELS[n]}/{n:04d}.png"] == result.groups[f"{LABELS[n]}/{1100 + n:04d}.png"]


def test_unreadable_truncated_tiny_and_blank_images_are_quarantined_with_the_reason():
    files = four_classes(25)
    files["glioma/text.jpg"] = b"no image at all"
    files["glioma/cut.png"] = files["glioma/000.png"][:200]
    files["glioma/tiny.png"] = encode_png(picture(1, 20))
    files["glioma/blank.png"] = encode_png(np.full((64, 64), 9, np.uint8))
    result = audited(files)
    reasons = {each.path: each.reason for each in result.quarantined}
    assert set(reasons) == {"glioma/text.jpg", "glioma/cut.png", "glioma/tiny.png", "glioma/blank.png"}
    assert reasons["glioma/text.jpg"].startswith("unreadable: ")
    assert reasons["glioma/cut.png"].startswith("unreadable: ")
    assert "20 x 20" in reasons["glioma/tiny.png"]
    assert reasons["glioma/blank.png"].startswith("blank: ")
    assert result.faults == {
        "unreadable": ("glioma/cut.png", "glioma/text.jpg"),
        "tiny": ("glioma/tiny.png",),
        "blank": ("glioma/blank.png",),
        "wrong_modality": (),
    }
    assert set(result.groups) | set(reasons) == set(files)
    assert not set(result.groups) & set(reasons)


def test_a_class_of_which_more_than_a_fifth_is_unreadable_is_broken():
    files = four_classes(10)
    for number in range(2):
        files[f"pituitary/{number:03d}.png"] = b"broken"
    assert not audited(files).broken  # a fifth is blemished only
    files["pituitary/002.png"] = b"broken"
    assert audited(files).broken == {"pituitary": tuple(f"pituitary/00{number}.png" for number in range(3))}


def test_a_tiny_image_of_many_bytes_is_tiny_and_not_unreadable():
    files = four_classes(10)
    noise = np.random.default_rng(0).integers(256, size=(31, 400)).astype(np.uint8)
    files["glioma/strip.png"] = encode_png(noise)
    assert audited(files).faults["tiny"] == ("glioma/strip.png",)


def test_the_sources_own_split_has_no_image_twice_and_all_of_them():
    files = {f"Training/{path}": data for path, data in four_classes(6).items()}
    files |= {f"Testing/{path}": encode_png(picture(50_000 + n)) for n, path in enumerate(four_classes(2))}
    snapshot = snapshot_of(files)
    looks = look(snapshot.images, lambda entry: files[entry.path])
    train, test = own_split(judge(snapshot, looks), looks)
    assert {looks.images[index].part for index in train} == {"Training"}
    assert {looks.images[index].part for index in test} == {"Testing"}
    assert sorted([*train, *test]) == list(range(32))


def test_empty_files_repeat_no_image():
    files = four_classes(10) | {f"glioma/empty {number}.png": b"" for number in range(2)}
    files["glioma/copy.png"] = files["glioma/000.png"]
    assert audited(files).identical == 1


def test_one_picture_under_two_classes_is_quarantined_on_both_sides():
    files = four_classes(10)
    files["pituitary/again.png"] = encode_png(np.ascontiguousarray(picture(3)[::-1]))
    result = audited(files)
    assert result.label_conflicts == (("glioma/003.png", "pituitary/again.png"),)
    reasons = {each.path: each.reason for each in result.quarantined}
    assert "stands as pituitary in pituitary/again.png" in reasons["glioma/003.png"]
    assert "stands as glioma in glioma/003.png" in reasons["pituitary/again.png"]


def test_the_leak_between_the_sources_own_parts_is_measured():
    files = {f"Training/{path}": data for path, data in four_classes(10).items()}
    files["Testing/glioma/same.png"] = files["Training/glioma/000.png"]
    files["Testing/glioma/mirror.png"] = encode_png(np.ascontiguousarray(picture(1)[:, ::-1]))
    files["Testing/glioma/own.png"] = encode_png(picture(99_999))
    files["Testing/glioma/own2.png"] = files["Testing/glioma/own.png"]
    result = audited(files)
    testing, training = result.source_parts
    assert (testing.name, testing.images, testing.identical, testing.twins, testing.leak_rate) == (
        "Testing",
        4,
        1,
        2,
        0.5,
    )
    assert (training.name, training.identical, training.twins) == ("Training", 1, 2)
    assert (testing.held_out, training.held_out) == (True, False)
    assert (result.identical_across_parts, result.twins_across_parts, result.leak_rate) == (1, 2, 0.5)
    assert result.leaks == {
        "Testing/glioma/mirror.png": "Training/glioma/001.png",
        "Testing/glioma/same.png": "Training/glioma/000.png",
        "Training/glioma/000.png": "Testing/glioma/same.png",
        "Training/glioma/001.png": "Testing/glioma/mirror.png",
    }
    assert result.leaked == tuple(sorted(result.leaks))


def test_of_three_parts_the_one_named_for_training_is_trained_on_and_else_the_largest():
    files = {f"{part}/{path}": data for part in ("a", "b") for path, data in four_classes(3).items()}
    files |= {f"train_set/{path}": data for path, data in four_classes(2).items()}
    assert {part.name: part.held_out for part in audited(files).source_parts} == {
        "a": True,
        "b": True,
        "train_set": False,
    }
    files = {f"x/{path}": data for path, data in four_classes(3).items()}
    files["y/glioma/1.png"] = encode_png(picture(77_777))
    assert {part.name: part.held_out for part in audited(files).source_parts} == {"x": False, "y": True}


@pytest.mark.parametrize("weights", [(0.08, 0.02), (0.02, 0.08)])
def test_a_leak_is_told_with_its_most_alike_twin_whatever_the_order(weights):
    image, other = picture(3).astype(float), picture(4)
    files = {f"Training/{path}": data for path, data in four_classes(3).items()}
    for weight in weights:
        blend = np.clip(image + weight * other, 0, 255).astype(np.uint8)
        files[f"Training/glioma/{weight}.png"] = encode_png(blend)
    files["Testing/glioma/own.png"] = encode_png(picture(3))
    assert audited(files).leaks["Testing/glioma/own.png"] == "Training/glioma/0.02.png"


@pytest.mark.parametrize(
    ("parts", "held_out"),
    [
        ({"Training/A": 3, "TRAIN/B": 2, "Testing": 2}, ["Testing"]),
        ({"A/train": 3, "B/train": 2, "A/test": 2, "B/Val": 4}, ["A/test", "B/Val"]),
        ({"A/testing/train": 2, "x": 3}, ["x"]),
        ({"A/test": 4, "B": 2, "C": 3}, ["A/test", "B"]),
        ({"train 1": 2, "train 2": 2}, []),
    ],
)
def test_all_parts_with_a_folder_named_for_training_are_trained_on_and_else_the_largest(parts, held_out):
    files = {f"{part}/{path}": data for part, each in parts.items() for path, data in four_classes(each).items()}
    snapshot = snapshot_of(files)
    named = {path: path.rsplit("/", 2)[0] for path in files}
    images = tuple(each.model_copy(update={"part": named[each.path]}) for each in snapshot.images)
    snapshot = snapshot.model_copy(update={"images": images})
    looks = look(snapshot.images, lambda entry: files[entry.path])
    result = judge(snapshot, looks)
    assert [part.name for part in result.held_out] == held_out
    assert (own_split(result, looks) is None) == (held_out == [])
    page = audit_report.to_html(
        result, (), source="here", images=snapshot.images, read=lambda entry: files[entry.path]
    ).decode()
    assert ("no part to test on, so none can leak" in page) == (held_out == [])


def test_a_folder_around_all_images_is_no_part():
    result = audited({f"archive/{path}": data for path, data in four_classes(3).items()})
    assert result.source_parts == ()
    assert result.leak_rate == 0


def test_ct_among_mri_is_quarantined_but_still_counts_as_a_leak():
    files = {f"Training/{path}": data for path, data in four_classes(10).items()}
    files["Training/notumor/ct.png"] = files["Testing/notumor/ct.png"] = encode_png(ct())
    files["Testing/notumor/own.png"] = encode_png(picture(88_888))
    result = audited(files)
    assert result.faults["wrong_modality"] == ("Testing/notumor/ct.png", "Training/notumor/ct.png")
    assert all("looks like CT" in each.reason for each in result.quarantined)
    assert result.twins_across_parts == 1
    assert (result.components, len(set(result.groups.values()))) == (42, 41)


def test_a_split_that_keeps_groups_together_passes_and_one_that_does_not_is_refused():
    files = four_classes(12)
    files["glioma/mirror.png"] = encode_png(np.ascontiguousarray(picture(0)[:, ::-1]))
    snapshot = snapshot_of(files)
    looks = look(snapshot.images, lambda entry: files[entry.path])
    split = make_split(snapshot, judge(snapshot, looks))
    refuse_leaks(looks, split)
    part = {entry.path: entry.part for entry in split.entries}
    elsewhere = "test" if part["glioma/000.png"] == "train" else "train"
    torn = split.model_copy(
        update={
            "entries": tuple(
                entry.model_copy(update={"part": elsewhere}) if entry.path == "glioma/mirror.png" else entry
                for entry in split.entries
            )
        }
    )
    with pytest.raises(InvalidSource, match=r"The split leaks: 1 pairs.*glioma/000\.png .*glioma/mirror\.png"):
        refuse_leaks(looks, torn)


def test_an_audit_is_json_and_the_same_every_time_and_reports_progress():
    files, seen = four_classes(10), []
    first = audited(files, progress=lambda done, total: seen.append((done, total)))
    assert Audit.model_validate_json(first.model_dump_json()) == first == audited(files)
    assert seen == [(n, 40) for n in range(1, 41)]
    assert first.summary()["groups"] == 40


def test_a_read_that_fails_is_a_fault_and_not_a_quarantined_image():
    files = four_classes(10)

    def read(entry):
        raise InvalidSource("the bucket is gone")

    with pytest.raises(InvalidSource, match="the bucket is gone"):
        audit(snapshot_of(files), read)


@pytest.fixture(scope="module")
def public():
    """The files of the public set, and its audit."""
    if not os.environ.get("NEUROLOOP_REAL_DATA"):
        pytest.skip("NEUROLOOP_REAL_DATA names no folder of real images")
    store = FolderStore(os.environ["NEUROLOOP_REAL_DATA"])
    files = {key: store.get(key) for key in store.list("") if key.endswith(".jpg")}
    return files, audited(files)


def test_the_known_faults_of_the_public_set_are_found(public):
    _, result = public
    testing = next(part for part in result.source_parts if part.name == "Testing")
    assert testing.identical == 216
    assert testing.twins == 992
    assert (result.identical_across_parts, result.twins_across_parts) == (216, 992)
    assert {frozenset(path.split("/")[-1] for path in pair) for pair in result.label_conflicts} == {
        frozenset(("Tr-me_0831.jpg", "Tr-pi_0520.jpg")),
        frozenset(("Tr-me_0942.jpg", "Tr-pi_0515.jpg")),
        frozenset(("Tr-me_1311.jpg", "Tr-pi_0043.jpg")),
        frozenset(("Te-me_0156.jpg", "Te-piTr_0002.jpg")),
    }
    assert result.components == 2569  # found by comparing every image with every other
    # All 69 were looked at one by one; none is an MRI.
    assert len(result.faults["wrong_modality"]) == 69


def test_the_border_of_a_canonical_image_hardly_tells_the_class(public):
    files, result = public
    split = make_split(snapshot_of(files), result)
    train, held_out = (
        canonical_arrays(split.of(*parts), lambda entry: files[entry.path], 128)
        for parts in (("train",), ("validation", "calibration"))
    )
    scores = evaluation.baselines(train.images, train.labels, held_out.images, held_out.labels)
    assert scores["border_accuracy"] <= 0.55  # of the whole frame 0.807
    assert scores["thumbnail_accuracy"] > 0.6  # what does see the head does better: the measure can tell
