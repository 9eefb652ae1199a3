"""The frozen split, by real audits of drawn images whose source changes from version to version."""

import hashlib
import io
import json
import threading

import numpy as np
import pytest
from PIL import Image

from data.drawn import four_classes, picture, snapshot_of
from neuroloop.adapters.folder import FolderStore
from neuroloop.core import keys
from neuroloop.core.schemas import LABELS
from neuroloop.data.audit import audit
from neuroloop.data.similarity import thumbnail, twins
from neuroloop.imaging.decode import decode, encode_png
from neuroloop.loop.feedback import claim, is_held_out
from neuroloop.loop.splitting import decisions, freeze, frozen_parts, thumbnails

SIDE = 32


def sha(data):
    return hashlib.sha256(data).hexdigest()


def split_of(store, files, version="v1"):
    """What `audit_data` does: the images lie in the store, are audited, and the split is frozen."""
    snapshot = snapshot_of(files, version=version)
    for entry in snapshot.images:
        if not store.exists(keys.image(entry.md5)):
            store.put(keys.image(entry.md5), files[entry.path])
    return freeze(store, snapshot, audit(snapshot, lambda entry: files[entry.path]))


def again(data):
    """The same picture in other bytes: mirrored and as a JPEG."""
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(decode(data)[:, ::-1])).save(out, "JPEG", quality=85)
    return out.getvalue()


def test_a_picture_that_is_gone_or_cannot_be_read_keeps_no_other_from_being_seen(store):
    store.put("a", encode_png(picture(1)))
    store.put("b", encode_png(picture(2))[:100])
    assert list(thumbnails(store, ["a", "b", "c"])) == ["a"]


@pytest.fixture
def files():
    return four_classes(14)


def test_a_new_image_of_a_removed_test_image_stays_in_the_test_part(store, files):
    first = split_of(store, files)
    test = next(entry for entry in first.of("test") if entry.label == "glioma")
    replaced = {path: data for path, data in files.items() if path != test.path}
    replaced["glioma/other-name.jpg"] = again(files[test.path])
    later = split_of(store, replaced, "v2")
    assert {e.part for e in later.entries if e.path == "glioma/other-name.jpg"} == {"test"}


def test_a_source_that_replaces_every_file_by_a_copy_of_it_is_divided_as_before(store, files):
    parts = {entry.path: entry.part for entry in split_of(store, files).entries}
    copies = {path: again(data) for path, data in files.items()}
    later = split_of(store, copies, "v2")
    assert {entry.path: entry.part for entry in later.entries} == parts
    assert not {sha(data) for data in copies.values()} & {sha(data) for data in files.values()}


def test_an_image_that_was_quarantined_for_a_while_comes_back_to_its_part(store, files):
    first = split_of(store, files)
    test = next(entry for entry in first.of("test") if entry.label == "glioma")
    conflict = {**files, "notumor/wrong.png": files[test.path]}
    away = split_of(store, conflict, "v2")
    assert test.path not in {entry.path for entry in away.entries}
    back = split_of(store, files, "v3")
    assert {entry.path: entry.part for entry in back.entries} == {entry.path: entry.part for entry in first.entries}


def test_a_twin_that_arrives_while_a_test_image_is_quarantined_is_not_trained_on(store, files):
    first = split_of(store, files)
    test = next(entry for entry in first.of("test") if entry.label == "glioma")
    noise = np.random.default_rng(0).normal(size=(64, 64)) * 25
    alike = encode_png(np.clip(decode(files[test.path]) + noise, 0, 255).astype(np.uint8))
    conflict = {**files, "notumor/wrong.png": files[test.path], "glioma/alike.png": alike}
    later = split_of(store, conflict, "v2")
    held = {entry.path: entry.part for entry in later.entries}
    assert test.path not in held
    assert held.get("glioma/alike.png", "test") == "test"


def test_a_simulated_source_between_two_real_ones_changes_nothing(store, files):
    parts = {entry.path: entry.part for entry in split_of(store, files).entries}
    simulated = {
        f"{label}/{n}.png": encode_png(picture(5_000 + 50 * k + n)) for k, label in enumerate(LABELS) for n in range(12)
    }
    snapshot = snapshot_of(simulated, version="s1", simulated=True)
    freeze(store, snapshot, audit(snapshot, lambda entry: simulated[entry.path]))
    assert {entry.path: entry.part for entry in split_of(store, files, "v2").entries} == parts


def test_an_image_that_the_store_has_lost_does_not_stop_the_next_split(store, files):
    first = split_of(store, files)
    lost = first.of("train")[0]
    store.delete(keys.image(lost.md5))
    fewer = {path: data for path, data in files.items() if path != lost.path}
    split_of(store, fewer | {"glioma/new.png": encode_png(picture(777))}, "v2")


def test_the_same_snapshot_again_decides_nothing_new(store, files):
    first = split_of(store, files)
    assert len(decisions(store)) == 1
    assert split_of(store, files) == first
    assert len(decisions(store)) == 1


