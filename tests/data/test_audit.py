import io
import os

import numpy as np
import pytest
from PIL import Image

from neuroloop.adapters.folder import FolderStore
from neuroloop.core.errors import InvalidSource
from neuroloop.core.schemas import LABELS
from neuroloop.data.audit import Audit, audit, thumbnail, twins
from neuroloop.imaging.decode import encode_png

from .drawn import four_classes, picture, snapshot_of


def audited(files, **options):
    return audit(snapshot_of(files), lambda entry: files[entry.path], **options)


def jpeg(pixels):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=80)
    return out.getvalue()


def test_a_thumbnail_has_zero_mean_and_unit_norm_and_a_uniform_image_has_none():
    values = thumbnail(picture(1, 200))
    assert values.shape == (1024,)
    assert values.dtype == np.float32
    assert abs(values.mean()) < 1e-6
    assert np.linalg.norm(values) == pytest.approx(1, abs=1e-5)
    assert not thumbnail(np.full((40, 50), 7, np.uint8)).any()


@pytest.mark.parametrize("turn", range(4))
@pytest.mark.parametrize("flip", [False, True])
def test_a_twin_is_found_however_it_is_flipped_or_turned(turn, flip):
    turned = np.rot90(picture(1), turn)
    turned = np.ascontiguousarray(turned[:, ::-1] if flip else turned)
    a = np.stack([thumbnail(picture(5)), thumbnail(picture(1))])
    b = np.stack([thumbnail(picture(n)) for n in (7, 8)] + [thumbnail(turned)])
    assert twins(a, b) == [(1, 2)]


def test_unlike_images_are_no_twins():
    thumbnails = np.stack([thumbnail(picture(n)) for n in range(20)])
    assert twins(thumbnails, thumbnails) == [(n, n) for n in range(20)]


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
    assert set(result.groups) | set(reasons) == set(files)
    assert not set(result.groups) & set(reasons)


def test_a_class_of_which_more_than_a_fifth_is_unreadable_stops_the_audit_and_names_the_files():
    files = four_classes(10)
    for number in range(3):
        files[f"pituitary/{number:03d}.png"] = b"broken"
    with pytest.raises(InvalidSource, match=r"3 of 10 pituitary images cannot be used.*20%.*pituitary/000\.png"):
        audited(files)


def test_a_fifth_of_a_class_unreadable_is_quarantined_and_the_audit_goes_on():
    files = four_classes(10)
    for number in range(2):
        files[f"pituitary/{number:03d}.png"] = b"broken"
    assert len(audited(files).quarantined) == 2


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
    assert result.twins_across_parts == 4


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


@pytest.mark.skipif(
    not os.environ.get("NEUROLOOP_REAL_DATA"), reason="NEUROLOOP_REAL_DATA names no folder of real images"
)
def test_the_known_faults_of_the_public_set_are_found():
    store = FolderStore(os.environ["NEUROLOOP_REAL_DATA"])
    files = {key: store.get(key) for key in store.list("") if key.endswith(".jpg")}
    result = audited(files)
    testing = next(part for part in result.source_parts if part.name == "Testing")
    assert testing.identical == 216
    assert testing.twins >= 0.99 * 992
    assert len(result.label_conflicts) == 4
    assert 2500 <= len(set(result.groups.values())) <= 2600
