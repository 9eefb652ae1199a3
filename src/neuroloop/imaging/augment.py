"""Random affine copies of canonical images, as pure functions of a generator."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image


@dataclass(frozen=True)
class AugmentParams:
    """Ranges of the random affine map; each value is drawn evenly from -x to +x."""

    rotation_degrees: float = 10.0
    shift: float = 0.10  # of the side, each axis on its own
    shear_degrees: float = 10.0
    zoom: float = 0.10  # of the scale 1, each axis on its own
    flip: bool = True  # left-right, with even odds


def augment(
    pixels: NDArray[np.uint8], generator: np.random.Generator, params: AugmentParams | None = None
) -> NDArray[np.uint8]:
    """One random affine copy of a square image: uint8 (s, s) -> uint8 (s, s).

    Rotation, shear, zoom, flip and shift are one map about the centre and one bilinear resampling; what comes from
    outside the frame is the nearest edge pixel. Always draws the same number of values, so that copies of a sequence
    do not depend on its content.
    """
    matrix = _inverse_map(pixels.shape[0], generator, params or AugmentParams())
    return _resample(pixels, matrix)


def augment_batch(
    images: NDArray[np.uint8], generator: np.random.Generator, params: AugmentParams | None = None
) -> NDArray[np.uint8]:
    """One random copy of each image, in order: uint8 (n, s, s) -> uint8 (n, s, s)."""
    out = np.empty_like(images)
    for position, pixels in enumerate(images):
        out[position] = augment(pixels, generator, params)
    return out


def _inverse_map(size: int, generator: np.random.Generator, params: AugmentParams) -> NDArray[np.float64]:
    """Rows (a, b, c) such that source x = a x + b y + c, and likewise y; pixel centres lie at +0.5."""
    turn, shear, zoom_x, zoom_y, shift_x, shift_y, side = generator.uniform(-1, 1, 7)
    angle, slant = math.radians(turn * params.rotation_degrees), math.radians(shear * params.shear_degrees)
    mirror = -1.0 if params.flip and side < 0 else 1.0
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    linear = rotation @ np.array([[1.0, math.tan(slant)], [0.0, 1.0]])
    linear = linear @ np.diag([mirror / (1 + params.zoom * zoom_x), 1 / (1 + params.zoom * zoom_y)])
    centre = np.full(2, size / 2)
    offset = centre - linear @ (centre + size * params.shift * np.array([shift_x, shift_y]))
    return np.column_stack([linear, offset])


def _resample(pixels: NDArray[np.uint8], matrix: NDArray[np.float64]) -> NDArray[np.uint8]:
    size = pixels.shape[0]
    corners = np.array([[0, 0, 1], [0, size, 1], [size, 0, 1], [size, size, 1]]) @ matrix.T
    reach = max(float(-corners.min()), float(corners.max()) - size, 0.0)
    margin = math.ceil(reach) + 2  # Pillow fills with black, so the edge is repeated as far as the map can reach
    padded = Image.fromarray(np.pad(pixels, margin, mode="edge"))
    (a, b, c), (d, e, f) = matrix.tolist()
    moved = padded.transform(
        (size, size), Image.Transform.AFFINE, (a, b, c + margin, d, e, f + margin), Image.Resampling.BILINEAR
    )
    return np.asarray(moved)
