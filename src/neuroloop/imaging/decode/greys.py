"""From values of any depth to 8-bit greys, and back to PNG."""

import struct
from typing import Any

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray
from PIL import Image

from neuroloop.imaging.decode.bounds import Limits, check_size

_CLIPPED = 0.1  # per cent of deep values that may end at either end: a hot pixel or a vessel must not darken the rest
_SAMPLE = 1_000_000  # values that percentiles are taken of
_MOST_STRETCHED = 8.0  # pixels longer than this have a broken spacing, not a shape


def eight_bits(
    values: NDArray[Any], *, turned: bool = False, padding: NDArray[np.bool_] | None = None
) -> NDArray[np.uint8]:
    """Whole or real numbers as uint8 of the same shape; where they are `turned`, the lowest becomes white.

    What is `padding` becomes black and has no part in the rest.

    Whole numbers of 0..255 keep their steps. Others are spread linearly up to the 99.9th percentile: from 0, or from
    the 0.1st percentile where that is below 0 or beyond half of the upper end, as it is behind an offset; real numbers
    always from the 0.1st. What is no number becomes black.
    """
    if padding is not None and padding.any() and not padding.all():
        pixels = np.zeros(values.shape, np.uint8)
        pixels[~padding] = eight_bits(values[~padding], turned=turned)
        return pixels
    real = values.dtype.kind == "f"
    if not real and values.min(initial=0) >= 0 and values.max(initial=0) <= 255:
        return 255 - values.astype(np.uint8) if turned else values.astype(np.uint8)
    if turned and real:
        values = values.max(where=np.isfinite(values), initial=-np.inf) - values
    elif turned:
        return eight_bits(np.subtract(int(values.max()), values, dtype=np.int64))
    finite = values[np.isfinite(values)] if real else values.ravel()
    sample = finite[:: max(1, finite.size // _SAMPLE)].astype(np.float64)
    if sample.size == 0:
        return np.zeros(values.shape, np.uint8)
    low, high = (float(end) for end in np.percentile(sample, (_CLIPPED, 100 - _CLIPPED)))
    if not real and 0 <= low <= high / 2:
        low = 0.0
    if high <= low:  # nearly all of it has one value
        low, high = float(finite.min()), float(finite.max())
    return scaled(values, low, high)


def scaled(values: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    """`values` with `low` as 0 and `high` as 255, clipped; all 0 where there is nothing between the two."""
    if not high > low:
        return np.zeros(values.shape, np.uint8)
    spread = np.subtract(values, low, dtype=np.float32 if values.dtype.itemsize < 4 else np.float64)
    spread *= 255.0 / (high - low)
    return np.rint(np.clip(np.nan_to_num(spread, copy=False, nan=0.0), 0, 255)).astype(np.uint8)


def luma(colour: NDArray[Any], *, bits: int) -> NDArray[np.uint8]:
    """RGB (H, W, 3), unsigned, of which the lowest `bits` say something, as grey (ITU-R 601)."""
    if colour.dtype != np.uint8:
        colour = scaled(colour, 0, float(2**bits - 1))
    return np.asarray(Image.fromarray(np.ascontiguousarray(colour)).convert("L"))


def square(pixels: NDArray[np.uint8], row_spacing: float, column_spacing: float, limits: Limits) -> NDArray[np.uint8]:
    """`pixels` resampled so that each is as high as wide, by the distance of rows and of columns in any one unit.

    They stay as they are where the two differ by less than 2 %, or by so much that they cannot be meant.
    """
    ratio = row_spacing / column_spacing if row_spacing > 0 and column_spacing > 0 else 1.0
    if not 1 / _MOST_STRETCHED < ratio < _MOST_STRETCHED or abs(ratio - 1) < 0.02:
        return pixels
    height, width = pixels.shape
    size = (width, round(height * ratio)) if ratio > 1 else (round(width / ratio), height)
    check_size(*size, limits)
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """The PNG of uint8 pixels, grey (H, W) or colour (H, W, 3), without metadata.

    Equal pixels give equal bytes on machines of one kind. Written here, because a library tries five filters on every
    row, which took half of the time of a prediction: every row is its difference from the one above (PNG's filter 2),
    packed by ISA-L.
    """
    rows = np.ascontiguousarray(pixels).reshape(len(pixels), -1)
    filtered = np.empty((rows.shape[0], rows.shape[1] + 1), np.uint8)
    filtered[:, 0] = 2
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])  # modulo 256, as the filter is defined
    size = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8, 0 if pixels.ndim == 2 else 2, 0, 0, 0)
    parts = ((b"IHDR", size), (b"IDAT", isal_zlib.compress(filtered.data, 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", isal_zlib.crc32(name + data))
        for name, data in parts
    )
