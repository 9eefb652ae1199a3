"""How much of a picture is in colour: evidence for the gate, for MR images are grey."""

import numpy as np
from PIL import Image

MOST = 0.2
"""Share of the lit pixels that may be coloured: of 7,019 public brain MRI the most was 0.07 (by coloured text), of
photographs that come with scikit-image and scikit-learn the least 0.26."""

_GREY = ("1", "L", "LA", "La", "I", "F", "LAB")  # and I;16 with its kin; of LAB only the lightness is read
_SIDE = 64  # of the grid of pixels that are looked at
_LIT = 50  # of 255: darker pixels have no colour to speak of
_LEAST = 0.1  # of all pixels, that the lit ones count for at least: notes alone are lit on a very dark scan
_SATURATION = 0.3  # from here on a pixel is coloured; the blue of a film on a light box stays below


def share(image: Image.Image) -> float:
    """Share (0..1) of the lit pixels that are clearly coloured, from 64 x 64 of them; 0 of a grey image."""
    if image.mode in _GREY or image.mode.startswith("I;"):
        return 0.0
    seen = np.asarray(image.resize((_SIDE, _SIDE), Image.Resampling.NEAREST).convert("RGBA"))
    red, green, blue, alpha = (seen[..., channel] for channel in range(4))
    # Not max(axis=2), which takes thirty times as long.
    high, low = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    lit = (high >= _LIT) & (alpha >= 128)
    coloured = lit & (high - low >= _SATURATION * high)
    return float(coloured.sum() / max(int(lit.sum()), _LEAST * lit.size))


def objection(share: float) -> str:
    """Why a picture with this share of colour is no MRI, in words; empty where nothing speaks against it."""
    if share <= MOST:
        return ""
    return (
        f"The picture is in colour ({100 * share:.0f} % of what is lit), and MR images are grey. A brain MRI that is "
        "shown in false colours can be uploaded in grey."
    )
