import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from neuroloop.core.errors import ImageTooLarge, InvalidImage, UnsupportedImage
from neuroloop.imaging.decode import Limits, decode, encode_png, is_plain, read


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


@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (700, 1), (33, 47), (2, 3, 3), (65, 40, 3)])
def test_a_png_of_any_shape_is_one_that_other_readers_verify(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    encoded = encode_png(pixels)
    with Image.open(io.BytesIO(encoded), formats=["PNG"]) as image:
        image.verify()  # the chunks' checksums
    with Image.open(io.BytesIO(encoded), formats=["PNG"]) as image:
        assert image.info == {}
        np.testing.assert_array_equal(np.asarray(image), pixels)
    by_opencv = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(by_opencv, pixels if pixels.ndim == 2 else pixels[..., ::-1])
    assert encode_png(np.asfortranarray(pixels)) == encoded


def test_a_colour_png_can_be_encoded():
    colour = np.stack([picture()] * 3, axis=-1)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_png(colour)))), colour)


def deep_png(colour_type: int, values: np.ndarray, *chunks: tuple[bytes, bytes]) -> bytes:
    """A 16-bit PNG of `values` (H, W) in every channel, with further chunks before its pixels."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]
    rows = np.repeat(values[..., None], channels, axis=2).astype(">u2")
    if colour_type in (4, 6):
        rows[..., -1] = 65535
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour_type, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = ((b"IHDR", head), *chunks, (b"IDAT", body), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )


@pytest.mark.parametrize("colour_type", [2, 4, 6])
def test_sixteen_bit_colours_are_read_where_eight_of_them_suffice_and_refused_where_not(colour_type):
    ramp = np.tile(np.arange(256, dtype=np.uint16), (40, 1))
    assert np.array_equal(decode(deep_png(colour_type, ramp * 257)), ramp)
    with pytest.raises(UnsupportedImage, match=r"too much alike.*some 4 levels.*16-bit grey"):
        decode(deep_png(colour_type, ramp * 4))
    marked = ramp * 4 + 30_000
    marked[0, 0] = 65535
    with pytest.raises(UnsupportedImage, match="too much alike"):
        decode(deep_png(colour_type, marked))


def test_sixteen_bit_greys_keep_their_levels_turned_or_transparent():
    ramp = np.tile(np.arange(300, dtype=np.uint16), (40, 1))
    reference = decode(deep_png(0, ramp))
    assert len(np.unique(reference)) > 250
    white_is_zero = encoded(Image.fromarray(65535 - ramp), "TIFF", tiffinfo={262: 0})
    assert np.abs(decode(white_is_zero).astype(int) - reference).max() <= 1
    ramp[:2] = 65535
    for offset in (0, 30_000):
        shifted = np.where(ramp == 65535, 65535, ramp + offset).astype(np.uint16)
        see_through = decode(deep_png(0, shifted, (b"tRNS", struct.pack(">H", 65535))))
        assert see_through[:2].max() == 0
        assert np.abs(see_through[2:].astype(int) - reference[2:]).max() <= 1


def test_a_large_offset_costs_no_levels_in_whole_numbers_of_32_bits():
    ramp = np.tile(np.arange(300, dtype=np.int32), (40, 1))
    deep = decode(encoded(Image.fromarray(ramp + 2**30, mode="I"), "TIFF"))
    assert np.abs(deep.astype(int) - decode(encoded(Image.fromarray(ramp + 30_000, mode="I"), "TIFF"))).max() <= 1


def test_signed_bytes_of_a_tiff_are_read_as_such():
    grey = np.tile(np.arange(256, dtype=np.uint8), (40, 1))
    signed = encoded(Image.fromarray(grey ^ 0x80), "TIFF", tiffinfo={339: 2})
    assert Image.open(io.BytesIO(signed)).tag_v2[339] == (2,)
    assert np.array_equal(decode(signed), grey)


def test_a_dark_picture_of_16_bits_a_pixel_is_no_16_bit_colour():
    rows = np.full((40, 40), 0x0841, "<u2").tobytes()
    head = struct.pack("<IiiHHIIiiII", 40, 40, 40, 1, 16, 3, len(rows), 0, 0, 0, 0) + struct.pack(
        "<III", 0xF800, 0x7E0, 0x1F
    )
    data = b"BM" + struct.pack("<IHHI", 14 + len(head) + len(rows), 0, 0, 14 + len(head)) + head + rows
    assert decode(data).max() < 64


def test_a_picture_with_much_or_packed_metadata_is_not_plain():
    exif = Image.Exif()
    exif[0x010E] = "x" * 60_000
    assert is_plain(encoded(Image.fromarray(picture()), "PNG", exif=exif))
    assert is_plain(encoded(Image.fromarray(picture()), "JPEG", exif=exif))
    segment = b"\xff\xe1" + struct.pack(">H", 60_002) + b"Exif\0\0".ljust(60_000, b"x")
    jpeg = encoded(Image.fromarray(picture()), "JPEG")
    assert not is_plain(jpeg[:2] + 2 * segment + jpeg[2:])
    assert not is_plain(jpeg[:2] + 2000 * b"\xff\xfe\0\2" + jpeg[2:])
    assert not is_plain(jpeg[:2] + 2000 * b"\xff\xdb\0\2" + jpeg[2:])
    grey = picture().astype(np.uint16)
    assert is_plain(deep_png(0, grey, (b"tEXt", b"Software\0x")))
    assert not is_plain(deep_png(0, grey, *[(b"prVt", b"")] * 2000))
    assert not is_plain(deep_png(0, grey, (b"iCCP", b"x\0\0" + zlib.compress(b"x"))))
    assert not is_plain(deep_png(0, grey, (b"eXIf", b"II*\0" + bytes(70_000))))
    assert not is_plain(deep_png(0, grey, (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"x"))))


@pytest.mark.parametrize("kind", ["JPEG", "BMP", "WEBP", "TIFF"])
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


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_deep_pixels_keep_their_greys_whatever_bits_are_in_use(bits, kind):
    ramp = np.linspace(0, 2**bits - 1, 64 * 64).astype(np.uint16).reshape(64, 64)
    pixels = decode(encoded(Image.fromarray(ramp), kind))
    assert np.abs(pixels.astype(int) - (ramp >> (bits - 8))).max() <= 1


def test_one_hot_pixel_does_not_darken_a_deep_image():
    deep = np.full((64, 64), 300, np.uint16)
    deep[:, 32:] = 600
    deep[0, 0] = 60_000
    pixels = decode(encoded(Image.fromarray(deep), "PNG"))
    assert (pixels[10, 10], pixels[10, 50], pixels[0, 0]) == (128, 255, 255)


def test_values_below_zero_and_fractions_are_spread_over_the_greys():
    ramp = np.linspace(-700.5, 900.5, 64 * 64).reshape(64, 64)
    for values in (ramp.astype(np.float32), ramp.astype(np.int32)):
        pixels = decode(encoded(Image.fromarray(values), "TIFF"))
        assert np.abs(pixels - (ramp + 700.5) / 1601 * 255).max() <= 2


def test_what_is_not_a_number_becomes_black():
    values = np.tile(np.linspace(5, 10, 64, dtype=np.float32), (64, 1))
    values[:8] = np.nan
    pixels = decode(encoded(Image.fromarray(values), "TIFF"))
    assert pixels[:8].max() == 0
    assert (pixels[20, 0], pixels[20, -1]) == (0, 255)


def test_colour_of_16_bits_keeps_its_upper_eight():
    import cv2

    deep = np.full((40, 40, 3), 0x8040, np.uint16)
    for kind in (".png", ".tiff"):
        assert decode(cv2.imencode(kind, deep)[1].tobytes())[0, 0] == 0x80


def test_cmyk_becomes_the_grey_of_its_colour():
    for kind in ("JPEG", "TIFF"):
        ink = Image.new("CMYK", (40, 40), (0, 0, 0, 155))
        assert abs(int(decode(encoded(ink, kind))[0, 0]) - 100) <= 2


def test_a_tiff_whose_white_is_zero_is_turned_over():
    deep = np.full((40, 40), 1000, np.uint16)
    deep[:20] = 3000
    pixels = decode(encoded(Image.fromarray(deep), "TIFF", tiffinfo={262: 0}))
    assert pixels[0, 0] < pixels[-1, 0]


def test_of_the_pages_of_a_tiff_the_middle_or_the_chosen_one_is_read():
    pages = [Image.new("L", (40, 40), grey) for grey in (10, 20, 30, 40)]
    data = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    middle = read(data)
    assert (middle.frames, middle.frame, middle.pixels[0, 0]) == (4, 2, 20)
    assert [read(data, frame=n).pixels[0, 0] for n in (1, 2, 3, 4)] == [10, 20, 30, 40]
    for wrong in (0, 5, -1, 2**40):
        with pytest.raises(InvalidImage, match="frames 1 to 4"):
            read(data, frame=wrong)
    with pytest.raises(ImageTooLarge, match="at most 3"):
        read(data, limits=Limits(frames=3))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_of_a_moving_picture_the_first_one_is_read(kind):
    frames = [Image.new("L", (40, 40), grey) for grey in (10, 200)]
    data = encoded(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    found = read(data)
    assert (found.frames, int(found.pixels[0, 0])) == (1, 10)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(orientation, kind):
    from PIL import ImageOps

    blocks = np.kron(np.array([[0, 80, 160], [240, 120, 40]], dtype=np.uint8), np.ones((32, 32), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(blocks), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("L"))
    assert np.array_equal(decode(data), expected)


def test_broken_exif_does_not_lose_a_sound_image():
    data = encoded(Image.fromarray(picture()), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff garbage")
    assert decode(data).shape == (40, 60)


@pytest.mark.parametrize(
    "data", [b"hello", b"%PDF-1.4 ...", b"<svg/>", bytes(1000)], ids=["text", "pdf", "svg", "zeros"]
)
def test_bytes_that_are_no_image_are_refused_as_unsupported(data):
    with pytest.raises(UnsupportedImage, match=r"JPEG, PNG.*DICOM or NIfTI.*upload"):
        decode(data)


@pytest.mark.parametrize("kind", ["GIF", "PPM", "ICO"])
def test_formats_that_are_not_on_the_list_are_refused(kind):
    with pytest.raises(UnsupportedImage):
        decode(encoded(Image.fromarray(picture()), kind))


def test_an_empty_file_is_refused():
    with pytest.raises(InvalidImage, match="empty"):
        decode(b"")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP", "TIFF"])
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


def test_the_upper_half_of_32_bits_is_bright():
    deep = np.linspace(0, 2**32 - 1, 64 * 64).reshape(64, 64).astype(np.uint32)
    directory = {256: 64, 257: 64, 258: 32, 259: 1, 262: 1, 273: 200, 277: 1, 278: 64, 279: deep.nbytes, 339: 1}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in directory.items())
    head = b"II*\0" + struct.pack("<IH", 8, len(directory)) + entries + bytes(4)
    pixels = decode(head.ljust(200, b"\0") + deep.tobytes())
    assert np.all(np.diff(pixels.ravel().astype(int)) >= 0)
    assert pixels[-1, -1] == 255


def test_16_bit_colours_in_planes_are_refused_in_words():
    planes = np.stack([picture(64, 64).astype(np.uint16) << 8] * 3)
    directory = [
        *((256, 4, 1, 64), (257, 4, 1, 64), (258, 3, 3, 220), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 3, 230)),
        *((277, 3, 1, 3), (278, 4, 1, 64), (279, 4, 3, 250), (284, 3, 1, 2)),
    ]
    head = b"II*\0" + struct.pack("<IH", 8, len(directory))
    head += b"".join(struct.pack("<HHII", *entry) for entry in directory) + bytes(4)
    size = 64 * 64 * 2
    tables = struct.pack("<HHH", 16, 16, 16).ljust(10, b"\0")
    tables += struct.pack("<IIIxxxxxxxx", *(300 + size * n for n in range(3))) + struct.pack("<III", size, size, size)
    with pytest.raises(UnsupportedImage, match="planes of their own"):
        decode((head.ljust(220, b"\0") + tables).ljust(300, b"\0") + planes.tobytes())


def test_an_alpha_that_nobody_filled_in_hides_nothing_of_a_bmp():
    whole = Image.fromarray(np.dstack([picture()] * 3 + [np.full((40, 60), 7, np.uint8)]))
    data = bytearray(encoded(whole, "BMP"))
    for place in range(len(data) - 40 * 60 * 4 + 3, len(data), 4):
        data[place] = 0
    assert np.array_equal(decode(bytes(data)), picture())


@pytest.mark.parametrize("lost", [0.05, 0.5, 0.9])
def test_a_png_whose_end_is_zeros_is_damaged_not_black(lost):
    whole = encode_png(picture(200, 200))
    kept = int(len(whole) * (1 - lost))
    with pytest.raises(InvalidImage, match="a download broke off"):
        decode(whole[:kept] + bytes(len(whole) - kept))


def test_what_somebody_chose_to_learn_from_may_be_large_and_have_data_behind_its_end():
    large = encoded(Image.fromarray(picture(4_600, 4_600)), "BMP")
    photo = encoded(Image.fromarray(picture()), "JPEG") + b"what a phone writes there"
    for data, fault in ((large, "too large"), (photo, "more than an image")):
        assert decode(data).std() > 0
        with pytest.raises(InvalidImage, match=fault):
            read(data)


@pytest.mark.parametrize("size", [(31, 100), (100, 31), (1, 1)])
def test_an_image_with_a_side_below_32_pixels_is_refused(size):
    with pytest.raises(InvalidImage, match="at least 32"):
        decode(encoded(Image.new("L", size), "PNG"))


def test_too_many_bytes_are_refused_before_decoding():
    with pytest.raises(ImageTooLarge, match="20,000,000"):
        read(bytes(20_000_001))


def test_too_many_pixels_are_refused_before_decoding():
    with pytest.raises(ImageTooLarge, match="60 x 40 px are more than 2,000"):
        read(encode_png(picture()), limits=Limits(pixels=2_000))


@pytest.mark.parametrize("size", [(32, 1_200_000), (9_000, 40)])
def test_a_strip_that_would_be_padded_to_a_huge_square_is_refused_by_its_header(size):
    with pytest.raises(ImageTooLarge, match=r"no side may have more than 8,944"):
        read(encoded(Image.new("L", size), "PNG"))


@pytest.mark.parametrize("side", [10_000, 60_000])
def test_a_decompression_bomb_is_refused_by_its_header(side):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    with pytest.raises(ImageTooLarge, match="pixels"):
        read(bomb)


def test_small_pngs_and_jpegs_of_one_pass_are_plain():
    pixels = picture(64, 64)
    assert is_plain(encode_png(pixels))
    for colour in (Image.fromarray(pixels), Image.fromarray(pixels).convert("RGB"), Image.new("CMYK", (64, 64))):
        assert is_plain(encoded(colour, "JPEG"))


def test_a_png_with_two_headers_is_not_plain_for_the_decoder_may_follow_the_second():
    small, wide = encode_png(picture(64, 64)), encode_png(picture(400, 400))
    start, end = 8, 8 + 25  # of the header
    assert np.asarray(Image.open(io.BytesIO(small[:end] + wide[start:]))).shape == (400, 400)
    assert not is_plain(small[:end] + wide[start:])


def test_what_may_cost_more_than_its_size_says_is_not_plain():
    small, wide = Image.fromarray(picture(64, 64)), Image.new("L", (3000, 1500))
    assert not is_plain(encoded(small, "JPEG", progressive=True))
    assert not is_plain(encoded(wide, "PNG"))
    assert not is_plain(encoded(wide, "JPEG"))
    assert not is_plain(encode_png(picture(64, 64)) + bytes(2_000_000))
    for kind in ("TIFF", "WEBP", "BMP"):
        assert not is_plain(encoded(small, kind))
    scans = encoded(small.convert("RGB"), "JPEG")
    passes = scans.replace(b"\xff\xda\x00\x0c\x03", b"\xff\xda\x00\x0c\x01")  # one colour a pass
    assert passes != scans
    assert not is_plain(passes)
    assert not any(is_plain(data) for data in (b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"\xff\xd8" * 50))


def test_what_only_begins_like_a_png_is_not_plain():
    from imaging.files import axial, dicom, nifti

    for other in (dicom(picture(64, 64)), nifti(axial(picture(64, 64)))):
        start = encode_png(picture(64, 64))[:100]
        assert is_plain(start + bytes(100))
        assert not is_plain(start + other[100:])
