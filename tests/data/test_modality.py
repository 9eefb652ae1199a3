import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from neuroloop.core.schemas import LABELS
from neuroloop.data.modality import RING, bone_ring
from neuroloop.imaging.decode import decode
from neuroloop.imaging.phantom import SCANNERS, scan

from .drawn import ct, mri, picture


def frame(pixels):
    return np.asarray(Image.fromarray(pixels).resize((128, 128), Image.Resampling.BOX))


def test_a_closed_saturated_ring_that_touches_the_brain_is_ct():
    assert bone_ring(ct()[None])[0] >= RING
    assert bone_ring(frame(np.pad(ct(240), ((10, 60), (30, 0))))[None])[0] >= RING


def test_scalp_fat_with_dark_bone_below_it_is_no_ct():
    assert bone_ring(mri()[None])[0] == 0


def test_an_mri_on_white_is_no_ct_and_a_ct_that_touches_an_edge_is_one():
    image = mri()
    rows, columns = np.mgrid[:128, :128]
    beyond = np.hypot((rows - 64) / (0.43 * 128), (columns - 64) / (0.35 * 128)) >= 0.91
    assert bone_ring(np.where(beyond, 255, np.maximum(image, 60))[None].astype(np.uint8))[0] == 0
    assert bone_ring(frame(ct(240)[20:-20, 40:])[None])[0] >= RING


def ringed(inner, outer, white=255, gap=90):
    """A head with a ring between two shares of its radius, and a gap inside of it."""
    rows, columns = np.mgrid[:128, :128]
    distance = np.hypot((rows - 64) / (0.43 * 128), (columns - 64) / (0.35 * 128))
    shares = [distance < inner - 0.08, distance < inner, distance < outer, distance < 1]
    return np.select(shares, [90, gap, white, 60], 0).astype(np.uint8)


def test_a_ring_is_no_ct_if_it_is_thin_or_a_dark_gap_lies_inside_of_it_or_too_little_is_saturated():
    assert bone_ring(ringed(0.8, 0.93)[None])[0] >= RING
    assert bone_ring(ringed(0.9, 0.95)[None])[0] == 0
    assert bone_ring(ringed(0.8, 0.93, gap=20)[None])[0] == 0
    shaded = ringed(0.8, 0.93, white=236)
    shaded[53:75, 53:75] = 255  # 3 % of the frame: enough to be looked at, and 6 % of the head
    assert bone_ring(shaded[None])[0] == 0


def test_half_a_ring_is_no_ct():
    open_skull = ct()
    open_skull[64:][open_skull[64:] == 255] = 90
    assert bone_ring(open_skull[None])[0] < RING


def test_a_brain_almost_as_bright_as_the_ring_is_no_ct():
    assert bone_ring(ct(brain=200)[None])[0] == 0


def test_black_white_and_shapeless_images_are_no_ct_and_none_at_all_is_fine():
    images = np.stack([np.zeros((128, 128), np.uint8), np.full((128, 128), 255, np.uint8), frame(picture(5))])
    assert (bone_ring(images) < RING).all()
    assert bone_ring(images[:0]).shape == (0,)


@pytest.mark.parametrize("scanner", sorted(SCANNERS))
def test_no_simulated_mri_is_taken_for_ct(scanner):
    images = np.stack(
        [frame(scan(label, index, scanner=scanner).pixels) for label in LABELS for index in range(32, 35)]
    )
    assert bone_ring(images).max() < RING


@pytest.mark.skipif(
    not os.environ.get("NEUROLOOP_REAL_DATA"), reason="NEUROLOOP_REAL_DATA names no folder of real images"
)
@pytest.mark.parametrize(
    ("name", "is_ct"),
    [
        ("Training/notumor/Tr-no_0157.jpg", True),
        ("Training/notumor/Tr-no_0102.jpg", True),  # lowest of those that are told
        ("Training/meningioma/Tr-me_0182.jpg", True),
        ("Training/notumor/Tr-no_0230.jpg", False),  # T2, highest of the MRI
        ("Training/meningioma/Tr-me_1292.jpg", False),  # near the vertex, all bright scalp
        ("Training/notumor/Tr-no_1199.jpg", False),  # FLAIR
    ],
)
def test_real_images_next_to_the_threshold_are_told_apart(name, is_ct):
    pixels = decode((Path(os.environ["NEUROLOOP_REAL_DATA"]) / name).read_bytes())
    assert (bone_ring(frame(pixels)[None])[0] >= RING) == is_ct
