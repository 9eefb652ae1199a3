"""NIfTI: which slice is read, which way up it is, and the traps of volumes."""

import gzip

import nibabel
import numpy as np
import pytest

from imaging.files import axial, nifti, picture
from neuroloop.core.errors import ImageTooLarge, InvalidImage, UnsupportedImage
from neuroloop.imaging.decode import Limits, decode, read

Y, X = np.mgrid[0:60, 0:80]
GREY = (X * 2 + Y).astype(np.uint8)
"""No symmetry: every flip and turn of it is another image."""


def volume(shape=(40, 50, 60)) -> np.ndarray:
    """(right, front, up): bright grows to the patient's left, then to the back, then to the feet."""
    right, front, up = np.mgrid[0 : shape[0], 0 : shape[1], 0 : shape[2]]
    return ((shape[0] - right) * 2 + (shape[1] - front) + (shape[2] - up) // 2).astype(np.int16)


def turned(voxels: np.ndarray, spacing=(1.0, 1.0, 1.0), order="RAS") -> bytes:
    """The same volume stored with its axes in another order and direction, such as LPS or SAL."""
    image = nibabel.Nifti1Image(voxels, np.diag([*spacing, 1.0]))
    ours = nibabel.orientations.axcodes2ornt("RAS")
    change = nibabel.orientations.ornt_transform(ours, nibabel.orientations.axcodes2ornt(order))
    return image.as_reoriented(change).to_bytes()


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("version", [1, 2])
def test_one_slice_comes_back_pixel_by_pixel(zipped: bool, version: int):
    found = read(nifti(axial(GREY), zipped=zipped, version=version))
    assert (found.kind, found.frames, found.frame) == ("NIfTI", 1, 1)
    assert np.array_equal(found.pixels, GREY)


@pytest.mark.parametrize("kind", [np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_deep_voxels_give_the_greys_of_a_deep_png(kind):
    deep = GREY.astype(np.uint16) * 16
    pixels = decode(nifti(axial(deep.astype(kind))))
    assert np.abs(pixels.astype(int) - decode(picture(deep, "PNG"))).max() <= 4


def test_voxels_are_scaled_as_the_header_says():
    image = nibabel.Nifti1Image(axial(GREY).astype(np.float32) * 0.37 - 20, np.eye(4))
    image.set_data_dtype(np.int16)
    pixels = decode(image.to_bytes())
    assert np.corrcoef(pixels.ravel(), GREY.ravel())[0, 1] > 0.9999


def test_colour_becomes_luma():
    red = np.zeros((80, 60, 1), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    red["R"] = 255
    assert decode(nibabel.Nifti1Image(red, np.eye(4)).to_bytes())[0, 0] == 76


@pytest.mark.parametrize("order", ["RAS", "LPS", "LAS", "SAL", "PIR", "ASR", "IRP"])
@pytest.mark.parametrize(
    ("spacing", "frames"), [((1, 1, 1), 60), ((1, 1, 5), 60), ((4, 1, 1), 40), ((1, 3, 1), 50)], ids=str
)
def test_the_slice_lies_across_the_widest_spacing_and_is_shown_as_radiologists_look(order, spacing, frames):
    """Upper left of the image: the patient's right (of a sagittal slice: the front), and the crown or face."""
    voxels = volume()
    found = read(turned(voxels, spacing, order))
    assert (found.frames, found.frame) == (frames, frames // 2)
    middle = frames // 2 - 1
    expected = {
        40: voxels[middle, ::-1, ::-1].T,
        50: voxels[::-1, middle, ::-1].T,
        60: voxels[::-1, ::-1, middle].T,
    }[frames]
    assert np.array_equal(found.pixels, expected)


def test_the_chosen_slice_is_counted_from_the_feet():
    voxels = volume()
    for order in ("RAS", "LPI"):
        data = turned(voxels, order=order)
        for slice_number in (1, 17, 60):
            found = read(data, frame=slice_number)
            assert np.array_equal(found.pixels, voxels[::-1, ::-1, slice_number - 1].T)
        with pytest.raises(InvalidImage, match="frames 1 to 60"):
            read(data, frame=61)
    with pytest.raises(ImageTooLarge, match="at most 59"):
        read(data, limits=Limits(frames=59))


def test_of_a_series_of_volumes_the_first_is_read_and_a_flat_file_is_one_slice():
    voxels = volume()
    series = np.stack([voxels, np.zeros_like(voxels)], axis=-1)
    assert np.array_equal(decode(nifti(series)), decode(nifti(voxels)))
    assert np.array_equal(decode(nifti(axial(GREY)[..., 0])), GREY)


def test_voxels_that_are_longer_than_wide_are_made_square():
    found = decode(nifti(axial(GREY), np.diag([2.0, 1.0, 8.0, 1.0])))
    assert found.shape == (60, 160)


def test_a_position_that_makes_no_sense_does_not_lose_the_image():
    for row in ([np.nan, 0, 0, 0], [np.inf, 0, 0, 0], [0, 0, 0, 0]):
        data = bytearray(nifti(axial(GREY)))
        data[280:296] = np.array(row, np.float32).tobytes()  # srow_x
        assert np.array_equal(decode(bytes(data)), GREY)


def test_a_gzip_bomb_is_refused_while_it_unpacks():
    bomb = gzip.compress(nifti(axial(GREY)) + bytes(50_000_000), 9)
    assert len(bomb) < 100_000
    with pytest.raises(ImageTooLarge, match="more than 2,000,000 bytes"):
        read(bomb, limits=Limits(unpacked=2_000_000))
    parts = b"".join([gzip.compress(nifti(axial(GREY)) + bytes(900_000))] * 5)
    with pytest.raises(ImageTooLarge, match="more than 2,000,000 bytes"):
        read(parts, limits=Limits(unpacked=2_000_000))


def test_a_header_that_claims_a_huge_volume_is_refused():
    data = bytearray(nifti(axial(GREY)))
    data[42:48] = np.array([32_000] * 3, np.int16).tobytes()
    with pytest.raises(ImageTooLarge, match="holds too much"):
        decode(bytes(data))


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (gzip.compress(b"hello" * 1000), UnsupportedImage),
        (gzip.compress(picture(GREY, "PNG")), UnsupportedImage),
        (gzip.compress(gzip.compress(nifti(axial(GREY)))), UnsupportedImage),
        (gzip.compress(nifti(axial(GREY)))[:-20], InvalidImage),
        (gzip.compress(nifti(axial(GREY))) + b"and more", InvalidImage),
        (nifti(axial(GREY)) + b"and more", InvalidImage),
        (nifti(axial(GREY))[:-1], InvalidImage),
        (nifti(axial(GREY))[:400], InvalidImage),
        (nifti(axial(GREY))[:348], InvalidImage),
        (nifti(np.zeros((20, 20, 1), np.uint8)), InvalidImage),
        (nibabel.Nifti1Image(np.zeros((64, 64, 1), np.complex64), np.eye(4)).to_bytes(), UnsupportedImage),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value.__name__,
)
def test_what_is_damaged_or_something_else_is_refused(data: bytes, error: type[Exception]):
    with pytest.raises(error):
        decode(data)
