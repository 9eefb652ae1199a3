import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from neuroloop.core.errors import ImageTooLarge, InvalidImage, UnsupportedImage
from neuroloop.imaging.decode import decode, encode_png


def picture(height=40, width=60):
    return np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def test_a_png_comes_back_pixel_by_pixel():
    pixels = picture()
    assert np.array_equal(decode(encode_png(pixels)), pixels)


def test_encoding_is_deterministic_and_carries_no_metadata():
    pixels = picture()
    data = encode_png(pixels)
    assert data == encode_png(pixels.copy())
    assert Image.open(io.BytesIO(data)).info == {}


def test_a_colour_png_can_be_encoded():
    colour = np.stack([picture()] * 3, axis=-1)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_png(colour)))), colour)


@pytest.mark.parametrize("kind", ["JPEG", "BMP", "WEBP"])
def test_other_formats_are_read_as_grey(kind):
    flat = Image.new("RGB", (50, 40), (120, 120, 120))
    pixels = decode(encoded(flat, kind))
    assert pixels.shape == (40, 50)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - 120).max() <= 2


def test_colour_becomes_luma():
    assert decode(encoded(Image.new("RGB", (40, 40), (255, 0, 0)), "PNG"))[0, 0] == 76


def test_transparency_is_laid_over_black():
    clear = Image.new("RGBA", (40, 40), (255, 255, 255, 0))
    assert decode(encoded(clear, "PNG")).max() == 0
    half = Image.new("LA", (40, 40), (200, 128))
    assert abs(int(decode(encoded(half, "PNG"))[0, 0]) - 100) <= 1


def test_a_palette_image_shows_its_colours_not_its_indices():
    palette = Image.new("P", (40, 40), 1)
    palette.putpalette([0, 0, 0, 200, 200, 200])
    assert decode(encoded(palette, "PNG"))[0, 0] == 200


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_deep_pixels_keep_their_greys_whatever_bits_are_in_use(bits):
    ramp = np.linspace(0, 2**bits - 1, 64 * 64).astype(np.uint16).reshape(64, 64)
    pixels = decode(encoded(Image.fromarray(ramp), "PNG"))
    assert np.array_equal(pixels, ramp >> (bits - 8))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(orientation):
    from PIL import ImageOps

    blocks = np.kron(np.array([[0, 80, 160], [240, 120, 40]], dtype=np.uint8), np.ones((32, 32), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(blocks), "PNG", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(decode(data), expected)


def test_broken_exif_does_not_lose_a_sound_image():
    data = encoded(Image.fromarray(picture()), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff garbage")
    assert decode(data).shape == (40, 60)


@pytest.mark.parametrize(
    "data", [b"hello", b"%PDF-1.4 ...", b"<svg/>", bytes(1000)], ids=["text", "pdf", "svg", "zeros"]
)
def test_bytes_that_are_no_image_are_refused_as_unsupported(data):
    with pytest.raises(UnsupportedImage, match=r"JPEG, PNG.*upload"):
        decode(data)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PPM"])
def test_formats_that_are_not_on_the_list_are_refused(kind):
    with pytest.raises(UnsupportedImage):
        decode(encoded(Image.fromarray(picture()), kind))


def test_an_empty_file_is_refused():
    with pytest.raises(InvalidImage, match="empty"):
        decode(b"")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP"])
def test_an_image_that_was_cut_off_is_refused(kind):
    data = encoded(Image.fromarray(picture(200, 200)).convert("RGB"), kind)
    with pytest.raises(InvalidImage, match=r"damaged or cut off|no image"):
        decode(data[: len(data) // 2])


def test_damaged_bytes_give_pixels_or_a_refusal_and_nothing_else():
    data = encode_png(picture())
    generator = np.random.default_rng(1)
    refused = 0
    for _ in range(200):
        broken = bytearray(data)
        for place in generator.integers(0, len(data), 4):
            broken[place] = int(generator.integers(256))
        try:
            decode(bytes(broken))
        except InvalidImage:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("size", [(31, 100), (100, 31), (1, 1)])
def test_an_image_with_a_side_below_32_pixels_is_refused(size):
    with pytest.raises(InvalidImage, match="at least 32"):
        decode(encoded(Image.new("L", size), "PNG"))


def test_too_many_bytes_are_refused_before_decoding():
    with pytest.raises(ImageTooLarge, match="20,000,000"):
        decode(bytes(20_000_001))


def test_too_many_pixels_are_refused_before_decoding():
    with pytest.raises(ImageTooLarge, match="60 x 40 px are more than 2,000"):
        decode(encode_png(picture()), max_pixels=2_000)


@pytest.mark.parametrize("side", [10_000, 60_000])
def test_a_decompression_bomb_is_refused_by_its_header(side):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    with pytest.raises(ImageTooLarge, match="pixels"):
        decode(bomb)
