"""Pictures of everyday formats, by Pillow."""

import io
import logging
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops

from neuroloop.core.errors import ImageTooLarge, InvalidImage, UnsupportedImage
from neuroloop.imaging.decode import colour
from neuroloop.imaging.decode.bounds import Limits, check_size, choose, damaged
from neuroloop.imaging.decode.foreign import jpeg_end
from neuroloop.imaging.decode.greys import eight_bits

logging.getLogger("PIL").setLevel(logging.INFO)  # below, it quotes the metadata of what it reads

_SIGNATURES = (  # kind, where its signature stands, the signature
    ("JPEG", 0, b"\xff\xd8\xff"),
    ("PNG", 0, b"\x89PNG\r\n\x1a\n"),
    ("TIFF", 0, b"II*\0"),
    ("TIFF", 0, b"MM\0*"),
    ("TIFF", 0, b"II+\0"),
    ("TIFF", 0, b"MM\0+"),
    ("WEBP", 8, b"WEBP"),
    ("BMP", 0, b"BM"),
)
FORMATS = tuple(dict.fromkeys(kind for kind, _, _ in _SIGNATURES))
"""Formats that Pillow may try. Others (PostScript, fonts, vector formats, ...) only widen the attack surface."""

PLAIN_BYTES, PLAIN_PIXELS, PLAIN_METADATA = 2_000_000, 2_000_000, 65_536
"""Up to these, a plain picture (see `is_plain`) costs at most some 0.1 s and 50 MB, whatever its bytes are."""

_PIECE = 64  # bytes of metadata that a piece of a file costs, however small it is
_FEWEST_LEVELS = 64  # that 16-bit colours must keep in 8 bits
_ORIENTATION_TAG, _PHOTOMETRIC_TAG, _WHITE_IS_ZERO = 0x0112, 0x0106, 0
_BITS_TAG, _SAMPLE_TAG, _PLANAR_TAG = 258, 339, 284
_UPRIGHT: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.T,
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels.T, 2),
    8: np.rot90,
}


def kind_of(data: bytes) -> str:
    """The one of `FORMATS` that the bytes begin like; empty where they begin like none."""
    return next((kind for kind, at, signature in _SIGNATURES if data.startswith(signature, at)), "")


def is_plain(data: bytes) -> bool:
    """Whether this is a small PNG or JPEG that costs little to decode, whatever stands in it.

    The work of both grows with bytes and pixels only, which are bounded here, if a JPEG codes all its colours in one
    pass: each pass goes over all pixels anew, and a few bytes are enough to make one. Size and passes are taken from
    the header, which the decoder follows as well. Metadata are read tag by tag, which is slow, so there may be little
    of them, none packed, and few pieces.
    """
    if len(data) > PLAIN_BYTES:
        return False
    kind = kind_of(data)
    if kind == "PNG":
        # A decoder may follow the last header of several. (What looks like another may be chance; then it is no harm.)
        small = data[12:16] == b"IHDR" and data.count(b"IHDR") == 1 and _area(data[16:24], 4) <= PLAIN_PIXELS
        return small and _png_metadata(data) <= PLAIN_METADATA
    if kind != "JPEG":
        return False
    place, colours, metadata = 2, 0, 0
    while place + 10 <= len(data) and data[place] == 0xFF:
        code = data[place + 1]
        if code in (0xC0, 0xC1):  # sequential; every other kind of frame is not plain
            if colours or _area(data[place + 5 : place + 9], 2) > PLAIN_PIXELS:
                return False
            colours = data[place + 9]
        elif code == 0xDA:
            return colours > 0 and data[place + 4] == colours
        elif code == 0xFE or 0xE0 <= code <= 0xEF:
            metadata += int.from_bytes(data[place + 2 : place + 4], "big")
        elif code not in (0xC4, 0xDB, 0xDD):
            return False
        metadata += _PIECE
        if metadata > PLAIN_METADATA:
            return False
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return False


def read(data: bytes, kind: str, frame: int | None, limits: Limits) -> tuple[NDArray[np.uint8], int, int, float]:
    """Grey pixels, uint8 (H, W), of one frame; how many frames there are; which one it is; how much is in colour.

    Only the pages of a TIFF are frames; of a moving picture the first is read.
    """
    if kind == "PNG" and not _png_intact(data):  # Pillow would show what is left of it, and black for the rest
        raise damaged("it begins as PNG, but the checksum of its pixels is wrong, as where a download broke off")
    try:
        with Image.open(io.BytesIO(data), formats=[kind]) as image:
            frames = _pages(image, limits) if kind == "TIFF" else 1
            chosen = choose(frame, frames, limits)
            if frames > 1:
                image.seek(chosen - 1)
            check_size(image.width, image.height, limits)
            return _upright(_grey(image), _orientation(image)), frames, chosen, colour.share(image)
    except InvalidImage:
        raise
    except Image.UnidentifiedImageError:
        raise UnsupportedImage(
            "The file is no image that can be read",
            why=f"it begins as {kind}, but what follows is none, or of a rare variant",
            fix="export the slice again as JPEG or PNG",
        ) from None
    except Image.DecompressionBombError:
        raise ImageTooLarge(
            "The image has too many pixels", why=f"at most {limits.pixels:,} are read", fix="upload a smaller image"
        ) from None
    except MemoryError:
        raise
    except Exception:  # damaged files make Pillow raise OSError, SyntaxError, ValueError, struct.error, ...
        early = kind == "JPEG" and jpeg_end(data) == len(data) and not data.endswith(b"\xff\xd9")
        why = "its data end early" if early else "its data end early or contradict themselves"
        raise damaged(f"it begins as {kind}, but {why}") from None


