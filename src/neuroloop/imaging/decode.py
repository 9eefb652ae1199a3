"""From bytes of unknown origin to grey pixels, and back to PNG."""

import io
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from neuroloop.core.errors import ImageTooLarge, InvalidImage, UnsupportedImage

FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
"""Formats that Pillow may try. Others (PostScript, fonts, vector formats, ...) only widen the attack surface."""

SMALLEST_SIDE = 32
"""Pixels. Below this no anatomy can be told apart, and the model's input would be mostly interpolation."""

_ORIENTATION_TAG = 0x0112
_UPRIGHT: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.T,
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels.T, 2),
    8: np.rot90,
}


def decode(data: bytes, *, max_pixels: int = 40_000_000, max_bytes: int = 20_000_000) -> NDArray[np.uint8]:
    """Read an image as grey pixels: uint8, shape (H, W), 0..255, both sides at least 32.

    Colour becomes luma (ITU-R 601), transparency is laid over black, more than 8 bits are reduced to the upper 8 that
    are in use (a 12-bit scan in a 16-bit file keeps its greys), EXIF orientation is honoured and all other metadata
    dropped. The size is checked before any pixel is decoded.

    Raises `ImageTooLarge` beyond `max_bytes` or `max_pixels`, `UnsupportedImage` where the bytes are no image in one of
    `FORMATS`, `InvalidImage` where the image is damaged, cut off or too small.
    """
    if len(data) > max_bytes:
        raise ImageTooLarge(
            "The file is too large",
            why=f"it has {len(data):,} bytes, at most {max_bytes:,} are read",
            fix="upload a single slice as JPEG or PNG",
        )
    if not data:
        raise InvalidImage("The file is empty", why="it has 0 bytes", fix="upload a slice as JPEG or PNG")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image.width, image.height, max_pixels)
            return _upright(_grey(image), _orientation(image))
    except InvalidImage:
        raise
    except Image.UnidentifiedImageError:
        raise UnsupportedImage(
            "The file is no image that can be read",
            why=f"its bytes are not {', '.join(FORMATS[:-1])} or {FORMATS[-1]}",
            fix="upload a slice as JPEG or PNG",
        ) from None
    except Image.DecompressionBombError:
        raise ImageTooLarge(
            "The image has too many pixels", why=f"at most {max_pixels:,} are read", fix="upload a smaller image"
        ) from None
    except Exception as error:  # damaged files make Pillow raise OSError, SyntaxError, ValueError, struct.error, ...
        raise InvalidImage(
            "The image is damaged or cut off", why=f"decoding stopped: {error}", fix="export or download it again"
        ) from error


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """The PNG of uint8 pixels, grey (H, W) or colour (H, W, 3); equal pixels give equal bytes, without metadata."""
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(out, "PNG", compress_level=6)
    return out.getvalue()


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageTooLarge(
            "The image has too many pixels",
            why=f"{width} x {height} px are more than {max_pixels:,}",
            fix="upload a smaller image",
        )
    if min(width, height) < SMALLEST_SIDE:
        raise InvalidImage(
            "The image is too small",
            why=f"it has {width} x {height} px, each side must have at least {SMALLEST_SIDE}",
            fix="upload the slice in its original size",
        )


def _grey(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I"):
        deep = np.clip(np.asarray(image).astype(np.int64), 0, None)
        bits = max(8, int(deep.max()).bit_length())
        return (deep >> (bits - 8)).astype(np.uint8)
    if image.has_transparency_data:
        opaque = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", opaque.size, (0, 0, 0, 255)), opaque)
    return np.array(image.convert("L"), dtype=np.uint8)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # broken metadata beside sound pixels is no reason to refuse the image
        return 1


def _upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    turn = _UPRIGHT.get(orientation)
    return np.ascontiguousarray(turn(pixels)) if turn else pixels
