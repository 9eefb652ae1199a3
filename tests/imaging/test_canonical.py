import os
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from neuroloop.imaging import canonical
from neuroloop.imaging.canonical import Box, canonical_and_box, canonicalize, head_box, place
from neuroloop.imaging.decode import decode
from neuroloop.imaging.phantom import scan


def framed(head: np.ndarray, top: int, bottom: int, left: int, right: int, air: int = 0) -> np.ndarray:
    return np.pad(head, ((top, bottom), (left, right)), constant_values=air)


def disc(size=120, signal=150):
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    texture = (np.sin(y / 4) + np.cos(x / 5)) * 25
    return np.where(np.hypot(y, x) < size / 2 - 4, signal + texture, 0).astype(np.uint8)


def correlation(a, b):
    return np.corrcoef(a.ravel().astype(float), b.ravel().astype(float))[0, 1]


def test_margins_do_not_show_in_the_canonical_image():
    plain = canonicalize(disc(), 96)
    moved = canonicalize(framed(disc(), 10, 130, 90, 20), 96)
    assert correlation(plain, moved) > 0.95


def test_neither_brightness_nor_gain_of_the_source_shows():
    scan_ = scan("notumor", 3).pixels
    dim = (scan_ * 0.5).astype(np.uint8)
    assert np.abs(canonicalize(scan_, 96).astype(int) - canonicalize(dim, 96)).mean() < 4


def test_stamped_text_and_grey_air_outside_the_head_are_blanked():
    clean = framed(disc(), 40, 40, 40, 40)
    stamped = np.maximum(clean, 9)
    stamped[5:12, 5:60] = 255
    assert head_box(stamped) == head_box(clean)
    assert np.abs(canonicalize(stamped, 96).astype(int) - canonicalize(clean, 96)).mean() < 3


@pytest.mark.parametrize("number", range(8))
def test_a_white_caption_hardly_changes_a_dim_head(number):
    """Its white makes the image's bright end, and most of a dim head is below a tenth of the way to that."""
    dim = (framed(scan("glioma", number).pixels, 40, 0, 0, 0) * 0.4).astype(np.uint8)
    captioned = dim.copy()
    captioned[4:16] = 255
    assert np.abs(canonicalize(captioned, 96).astype(int) - canonicalize(dim, 96)).mean() < 8


def test_dark_holes_inside_the_head_stay_inside():
    head = disc(160)
    head[70:90, 70:90] = 0
    image = framed(head, 20, 20, 20, 20)
    assert head_box(image) == head_box(framed(disc(160), 20, 20, 20, 20))


def test_the_box_is_square_and_holds_the_head():
    box = head_box(framed(disc(120)[:, 30:90], 50, 30, 60, 80))
    assert box.height == box.width
    assert box.top <= 56
    assert box.top + box.height >= 50 + 114
    assert abs(box.left + box.width / 2 - (60 + 30)) < 4


def test_a_head_cut_by_the_frame_is_padded_to_a_square():
    image = np.full((200, 120), 100, dtype=np.uint8)
    image[::7] = 160
    out = canonicalize(image, 96)
    assert out.shape == (96, 96)
    assert out[:, :10].max() == 0
    assert out[40:56, 30:60].max() > 0
    assert head_box(image).left < 0


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((64, 64), dtype=np.uint8),
        np.full((300, 64), 255, dtype=np.uint8),
        np.random.default_rng(0).integers(0, 256, (100, 90), dtype=np.uint8),
        np.eye(3, dtype=np.uint8),
        np.zeros((1, 500), dtype=np.uint8),
        np.indices((70, 70)).sum(axis=0).astype(np.uint8) % 2 * 255,
    ],
    ids=["black", "white", "noise", "tiny", "strip", "checkerboard"],
)
def test_images_without_a_head_do_not_crash(image):
    out = canonicalize(image, 64)
    assert out.shape == (64, 64)
    assert out.dtype == np.uint8


@pytest.mark.parametrize("grey", [0, 90, 255])
def test_an_image_without_contrast_comes_out_black(grey):
    assert canonicalize(np.full((80, 80), grey, dtype=np.uint8), 64).max() == 0


def test_the_greys_of_the_head_fill_the_range():
    out = canonicalize(scan("glioma", 1).pixels, 128)
    assert out.max() == 255
    assert 0.2 < (out > 0).mean() < 0.9