def _png_intact(data: bytes) -> bool:
    """Whether the pixels of a PNG are what its checksums say; those of one that is cut off are not."""
    for name, start, size in _png_pieces(data):
        end = start + size
        if name == b"IDAT" and zlib.crc32(data[start - 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return False
    return True


def _png_metadata(data: bytes) -> float:
    """Bytes of what is not pixels in a PNG, and what its pieces cost, as far as it is plain; infinite if packed."""
    found = 0
    for name, _, size in _png_pieces(data):
        if name in (b"zTXt", b"iTXt", b"iCCP"):
            return float("inf")
        found += _PIECE + (0 if name == b"IDAT" else size)
        if found > PLAIN_METADATA:
            break
    return found


def _png_pieces(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """The pieces of a PNG as it announces them: name, where its content begins, bytes of that."""
    place = 8
    while place + 8 <= len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        yield data[place + 4 : place + 8], place + 8, size
        place += 12 + size


def _area(sides: bytes, size: int) -> int:
    """Pixels of an image whose two sides stand here, `size` bytes each."""
    return int.from_bytes(sides[:size], "big") * int.from_bytes(sides[size:], "big")


def _pages(image: Image.Image, limits: Limits) -> int:
    """How many pages a TIFF has; one more than the limit where it has more than that."""
    for page in range(1, limits.frames + 1):
        try:
            image.seek(page)
        except EOFError:
            image.seek(0)
            return page
    return limits.frames + 1


def _grey(image: Image.Image) -> NDArray[np.uint8]:
    tags = getattr(image, "tag_v2", {})
    if image.mode == "L" and tags.get(_SAMPLE_TAG) == (2,):  # Pillow takes signed bytes for unsigned ones
        return np.array(image, dtype=np.uint8) ^ np.uint8(0x80)
    if image.mode[0] in "IF":
        values, transparent = np.asarray(image), image.info.get("transparency")
        if image.mode == "I" and tags.get(_BITS_TAG) == (32,) and tags.get(_SAMPLE_TAG, (1,)) == (1,):
            values = values.view(np.uint32)  # Pillow takes them for signed
        return eight_bits(
            values,
            turned=tags.get(_PHOTOMETRIC_TAG) == _WHITE_IS_ZERO,
            padding=values == transparent if isinstance(transparent, int) else None,
        )
    deep = image.format in ("PNG", "TIFF") and any(";16" in str(tile.args) for tile in getattr(image, "tile", [])[:1])
    if tags.get(_PLANAR_TAG) == 2 and max(tags.get(_BITS_TAG, (8,))) > 8:  # Pillow would read half of each plane
        raise UnsupportedImage(
            "The TIFF has 16-bit colours in planes of their own",
            why="this way of writing them is not read",
            fix="export the slice as 16-bit grey (PNG or TIFF), or as DICOM",
        )
    if image.mode == "LAB":
        return np.array(image.getchannel(0), dtype=np.uint8)
    if not image.has_transparency_data:
        pixels = np.array(image.convert("L"), dtype=np.uint8)
    else:
        if not image.mode.endswith("A"):
            image = image.convert("RGBA")
        if image.format == "BMP" and image.getchannel("A").getextrema() == (0, 0):  # a field that nobody filled
            image.putalpha(255)
        pixels = np.array(ImageChops.multiply(image.convert("L"), image.getchannel("A")), dtype=np.uint8)
    if not deep:
        return pixels
    darkest, brightest = np.percentile(pixels, (0.1, 99.9))
    # Of 16 bits Pillow keeps the upper eight. One even grey may be just that, unless it is black.
    if brightest == 0 or 0 < brightest - darkest < _FEWEST_LEVELS - 1:
        raise UnsupportedImage(
            "The image has 16-bit colours that are too much alike",
            why=f"of colours only the upper 8 bits are read: some {brightest - darkest + 1:.0f} levels would be left",
            fix="export the slice as 16-bit grey (PNG or TIFF), or as DICOM",
        )
    return pixels


def _orientation(image: Image.Image) -> int:
    """As EXIF has it; that of a TIFF is applied by Pillow, which then drops it."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # broken metadata beside sound pixels is no reason to refuse the image
        return 1


def _upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    turn = _UPRIGHT.get(orientation)
    return np.ascontiguousarray(turn(pixels)) if turn else pixels
