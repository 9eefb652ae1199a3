"""The input gate: is this a brain MRI at all, and if so, is it like what the model has learned from?

Two questions, two answers. A classifier of four classes has an answer for a cat, too: a small network of its own says
whether an image is a brain MRI (`gate_training` fits it), and what it does not take for one is rejected. Another
scanner, sequence or state after surgery is still a brain MRI, but the classifier may be wrong on it without knowing:
how far the classifier's own features lie from those of its training images is the `novelty`, and an image beyond the
limit is answered with a warning and left to a reader.

The distance alone would not do for the first question: it refuses a third of the brains of other scanners.
"""

import functools
import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from scipy import ndimage

from neuroloop.core.errors import InvalidBundle
from neuroloop.core.schemas import GateResult, Record
from neuroloop.imaging.canonical import quantiles
from neuroloop.model.onnx_session import open_session

Images = NDArray[np.uint8]
Floats = NDArray[np.float32]

SIDE = 64
"""Pixels of the side at which a gate looks at an image, whatever the classifier takes."""

_BATCH = 256
_CLIP = 6.0  # standard deviations; beyond, a feature says "different" and no more

_MEASURES: tuple[tuple[str, str], ...] = (
    ("area", "share of the frame that the bright component fills"),
    ("extent", "share of its bounding box that the bright component fills"),
    ("aspect", "height of the bright component relative to its width"),
    ("corners", "brightness of the frame's corners"),
    ("mirror", "likeness of the left and the right half"),
    ("mean", "mean brightness"),
    ("deviation", "contrast"),
    ("dark", "share of black inside the outline"),
    ("bright", "share of white inside the outline"),
    ("edges", "strength of edges"),
    ("flatness", "share of places without any texture"),
    ("texture", "local texture"),
)
"""What a rejection may name as its reason: measures of the pixels that say something to a person."""


