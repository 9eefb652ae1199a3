"""Evidence for the gate from colour: photographs speak against themselves, and grey scans with some colour do not."""

import os
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import skimage
import sklearn
from PIL import Image, ImageDraw

from imaging.files import dicom, picture
from neuroloop.imaging.decode import colour, objection, read
from neuroloop.imaging.phantom import scan

HEAD = scan("glioma", 1).pixels
PHOTOGRAPHS = {
    skimage: (
        "astronaut.png", "chelsea.png", "coffee.png", "color.png", "hubble_deep_field.jpg", "ihc.png", "retina.jpg",
        "rocket.jpg",
    ),
    sklearn: ("china.jpg", "flower.jpg"),
    matplotlib: ("grace_hopper.jpg",),
}  # fmt: skip
FOLDERS = {skimage: "data", sklearn: "datasets/images", matplotlib: "mpl-data/sample_data"}
FILES = [
    path
    for package, names in PHOTOGRAPHS.items()
    for path in (Path(package.__file__).parent / FOLDERS[package] / name for name in names)
    if path.is_file()  # a release may have dropped one
]


def tinted(pixels: np.ndarray, red: float, green: float, blue: float) -> Image.Image:
    """Greys as they look through coloured glass."""
    return Image.fromarray((pixels[..., None] * np.array([red, green, blue])).astype(np.uint8))


def test_there_are_photographs_to_test_with():
    assert len(FILES) >= 8


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_photographs_are_told_by_their_colour(path: Path):
    assert "in colour" in objection(read(path.read_bytes()))


@pytest.mark.skipif("NEUROLOOP_REAL_DATA" not in os.environ, reason="NEUROLOOP_REAL_DATA is not set")
def test_no_real_scan_is_told_to_be_in_colour():
    files = sorted(Path(os.environ["NEUROLOOP_REAL_DATA"]).rglob("*.jpg"))[::7]
    assert len(files) > 900
    assert [path.name for path in files if objection(read(path.read_bytes()))] == []


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "BMP"])
def test_a_grey_scan_has_no_colour_in_any_format(kind: str):
    for image in (Image.fromarray(HEAD), Image.fromarray(HEAD).convert("RGB")):
        found = read(picture(image, kind))
        assert (found.colour, objection(found)) == (0.0, "")


def test_notes_in_colour_and_the_tint_of_a_film_do_not_speak_against_a_scan():
    noted = Image.fromarray(HEAD).convert("RGB")
    pen = ImageDraw.Draw(noted)
    side = min(noted.size)
    pen.ellipse([side // 3, side // 3, side // 2, side // 2], outline="red", width=3)
    pen.text((4, 4), "R  tumour?", fill="yellow")
    dark = Image.fromarray(HEAD // 7).convert("RGB")
    dark.paste(noted.crop((0, 0, 80, 16)), (0, 0))
    for image in (noted, dark, tinted(HEAD, 0.78, 0.9, 1.0), tinted(HEAD, 1.0, 0.95, 0.8)):
        found = read(picture(image, "JPEG"))
        assert 0 <= found.colour < colour.MOST
        assert not objection(found)


@pytest.mark.parametrize("image", [
    tinted(HEAD, 1.0, 0.4, 0.1),
    tinted(HEAD, 1.0, 0.4, 0.1).quantize(64),
    tinted(HEAD, 1.0, 0.4, 0.1).convert("CMYK"),
    Image.merge("RGBA", [*tinted(HEAD, 1.0, 0.4, 0.1).split(), Image.new("L", HEAD.shape[::-1], 255)]),
], ids=lambda image: image.mode)  # fmt: skip
def test_false_colours_are_seen_in_every_mode(image: Image.Image):
    assert "false colours" in objection(read(picture(image, "TIFF")))


def test_colour_that_is_transparent_does_not_show():
    hidden = tinted(np.full_like(HEAD, 255), 1.0, 0.0, 0.0)
    hidden.putalpha(0)
    hidden.paste(Image.fromarray(HEAD).convert("RGBA").crop((0, 0, 40, len(HEAD))), (0, 0))
    assert read(picture(hidden, "PNG")).colour == 0.0


def test_colour_dicom_is_told_like_a_picture():
    assert objection(read(dicom(np.asarray(tinted(HEAD, 1.0, 0.4, 0.1)))))
    assert not objection(read(dicom(np.asarray(Image.fromarray(HEAD).convert("RGB")))))
    ramp = np.arange(256, dtype=np.uint16)
    for deep in (1, 257):  # entries of 8 and of 16 bits
        false, grey = ((ramp * deep, ramp * deep // 3, ramp * deep // 9), (ramp * deep,) * 3)
        for entries, coloured in ((false, True), (grey, False)):
            palette = {
                f"{name}PaletteColorLookupTable{part}": what
                for name, table in zip(("Red", "Green", "Blue"), entries, strict=True)
                for part, what in (("Descriptor", [256, 0, 16]), ("Data", table.astype("<u2").tobytes()))
            }
            assert bool(objection(read(dicom(HEAD, PhotometricInterpretation="PALETTE COLOR", **palette)))) == coloured


@pytest.mark.parametrize("mode", ["1", "L", "LA", "I", "I;16", "F", "LAB"])
def test_greys_of_every_mode_have_no_colour(mode: str):
    image = Image.fromarray(HEAD.astype(np.uint16)) if mode == "I;16" else Image.new(mode, (40, 40))
    assert image.mode == mode
    assert colour.share(image) == 0.0