def test_two_runs_that_decide_at_once_agree_on_every_image(store, files):
    one = {**files, **{f"glioma/one{n}.png": encode_png(picture(60_000 + n)) for n in range(8)}}
    two = {**files, **{f"glioma/one{n}.png": again(one[f"glioma/one{n}.png"]) for n in range(8)}}
    splits, start = {}, threading.Barrier(2)

    def run(version, some):
        start.wait()
        splits[version] = split_of(store, some, version)

    threads = [threading.Thread(target=run, args=each) for each in (("v1", one), ("v2", two))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    parts = frozen_parts(decisions(store))
    assert len(decisions(store)) == 2
    for split in splits.values():
        assert {entry.sha256: parts[entry.sha256] for entry in split.entries} == {
            entry.sha256: entry.part for entry in split.entries
        }
    for n in range(8):  # the later one found the earlier one's twins, which are not in its own snapshot
        found = {e.part for split in splits.values() for e in split.entries if e.path == f"glioma/one{n}.png"}
        assert len(found) == 1


def test_decisions_are_never_overwritten_and_the_earlier_one_holds(store, files):
    split_of(store, files)
    (first,) = decisions(store)
    assert first.version == "v1"
    assert first.parts.keys() == first.md5.keys()
    flipped = first.model_copy(update={"parts": dict.fromkeys(first.parts, "train"), "version": "v2"})
    assert frozen_parts([first, flipped]) == first.parts


def test_the_parts_of_a_registry_from_before_it_was_a_log_still_hold(store, files):
    parts = {sha(data): "test" for data in list(files.values())[:9]}
    store.put(keys.FIRST_REGISTRY, json.dumps(parts).encode())
    split = split_of(store, files)
    assert {entry.part for entry in split.entries if entry.sha256 in parts} == {"test"}
    assert frozen_parts(decisions(store)) == {entry.sha256: entry.part for entry in split.entries}


@pytest.mark.parametrize("seed", range(2))
def test_whatever_happens_to_a_source_no_image_changes_its_part_and_no_two_parts_share_a_picture(tmp_path, seed):
    """Five versions, each by some additions, copies, removals, returns, corrections of the class and conflicts."""
    generator = np.random.default_rng(seed)
    store = FolderStore(str(tmp_path))
    files = {path: encode_png(picture(n + 1000 * seed, SIDE)) for n, path in enumerate(four_classes(14))}
    ever: dict[str, bytes] = dict(files)
    removed: dict[str, bytes] = {}
    parts: dict[str, str] = {}

    def some(pool, number):
        return [str(path) for path in generator.choice(sorted(pool), min(number, len(pool)), replace=False)]

    for version in range(5):
        split = split_of(store, files, f"v{version}")
        assert {e.path for e in split.entries} | {e.path for e in split.quarantined} == set(files)
        assert not {e.path for e in split.entries} & {e.path for e in split.quarantined}
        for entry in split.entries:
            assert parts.setdefault(entry.sha256, entry.part) == entry.part
        # Of everything that ever had a part, in this version or not.
        seen = {sha(data): thumbnail(decode(data)) for data in ever.values() if sha(data) in parts}
        names, thumbnails = list(seen), np.stack(list(seen.values()))
        together = {entry.sha256 for entry in split.entries}
        for i, j in twins(thumbnails, thumbnails):
            if names[i] in together:
                assert parts[names[i]] == parts[names[j]]

        for path in some(files, 8):
            removed[path] = files.pop(path)
        for path in some(removed, 4):
            files[path] = removed.pop(path)
        for path in some(ever, 6):  # of an image that may be there, away or quarantined
            label = path.split("/")[0]
            files[f"{label}/copy{version}-{len(files)}.jpg"] = again(ever[path])
        for path in some(files, 3):
            data = files.pop(path)
            files[f"{generator.choice(LABELS)}/moved{version}-{len(files)}.{path.rsplit('.', 1)[1]}"] = data
        for path in some(files, 2):
            files[f"{generator.choice(LABELS)}/twin{version}-{len(files)}.png"] = files[path]
        for n in range(6):
            files[f"{LABELS[n % 4]}/new{version}-{n}.png"] = encode_png(
                picture(9_000 + 100 * seed + 10 * version + n, SIDE)
            )
        ever |= files


def test_an_image_that_a_retraining_has_learned_from_comes_into_no_other_part_with_a_source(store, files):
    new = {
        f"{label}/new{n}.png": encode_png(picture(70_000 + 100 * k + n))
        for k, label in enumerate(LABELS)
        for n in range(9)
    }
    corrected = {path: keys.correction(path.split("/")[0], f"{k:08d}") for k, path in enumerate(new)}
    for path, key in corrected.items():
        store.put(key, again(new[path]))
    claim(store, "run-1", 0)
    learned = {path for path, key in corrected.items() if not is_held_out(sha(store.get(key)))}
    assert 0 < len(learned) < len(new)
    parts = {entry.path: entry.part for entry in split_of(store, files | new).entries}
    assert {parts[path] for path in learned} == {"train"}
    assert {parts[path] for path in new} != {"train"}


def test_a_correction_that_was_left_out_for_a_test_image_binds_nothing(store, files):
    first = split_of(store, files)
    tests = [entry for entry in first.of("test") if entry.label == "glioma"]
    for number in range(30):  # one of them at least is not held out
        grey = decode(files[tests[0].path]).astype(int) + (number % 3)
        store.put(keys.correction("glioma", f"{number:08d}"), encode_png(np.clip(grey, 0, 255).astype(np.uint8)))
    claim(store, "run-1", 0)
    later = split_of(store, files | {"glioma/again.jpg": again(files[tests[0].path])}, "v2")
    assert {entry.part for entry in later.entries if entry.path == "glioma/again.jpg"} == {"test"}