class Gate(Record):
    """What a fitted gate knows beside its network, as plain numbers that JSON can hold."""

    offset: float = Field(description="Logit of the network at the threshold")
    width: float = Field(gt=0, description="Logits between the threshold and a score of 0.73")
    threshold: float = Field(ge=0, le=1)
    threshold_origin: str = Field(description="Where the threshold comes from, in words")
    usual: tuple[tuple[float, float], ...] = Field(description="1st and 99th percentile of each measure over brains")
    centre: tuple[float, ...] = Field(description="Mean over the training images of each feature of the classifier")
    scale: tuple[float, ...] = Field(description="Deviation of the same")
    far: float = Field(gt=0, description="Distance from the training images at which the novelty is 1")
    doubt: tuple[float, ...] = Field(description="Weights of the features in the logit that the classifier is wrong")
    doubt_bias: float = Field(description="The logit of an image like the mean of the training images")
    doubtful: float = Field(gt=0, le=1, description="Probability of being wrong at which the novelty is 1")
    far_origin: str = Field(description="Where both limits come from, in words")
    accepted_brains: float = Field(description="Share of validation brains accepted")
    accepted_widened: float = Field(description="Share of validation brains in changed contrasts accepted")
    accepted_rendered: float = Field(description="Share of simulated heads of any contrast and plane accepted")
    novel_widened: float = Field(description="Share of validation brains in changed contrasts beyond a novelty of 1")
    novel_rendered: float = Field(description="Share of simulated heads of any contrast and plane beyond it")
    missed_widened: float = Field(
        description="Of validation tumours in changed contrasts, those called no tumour within a novelty of 1"
    )
    rejected: dict[str, float] = Field(description="kind, see `outliers` -> share of fresh images of it rejected")
    measured: int = Field(default=0, description="How many fresh images of each kind; 0 where it was not kept")

    @functools.cached_property
    def _arrays(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        return np.array(self.centre), np.array(self.scale), np.array(self.doubt)

    def novelty(self, features: Floats) -> NDArray[np.float64]:
        """How far n images are beyond what was learned: `features` (n, f) of the classifier -> (n,), from 0.

        1 is the limit. Raises `ValueError` where f is not what the gate was fitted on.
        """
        centre, scale, doubt = self._arrays
        if features.shape[1] != len(centre):
            raise ValueError(f"expected {len(centre)} features, not {features.shape[1]}")
        away = deviations(features, centre, scale)
        return np.maximum(distance(away) / self.far, wrongness(away, doubt, self.doubt_bias) / self.doubtful)


class FittedGate(NamedTuple):
    """The two halves of a gate, as a bundle keeps them."""

    facts: Gate
    onnx: bytes
    """Its network: image (n, 64, 64, 1), values 0..255 -> logit (n, 1)"""


class InputGate:
    """A gate with its network, ready to judge. May be used from several threads at once."""

    def __init__(self, facts: Gate, onnx: bytes, *, threads: int = 1) -> None:
        """Load the network; `threads` is the number of cores one call may use. Raises `InvalidBundle`."""
        self._session = open_session(onnx, "the gate's network", threads=threads)
        inputs = [(value.name, value.shape[1:]) for value in self._session.get_inputs()]
        outputs = [value.name for value in self._session.get_outputs()]
        if inputs != [("image", [SIDE, SIDE, 1])] or outputs != ["logit"]:
            raise InvalidBundle(
                "the gate's network has other inputs or outputs than expected",
                why=f"it takes {inputs} and gives {outputs}; expected image ({SIDE}, {SIDE}, 1) -> logit",
            )
        self.facts = facts

    def logits(self, images: Images) -> NDArray[np.float64]:
        """What the network says of n canonical images, uint8 (n, s, s): (n,), higher is more of a brain MRI."""
        parts = []
        for start in range(0, len(images), _BATCH):
            batch = shrink(images[start : start + _BATCH])[..., None].astype(np.float32)
            parts.append(self._session.run(["logit"], {"image": batch})[0].reshape(-1))
        return np.concatenate(parts).astype(np.float64)

    def scores(self, images: Images) -> NDArray[np.float64]:
        """Scores in 0..1 of n canonical images, uint8 (n, s, s)."""
        raw = (self.logits(images) - self.facts.offset) / self.facts.width
        return 1 / (1 + np.exp(-np.clip(raw, -50, 50)))

    def accepts(self, images: Images) -> NDArray[np.bool_]:
        """Which of n canonical images, uint8 (n, s, s), reach the threshold: (n,)."""
        return self.scores(images) >= self.facts.threshold

    def judge(self, pixels: Images, novelty: float) -> GateResult:
        """Judge one canonical image, uint8 (s, s), whose features have that `novelty`."""
        facts = self.facts
        inside = pixels[pixels > 0]
        dark, bright = quantiles(inside, (0.1, 0.9)) if inside.size else (0.0, 0.0)
        if bright - dark < 2:
            reason = "The image has no contrast: nearly every pixel has the same grey."
            return GateResult(accepted=False, score=0.0, threshold=facts.threshold, reason=reason, novelty=novelty)
        score = float(self.scores(pixels[None])[0])
        accepted = score >= facts.threshold
        reason = "" if accepted else self._reason(pixels)
        return GateResult(accepted=accepted, score=score, threshold=facts.threshold, reason=reason, novelty=novelty)

    def _reason(self, pixels: Images) -> str:
        values = measure(pixels[None])[0]
        low, high = np.array(self.facts.usual).T
        excess = np.maximum(low - values, values - high) / np.maximum(high - low, 1e-6)
        worst = int(excess.argmax())
        text = "The image does not look like a brain MRI"
        if excess[worst] <= 0:
            return f"{text}: its structure is unlike that of any brain the gate has learned."
        side = "higher" if values[worst] > high[worst] else "lower"
        return f"{text}: what stands out most is its {_MEASURES[worst][1]}, {side} than in 99 % of brain scans."


def deviations(features: NDArray[Any], centre: NDArray[np.float64], scale: NDArray[np.float64]) -> NDArray[np.float64]:
    """The features (n, f) as standard deviations from those of the training images, -6 to 6: (n, f)."""
    return np.clip((features - centre) / scale, -_CLIP, _CLIP)


def distance(away: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean absolute `deviations` (n, f) -> (n,).

    Means and deviations of every channel of every block, so all depths of the classifier have a say, as in the
    multi-layer Mahalanobis distance (Lee et al., NeurIPS 2018) with a diagonal covariance.
    """
    return np.abs(away).mean(axis=1)


def wrongness(away: NDArray[np.float64], doubt: NDArray[np.float64], bias: float) -> NDArray[np.float64]:
    """Probability that the classifier is wrong, by `deviations` (n, f) and the weights (f,) of the doubt: (n,)."""
    found: NDArray[np.float64] = 1 / (1 + np.exp(-(away @ doubt + bias)))
    return found


def shrink(images: Images) -> Images:
    """Canonical images uint8 (n, s, s) at the side at which a gate looks: uint8 (n, 64, 64)."""
    side = images.shape[1]
    if side == SIDE:
        return images
    if side == 2 * SIDE:  # as PIL's box filter, a hundred times as fast for many
        halves = images.reshape(len(images), SIDE, 2, SIDE, 2).astype(np.uint16)
        return ((halves.sum(axis=(2, 4)) + 2) >> 2).astype(np.uint8)
    resized = (Image.fromarray(one).resize((SIDE, SIDE), Image.Resampling.BOX) for one in images)
    return np.stack([np.asarray(one) for one in resized])


def measure(images: Images) -> Floats:
    """Measures of canonical images, float32 (n, m), one for each name above; `images` uint8 (n, s, s)."""
    return np.stack([_measure_one(pixels) for pixels in shrink(images)]).astype(np.float32)


def _measure_one(pixels: Images) -> NDArray[np.float64]:
    image = pixels.astype(np.float64) / 255
    mask = ndimage.binary_fill_holes(image > 0.02)
    if not mask.any():
        mask = np.ones_like(image, bool)
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    inside = image[mask]
    corner = SIDE // 10
    corners = np.concatenate([image[a, b].ravel() for a in (slice(corner), slice(-corner, None))
                              for b in (slice(corner), slice(-corner, None))])  # fmt: skip
    dy, dx = np.gradient(image)
    edge = np.hypot(dy, dx)[mask]
    local = np.sqrt(np.maximum(ndimage.uniform_filter(image**2, 5) - ndimage.uniform_filter(image, 5) ** 2, 0))[mask]
    return np.array([
        mask.mean(), mask.sum() / (height * width), height / width, corners.mean(), _likeness(image, image[:, ::-1]),
        inside.mean(), inside.std(), (inside < 0.04).mean(), (inside > 0.96).mean(),
        edge.mean(), (local < 0.01).mean(), local.mean(),
    ])  # fmt: skip


def _likeness(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (math.sqrt((a * a).sum() * (b * b).sum()) + 1e-6))


def declared(gate: GateResult, objection: str) -> GateResult:
    """The gate's judgement, or a rejection, of score 0, where something else than greys objects: header or colours."""
    return gate.model_copy(update={"accepted": False, "score": 0.0, "reason": objection}) if objection else gate
