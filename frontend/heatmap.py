"""The heat map over the scan."""

import io

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image


def grey(png: bytes) -> NDArray[np.uint8]:
    """A grey PNG of the API as uint8 (H, W)."""
    return np.asarray(Image.open(io.BytesIO(png), formats=["PNG"]).convert("L"))


def overlay(image: NDArray[np.uint8], heat: NDArray[np.uint8], opacity: float) -> NDArray[np.uint8]:
    """Lay `heat` over `image`, both uint8 (H, W) of one frame; returns uint8 (H, W, 3).

    The colour comes from the perceptually uniform map "inferno"; each pixel's opacity is heat x `opacity` (0 to 1), so
    cold regions show the scan untouched.
    """
    warmth = heat.astype(np.float32)[..., None] / 255
    colour = colormaps["inferno"](heat)[..., :3].astype(np.float32) * 255
    alpha = warmth * opacity
    blended = image.astype(np.float32)[..., None] * (1 - alpha) + colour * alpha
    return np.rint(blended).astype(np.uint8)
