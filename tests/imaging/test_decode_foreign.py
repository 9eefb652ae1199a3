"""Files that are more than an image are refused, and real ones are not taken for it."""

import io
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from imaging.files import axial, dicom, nifti, picture
from neuroloop.core.errors import InvalidImage
from neuroloop.imaging.decode import read
from neuroloop.imaging.decode.foreign import check, jpeg_end
from neuroloop.imaging.decode.raster import kind_of

GREY = np.add.outer(np.arange(60), np.arange(80)).astype(np.uint8)
KINDS = {
    **{kind: picture(GREY, kind) for kind in ("JPEG", "PNG", "BMP", "WEBP", "TIFF")},
    "DICOM": dicom(GREY),
    "NIfTI": nifti(axial(GREY)),
}


def archive() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as made:
        made.writestr("run.class", b"code")
    return out.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_alone_is_read_and_so_is_one_that_is_padded_with_zeros(kind: str):
    assert read(KINDS[kind]).kind == kind
    assert read(KINDS[kind] + bytes(512)).kind == kind


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "more",
    [
        archive(),
        b"<html><body><script>alert(1)</script>",
        b"<?php system($_GET['c']); ?>",
        b"<SCRIPT src=//x></SCRIPT>",
    ],
    ids=["zip", "html", "php", "script"],
)
def test_a_second_file_behind_the_image_is_refused(kind: str, more: bytes):
    with pytest.raises(InvalidImage, match="more than an image"):
        read(KINDS[kind] + more)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP", "NIfTI"])
@pytest.mark.parametrize("more", [b"hello", b"Rar!\x1a\x07\x00", KINDS["PNG"]], ids=["text", "rar", "png"])
def test_anything_behind_the_end_is_refused_where_the_format_says_where_that_is(kind: str, more: bytes):
    with pytest.raises(InvalidImage, match="behind the end"):
        read(KINDS[kind] + more)


def test_scripts_in_the_metadata_are_refused():
    script = "<script>alert(1)</script>"
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", script)
    exif = Image.Exif()
    exif[0x9C9C] = script.encode("utf-16-le")  # XPComment
    exif_of_tiff = Image.Exif()
    exif_of_tiff[270] = script
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>'
    carriers = [
        picture(GREY, "PNG", pnginfo=info),
        picture(GREY, "JPEG", comment=script.encode()),
        picture(GREY, "JPEG", exif=exif),
        picture(GREY, "WEBP", exif=exif),
        picture(GREY, "TIFF", exif=exif_of_tiff),
        picture(GREY, "WEBP", xmp=svg),
        dicom(GREY, PatientComments=script),
    ]
    for data in carriers:
        with pytest.raises(InvalidImage, match="script"):
            read(data)


def test_a_pdf_at_the_head_of_an_image_is_refused():
    with pytest.raises(InvalidImage, match="PDF"):
        read(picture(GREY, "JPEG", comment=b"%PDF-1.4"))


def test_plain_metadata_is_no_reason_to_refuse():
    info = PngImagePlugin.PngInfo()
    info.add_text("Software", "a < b, <b>bold</b>, PK, MZ")
    assert read(picture(GREY, "PNG", pnginfo=info)).kind == "PNG"
    packet = b'<?xpacket begin=""?><x:xmpmeta xmlns:x="adobe:ns:meta/"></x:xmpmeta>'
    assert read(picture(GREY, "JPEG", xmp=packet)).kind == "JPEG"


def test_the_end_of_a_jpeg_is_found_behind_thumbnails_and_several_passes():
    thumbnail = picture(GREY[:40, :40], "JPEG")
    for options in ({}, {"progressive": True}, {"restart_marker_blocks": 2}):
        data = picture(Image.fromarray(GREY).convert("RGB"), "JPEG", exif=b"Exif\0\0" + thumbnail, **options)
        assert jpeg_end(data) == len(data)
        assert jpeg_end(data + b"more") == len(data)
        assert jpeg_end(data[:-2]) == len(data) - 2


def test_a_chunk_behind_the_last_of_a_png_is_refused():
    body = b"\0" * 8
    chunk = struct.pack(">I", len(body)) + b"teXt" + body + struct.pack(">I", zlib.crc32(b"teXt" + body))
    with pytest.raises(InvalidImage, match="behind the end"):
        read(KINDS["PNG"] + chunk)


def test_random_bytes_are_not_taken_for_a_script_or_an_archive():
    generator = np.random.default_rng(5)
    for _ in range(10):
        check(generator.bytes(1_000_000), "TIFF")


@pytest.mark.skipif("NEUROLOOP_REAL_DATA" not in os.environ, reason="NEUROLOOP_REAL_DATA is not set")
def test_no_real_scan_is_taken_for_more_than_an_image():
    files = sorted(Path(os.environ["NEUROLOOP_REAL_DATA"]).rglob("*.jpg"))
    assert len(files) > 7000
    for file in files[::10]:
        data = file.read_bytes()
        check(data, kind_of(data))


def test_of_a_jpeg_any_filling_is_passed_over_and_markers_without_an_end_are_no_image():
    jpeg = KINDS["JPEG"]
    filled = jpeg[:-2] + b"\xff\xfe\0\2" + b"\xff" * 100_000 + b"\xff\xd9"
    assert jpeg_end(filled) == len(filled)
    assert jpeg_end(filled + b"more") == len(filled)
    assert jpeg_end(jpeg[:-2] + b"\xff" * 9) == len(jpeg) + 7
    with pytest.raises(InvalidImage, match="behind the end"):
        read(jpeg[:-2] + b"\xff\xda\0\2" * 20_000 + b"\xff\xd9")


@pytest.mark.parametrize("said", [0, 54, 10_000_000])
def test_a_bmp_ends_with_its_pixels_whatever_size_it_says(said: int):
    bmp = KINDS["BMP"][:2] + struct.pack("<I", said) + KINDS["BMP"][6:]
    assert np.array_equal(read(bmp).pixels, read(KINDS["BMP"]).pixels)
    if said < len(bmp):
        with pytest.raises(InvalidImage, match="behind the end"):
            read(bmp + b"hello")
