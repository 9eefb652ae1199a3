"""The one form in which training and serving see an image: the head, square, on black, in robust greys.

What this takes away (frame size, margin, border, stamped text outside the head, overall brightness) tells the source
of an image, not the disease. On the public four-class set, border and bounding-box statistics of the whole image alone
classify 81 % of a leak-free split; those of the canonical image 31 %, where 28 % are of the largest class.
"""

from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

_Level = TypeVar("_Level", np.float32, np.uint8)

CANONICAL_VERSION = "2"
"""Changes whenever the same pixels would give another canonical image; a bundle refuses another version."""

_WORK = 128  # pixels of the long side on which the head is outlined: enough for an outline, fast to label
_MARGIN = 0.07  # of the head's longer side, on each side of the square: the outermost sixteenth is black in every image
_LOW, _HIGH = 1.0, 99.0  # percentiles of the head that become 0 and 255


class Box(NamedTuple):
    """A square in pixels of the original image; it may reach beyond the frame."""

    top: int
    left: int
    height: int
    width: int


def canonicalize(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The canonical image: uint8 (H, W) -> uint8 (size, size).

    The head (see `head_box`) is cut out with its background blanked, padded to a square with black, resized, and its
    1st to 99th percentile stretched to 0..255. An image without contrast comes out black.
    """
    return canonical_and_box(pixels, size)[0]


def canonical_and_box(pixels: NDArray[np.uint8], size: int) -> tuple[NDArray[np.uint8], Box]:
    """What `canonicalize` and `head_box` give, from one look for the head."""
    mask, box = _outline(pixels)
    head = _resize(_cut(pixels, box), size)
    inside = _resize(_cut_mask(mask, box, pixels.shape), size) > 0.5
    low, high = _percentiles(head[inside])
    if high - low < 1.0:
        return np.zeros((size, size), dtype=np.uint8), box
    stretched = np.clip((head - low) * (255.0 / (high - low)), 0.0, 255.0)
    return np.where(inside, np.rint(stretched), 0.0).astype(np.uint8), box


def head_box(pixels: NDArray[np.uint8]) -> Box:
    """The square around the head of a uint8 (H, W) image.

    The head is the largest component brighter than the background, its holes filled; the whole frame where there is
    none.
    """
    return _outline(pixels)[1]


def place(heat: NDArray[_Level], box: Box, shape: tuple[int, int]) -> NDArray[_Level]:
    """Put a map of the canonical frame back into the original one, bilinearly; zeros outside the box.

    `heat`: float32 or uint8 (h, w) over the canonical image; `shape`: (H, W) of the original. Returns such an (H, W).
    """
    out = np.zeros(shape, dtype=heat.dtype)
    top, left = max(box.top, 0), max(box.left, 0)
    bottom, right = min(box.top + box.height, shape[0]), min(box.left + box.width, shape[1])
    if bottom <= top or right <= left:
        return out
    full = Image.fromarray(heat).resize((box.width, box.height), Image.Resampling.BILINEAR)
    out[top:bottom, left:right] = np.asarray(full)[top - box.top : bottom - box.top, left - box.left : right - box.left]
    return out


def _outline(pixels: NDArray[np.uint8]) -> tuple[NDArray[np.bool_], Box]:
    """The head's mask on a reduced grid over the whole frame, and its box in original pixels."""
    height, width = pixels.shape
    scale = max(height, width) / _WORK
    rows, columns = (max(1, round(side / scale)) for side in (height, width))
    small = np.asarray(Image.fromarray(pixels).resize((columns, rows), Image.Resampling.BOX), dtype=np.float64)
    mask = _largest(ndimage.uniform_filter(small, 3) > _background_level(small))
    ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, bottom = ys[0] * height / rows, (ys[-1] + 1) * height / rows
    left, right = xs[0] * width / columns, (xs[-1] + 1) * width / columns
    side = max(1, round(max(bottom - top, right - left) * (1 + 2 * _MARGIN)))
    return mask, Box(round((top + bottom - side) / 2), round((left + right - side) / 2), side, side)


def _background_level(small: NDArray[np.float64]) -> float:
    """The grey that parts head from air: a tenth of the way from the dark to the bright end of the image.

    A split by variance (Otsu) would part bright fat from dark brain on half of the contrasts.
    """
    dark, bright = np.percentile(small, [2, 98])
    return float(dark + 0.1 * (bright - dark))


def _largest(bright: NDArray[np.bool_]) -> NDArray[np.bool_]:
    opened = ndimage.binary_opening(bright, iterations=2)  # lets go of stamped text and thin rulers
    labels, count = ndimage.label(opened)
    if count == 0:
        return np.ones_like(bright)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return _filled(labels == sizes.argmax())


def _filled(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """With its holes: what `ndimage.binary_fill_holes` gives, in a quarter of its time."""
    outside, _ = ndimage.label(~mask)
    at_edge = np.concatenate([outside[0], outside[-1], outside[:, 0], outside[:, -1]])
    open_to_edge = np.bincount(at_edge, minlength=int(outside.max()) + 1) > 0
    open_to_edge[0] = False  # the mask itself
    return ~open_to_edge[outside]


def _cut(pixels: NDArray[np.uint8], box: Box) -> NDArray[np.float32]:
    """The box, beyond the frame the nearest edge pixel: black there would darken the frame's own edge in resizing."""
    height, width = pixels.shape
    inside = pixels[max(box.top, 0) : box.top + box.height, max(box.left, 0) : box.left + box.width]
    beyond = [
        (max(-start, 0), max(start + length - side, 0))
        for start, length, side in ((box.top, box.height, height), (box.left, box.width, width))
    ]
    return np.pad(inside, beyond, mode="edge").astype(np.float32)


def _cut_mask(mask: NDArray[np.bool_], box: Box, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The box of the mask, 0..1; 0 beyond the frame."""
    full = np.asarray(
        Image.fromarray(mask.astype(np.uint8) * 255).resize((shape[1], shape[0]), Image.Resampling.BILINEAR)
    )
    out = np.zeros((box.height, box.width), dtype=np.float32)
    top, left = max(box.top, 0), max(box.left, 0)
    bottom, right = min(box.top + box.height, shape[0]), min(box.left + box.width, shape[1])
    inside = out[top - box.top : bottom - box.top, left - box.left : right - box.left]
    np.divide(full[top:bottom, left:right], np.float32(255.0), out=inside)
    return out


def _resize(values: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    return np.asarray(Image.fromarray(values).resize((size, size), Image.Resampling.BILINEAR))


def _percentiles(values: NDArray[np.float32]) -> tuple[float, float]:
    if values.size == 0:
        return 0.0, 0.0
    low, high = np.percentile(values, [_LOW, _HIGH])
    return float(low), float(high)
