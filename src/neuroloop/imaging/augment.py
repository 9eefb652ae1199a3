"""Random affine copies of canonical images, as pure functions of a generator."""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class AugmentParams:
    """Ranges of the random affine map; each value is drawn evenly from -x to +x."""

    rotation_degrees: float = 15.0
    shift: float = 0.08  # of the side, each axis on its own
    shear_degrees: float = 10.0
    zoom: float = 0.15  # of the scale 1, each axis on its own
    flip: bool = True  # left-right, with even odds


def augment(
    pixels: NDArray[np.uint8], generator: np.random.Generator, params: AugmentParams | None = None
) -> NDArray[np.uint8]:
    """One random affine copy of a square image: uint8 (s, s) -> uint8 (s, s).

    Rotation, shear, zoom, flip and shift are one map about the centre and one bilinear resampling; what comes from
    outside the frame is the nearest edge pixel. Always draws the same number of values, so that copies of a sequence
    do not depend on its content.
    """
    return augment_batch(pixels[None], generator, params)[0]


def augment_batch(
    images: NDArray[np.uint8], generator: np.random.Generator, params: AugmentParams | None = None
) -> NDArray[np.uint8]:
    """One random copy of each image, in order: uint8 (n, s, s) -> uint8 (n, s, s)."""
    size = images.shape[1]
    out = np.empty_like(images)
    maps = _inverse_maps(len(images), size, generator, params or AugmentParams())
    for pixels, matrix, copy in zip(images, maps, out, strict=True):
        cv2.warpAffine(
            pixels,
            matrix,
            (size, size),
            dst=copy,
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
    return out


def _inverse_maps(count: int, size: int, generator: np.random.Generator, params: AugmentParams) -> NDArray[np.float64]:
    """(count, 2, 3): rows (a, b, c) such that source x = a x + b y + c, and likewise y, in pixel indices."""
    turn, shear, zoom_x, zoom_y, shift_x, shift_y, side = generator.uniform(-1, 1, (count, 7)).T
    angle, slant = np.radians(turn * params.rotation_degrees), np.radians(shear * params.shear_degrees)
    mirror = np.where(params.flip & (side < 0), -1.0, 1.0)
    scale_x, scale_y = mirror / (1 + params.zoom * zoom_x), 1 / (1 + params.zoom * zoom_y)
    cosine, sine, tangent = np.cos(angle), np.sin(angle), np.tan(slant)
    # Rotation, then shear, then zoom and flip.
    maps = np.empty((count, 2, 3))
    maps[:, 0, 0], maps[:, 0, 1] = cosine * scale_x, (cosine * tangent - sine) * scale_y
    maps[:, 1, 0], maps[:, 1, 1] = sine * scale_x, (sine * tangent + cosine) * scale_y
    centre = (size - 1) / 2
    moved = centre + size * params.shift * np.stack([shift_x, shift_y], axis=1)
    maps[:, :, 2] = centre - np.einsum("nij,nj->ni", maps[:, :, :2], moved)
    return maps