def test_a_map_placed_back_peaks_where_the_head_has_the_finding():
    image = framed(disc(120, 90), 30, 80, 70, 10)
    image[60:70, 110:120] = 255
    small = canonicalize(image, 64)
    heat = np.where(small > 250, 1.0, 0.0).astype(np.float32)
    back = place(heat, head_box(image), image.shape)
    assert back.shape == image.shape
    assert back.dtype == np.float32
    y, x = np.unravel_index(np.argmax(back), back.shape)
    assert 57 <= y <= 72
    assert 107 <= x <= 122
    bytes_back = place((heat * 255).astype(np.uint8), head_box(image), image.shape)
    assert bytes_back.dtype == np.uint8
    assert np.abs(bytes_back - 255 * back).max() <= 1


def test_outside_the_box_a_placed_map_is_zero_and_a_box_beyond_the_frame_is_cut():
    out = place(np.ones((8, 8), dtype=np.float32), Box(-20, 30, 40, 40), (50, 60))
    assert out[:20, 30:60].min() == 1
    assert out[20:].max() == 0
    assert out[:, :30].max() == 0
    assert place(np.ones((8, 8), dtype=np.float32), Box(100, 100, 10, 10), (50, 60)).max() == 0


@pytest.mark.skipif("NEUROLOOP_REAL_DATA" not in os.environ, reason="NEUROLOOP_REAL_DATA does not name real images")
def test_real_scans_keep_a_head_of_sound_size():
    files = sorted(Path(os.environ["NEUROLOOP_REAL_DATA"]).rglob("*.jpg"))[::150]
    assert files
    filled = [(canonicalize(decode(file.read_bytes()), 96) > 0).mean() for file in files]
    assert min(filled) > 0.15
    assert np.median(filled) > 0.45


def test_one_look_for_the_head_gives_the_canonical_image_and_the_box():
    pixels = scan("glioma", 3).pixels
    for given in (pixels, pixels[60:], np.zeros((50, 70), np.uint8)):
        canonical, box = canonical_and_box(given, 64)
        np.testing.assert_array_equal(canonical, canonicalize(given, 64))
        assert box == head_box(given)


def blobs(seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return ndimage.gaussian_filter(generator.normal(size=(60, 70)), 2) > generator.uniform(-0.1, 0.1)


@pytest.mark.parametrize("seed", range(20))
def test_masks_are_opened_and_their_holes_filled_as_scipy_does_it(seed):
    mask = blobs(seed)
    assert (canonical._filled(mask) == ndimage.binary_fill_holes(mask)).all()
    opened = canonical._opened(mask)
    assert (opened == ndimage.binary_opening(mask, iterations=2)).all()
    assert opened.sum() < mask.sum()


def test_sums_of_nine_are_nine_times_scipy_s_mean():
    image = np.random.default_rng(0).integers(0, 256, (40, 30), dtype=np.uint8)
    assert np.allclose(canonical._sums_of_nine(image), 9 * ndimage.uniform_filter(image.astype(float), 3))


@pytest.mark.parametrize("box", [Box(40, 60, 150, 150), Box(-30, -10, 260, 260), Box(100, 200, 120, 120)])
def test_a_mask_is_sampled_as_if_the_frame_s_own_mask_were_resized(box):
    mask = canonical._opened(blobs(3))
    there = ndimage.zoom(mask.astype(float), 4, order=1, grid_mode=True, mode="nearest") > 0.5  # 240 x 280
    sampled = canonical._sample(mask, box, there.shape, 64)
    y, x = (np.floor(start + (np.arange(64) + 0.5) * length / 64).astype(int) for start, length in
            ((box.top, box.height), (box.left, box.width)))  # fmt: skip
    inside = ((y >= 0) & (y < 240))[:, None] & ((x >= 0) & (x < 280))
    nearest = there[np.clip(y, 0, 239)][:, np.clip(x, 0, 279)] & inside
    assert not sampled[~inside].any()
    assert (sampled == nearest).mean() > 0.97  # they may differ along the edges of the mask
    assert 0.1 < sampled.mean() < 0.9


def test_a_ring_is_filled_and_one_that_is_open_to_the_edge_is_not():
    ring = np.zeros((9, 9), bool)
    ring[2:7, 2:7] = True
    ring[4, 4] = False
    assert canonical._filled(ring)[4, 4]
    ring[4, 5:] = False
    assert not canonical._filled(ring)[4, 4]
