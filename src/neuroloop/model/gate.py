"""The input gate: is this a brain MRI at all?

A classifier of four classes has an answer for a cat, too. The gate is a logistic model on what the network computes
anyway (mean and deviation of every channel) and on a few measures of the pixels. It learns from varied brains, with
contrasts that the data may lack (gamma, inversion, bias field, skull-stripping), against varied other images (see
`outliers`). Distances to the training features alone do not do it: they refuse a third of the brains from other
scanners. How well it works on kinds of images it has never seen is measured by leaving out each kind in turn, and on
simulated body parts and heads in any contrast, from which no gate learns; all of it is kept in the gate.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from scipy import ndimage

from neuroloop.core.schemas import GateResult, Record

Images = NDArray[np.uint8]
Floats = NDArray[np.float32]

_WORK = 64  # side at which pixels are measured, so that the measures do not depend on the image size
_RINGS = 6
_BANDS = 6
_BINS = 6
_PER_KIND, _FEWEST_PER_KIND = 160, 40  # made images a kind
_MAX_BRAINS, _MAX_VALIDATION = 800, 400  # images a fit looks at, so that it ends well under a minute
_COMPONENTS = 64  # directions in which the network's features vary most
_CHUNKS = 8  # parts of the feature vector, about one a block, whose mean distance from the brains counts as a measure
_STRENGTHS = (1e-2, 1e-1)  # candidate inverse penalties
_KEEP, _KEEP_WIDENED = 0.99, 0.95  # shares of validation brains, plain and widened, that the threshold must accept
_CLIP = 6.0  # standard deviations; beyond, a measure says "different" and no more

_MEASURES: tuple[tuple[str, str], ...] = (
    ("area", "share of the frame that the bright component fills"),
    ("extent", "share of its bounding box that the bright component fills"),
    ("aspect", "height of the bright component relative to its width"),
    ("corners", "brightness of the frame's corners"),
    ("mirror", "likeness of the left and the right half"),
    ("flip", "likeness of the upper and the lower half"),
    ("mean", "mean brightness"),
    ("deviation", "contrast"),
    ("dark", "share of black inside the outline"),
    ("bright", "share of white inside the outline"),
    ("edges", "strength of edges"),
    ("edge_spread", "unevenness of edges"),
    ("direction", "preference of edges for horizontal or vertical"),
    ("flatness", "share of places without any texture"),
    ("texture", "local texture"),
    ("texture_spread", "unevenness of the local texture"),
    *((f"ring{i}", "brightness from the centre to the rim") for i in range(_RINGS)),
    *((f"ring_spread{i}", "variation along rings around the centre") for i in range(_RINGS)),
    *((f"band{i}", "balance of coarse and fine detail") for i in range(_BANDS)),
    *((f"grey{i}", "distribution of greys") for i in range(_BINS)),
)


class Gate(Record):
    """A fitted gate, as plain numbers that JSON can hold. `fit_gate` makes it, `judge` uses it."""

    centre: tuple[float, ...] = Field(description="Mean over brains of each network feature, then of each measure")
    scale: tuple[float, ...] = Field(description="Deviation over brains of the same")
    weights: tuple[float, ...] = Field(description="Of the terms, see `_terms`")
    offset: float = Field(description="Raw score at the threshold")
    width: float = Field(gt=0, description="Raw score between the threshold and a score of 0.73")
    usual: tuple[tuple[float, float], ...] = Field(description="1st and 99th percentile of each measure over brains")
    threshold: float = Field(ge=0, le=1)
    threshold_origin: str = Field(description="Where the threshold comes from, in words")
    accepted_brains: float = Field(description="Share of validation brains accepted")
    accepted_widened: float = Field(description="Share of validation brains in unfamiliar contrasts accepted")
    accepted_rendered: float = Field(description="Share of simulated heads of any contrast and plane accepted")
    rejected_unseen: dict[str, float] = Field(
        description="kind -> share rejected by a gate fitted without any image of that kind; some kinds no gate learns"
    )
    rejected: dict[str, float] = Field(description="kind -> share of fresh images of that kind rejected by this gate")

    @functools.cached_property
    def _arrays(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        return np.array(self.centre), np.array(self.scale), np.array(self.weights)

    def scores(self, features: Floats, images: Images) -> NDArray[np.float64]:
        """Scores in 0..1 of n images: `features` (n, f) of the network, `images` uint8 (n, s, s), canonical.

        Raises `ValueError` where f is not what the gate was fitted on.
        """
        centre, scale, weights = self._arrays
        if features.shape[1] != len(centre) - len(_MEASURES):
            raise ValueError(f"expected {len(centre) - len(_MEASURES)} features, not {features.shape[1]}")
        raw = _terms(np.hstack([features, measure(images)]), centre, scale) @ weights
        return 1 / (1 + np.exp(-np.clip((raw - self.offset) / self.width, -50, 50)))

    def judge(self, features: Floats, pixels: Images) -> GateResult:
        """Judge one image: `features` (f,) of the network, `pixels` uint8 (s, s), canonical."""
        inside = pixels[pixels > 0]
        if inside.size == 0 or np.subtract(*np.percentile(inside, (90, 10))) < 2:
            reason = "The image has no contrast: nearly every pixel has the same grey."
            return GateResult(accepted=False, score=0.0, threshold=self.threshold, reason=reason)
        score = float(self.scores(features[None], pixels[None])[0])
        accepted = score >= self.threshold
        reason = "" if accepted else self._reason(pixels)
        return GateResult(accepted=accepted, score=score, threshold=self.threshold, reason=reason)

    def _reason(self, pixels: Images) -> str:
        values = measure(pixels[None])[0]
        low, high = np.array(self.usual).T
        excess = np.maximum(low - values, values - high) / np.maximum(high - low, 1e-6)
        worst = int(excess.argmax())
        text = "The image does not look like a brain MRI"
        if excess[worst] <= 0:
            return f"{text}: its structure is unlike that of any brain the gate has learned."
        side = "higher" if values[worst] > high[worst] else "lower"
        return f"{text}: what stands out most is its {_MEASURES[worst][1]}, {side} than in 99 % of brain scans."


def fit_gate(
    predict_features: Callable[[Images], Floats],
    brains_train: Images,
    brains_validation: Images,
    generator: np.random.Generator,
    *,
    per_kind: int | None = None,
) -> Gate:
    """Fit the gate of one network.

    `predict_features` maps uint8 (n, s, s) to the network's features (n, f); both sets of brains are canonical uint8
    (n, s, s), the second one unseen by the network. Of the other images, `outliers` makes `per_kind` of each kind, by
    default as many as there are brains, 40 to 160. The strength of the penalty is the one that best rejects kinds left
    out of the fit. At most some 5,000 forward passes. Raises `ValueError` with fewer than 10 brains in a set.
    """
    # Here and not above: a server only judges, and scikit-learn takes seconds to load.
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    from neuroloop.model.outliers import HELD_OUT_KINDS, KINDS, make, render, widen

    if min(len(brains_train), len(brains_validation)) < 10:
        raise ValueError("a gate needs at least 10 brains to learn from and 10 to set its threshold")
    per_kind = per_kind or max(min(len(brains_train), _PER_KIND), _FEWEST_PER_KIND)

    def describe(images: Images) -> Floats:
        return np.hstack([predict_features(images), measure(images)]).astype(np.float32)

    train = brains_train[generator.permutation(len(brains_train))[:_MAX_BRAINS]]
    validation = brains_validation[generator.permutation(len(brains_validation))[:_MAX_VALIDATION]]
    brains = describe(np.vstack([train, widen(train, generator)]))
    centre, scale = brains.mean(axis=0).astype(np.float64), brains.std(axis=0) + 1e-3
    terms = {kind: _terms(describe(make(kind, train, per_kind, generator)), centre, scale) for kind in KINDS}
    learned = _terms(brains, centre, scale)
    held_out = (validation, widen(validation, generator), render(per_kind, train.shape[1], generator))
    plain, wide, rendered = (_terms(describe(images), centre, scale) for images in held_out)
    reduce = _reduction(np.vstack([learned, *terms.values()]), brains.shape[1] - len(_MEASURES))

    def fit(kinds: list[str], strength: float) -> NDArray[np.float64]:
        rows = np.vstack([learned, *(terms[kind] for kind in kinds)]) @ reduce
        answer = np.arange(len(rows)) < len(learned)
        model = LogisticRegression(C=strength, class_weight="balanced", max_iter=300, tol=1e-3)
        with threadpool_limits(1):  # more threads take 100 times as long here where other processes use the cores
            return np.asarray(reduce @ model.fit(rows, answer).coef_[0])

    def bar(weights: NDArray[np.float64]) -> float:
        return float(min(np.quantile(plain @ weights, 1 - _KEEP), np.quantile(wide @ weights, 1 - _KEEP_WIDENED)))

    trials = []
    for strength in _STRENGTHS:
        unseen = {}
        for kind in KINDS:
            weights = fit([other for other in KINDS if other != kind], strength)
            unseen[kind] = float((terms[kind] @ weights < bar(weights)).mean())
        trials.append((float(np.mean(list(unseen.values()))), strength, unseen))
    _, strength, unseen = max(trials, key=lambda trial: trial[:2])
    weights = fit(list(KINDS), strength)
    offset = bar(weights)
    fresh = {
        kind: _terms(describe(make(kind, validation, per_kind // 4, generator)), centre, scale)
        for kind in (*KINDS, *HELD_OUT_KINDS)
    }
    rejected = {kind: float((rows @ weights < offset).mean()) for kind, rows in fresh.items()}
    return Gate(
        centre=tuple(centre.tolist()),
        scale=tuple(scale.tolist()),
        weights=tuple(weights.tolist()),
        offset=offset,
        width=max(float(np.median(plain @ weights)) - offset, 1e-6) / math.log(19),  # the median brain scores 0.95
        usual=tuple(map(tuple, np.quantile(brains[:, -len(_MEASURES) :], (0.01, 0.99), axis=0).T.tolist())),
        threshold=0.5,
        threshold_origin=(
            f"A score of 0.5 is where at least {_KEEP:.0%} of {len(validation)} validation brains and "
            f"{_KEEP_WIDENED:.0%} of the same brains in unfamiliar contrasts are accepted."
        ),
        accepted_brains=float((plain @ weights >= offset).mean()),
        accepted_widened=float((wide @ weights >= offset).mean()),
        accepted_rendered=float((rendered @ weights >= offset).mean()),
        rejected_unseen=unseen | {kind: rejected[kind] for kind in HELD_OUT_KINDS},
        rejected={kind: rejected[kind] for kind in KINDS},
    )


def _terms(rows: NDArray[Any], centre: NDArray[np.float64], scale: NDArray[Any]) -> NDArray[np.float64]:
    """What the logistic model weighs: features and measures in deviations from the mean brain, then distances.

    The distances (absolute deviations of the measures, and averaged over chunks of the features) are what rejects
    kinds of images that the gate has not met: too much is as wrong as too little.
    """
    deviations = np.clip((rows - centre) / scale, -_CLIP, _CLIP)
    size = np.abs(deviations)
    chunks = np.array_split(size[:, : -len(_MEASURES)], _CHUNKS, axis=1)
    distances = [3 * chunk.mean(axis=1) for chunk in chunks]  # 3: about as wide a range as a single term has
    return np.hstack([deviations, size[:, -len(_MEASURES) :], np.stack(distances, axis=1)])


def _reduction(terms: NDArray[np.float64], features: int) -> NDArray[np.float64]:
    """A matrix (terms, k) that replaces the `features` first terms by their principal components of unit variance.

    Thousands of correlated features fitted one by one would learn the made images by heart.
    """
    head = terms[:, :features] - terms[:, :features].mean(axis=0)
    values, vectors = np.linalg.eigh(head.T @ head / len(head))
    values, vectors = values[-_COMPONENTS:], vectors[:, -_COMPONENTS:]
    components = vectors / np.sqrt(np.maximum(values, 1e-6))
    rest = terms.shape[1] - features
    return np.block([[components, np.zeros((features, rest))], [np.zeros((rest, components.shape[1])), np.eye(rest)]])


# --- measures of the pixels ---------------------------------------------------------------------


def measure(images: Images) -> Floats:
    """Measures of canonical images, float32 (n, m), that do not depend on the network; `images` uint8 (n, s, s)."""
    return np.stack([_measure_one(pixels) for pixels in images]).astype(np.float32)


@functools.cache
def _grid() -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Distance from the centre in 0..1.4 and the frequency band of each place."""
    y, x = np.mgrid[:_WORK, :_WORK]
    radius = np.hypot(y - (_WORK - 1) / 2, x - (_WORK - 1) / 2) / (_WORK / 2)
    frequency = np.hypot(np.fft.fftfreq(_WORK)[:, None], np.fft.rfftfreq(_WORK)[None]) * _WORK
    return radius, np.minimum(np.log2(np.maximum(frequency, 1)).astype(np.intp), _BANDS - 1)


def _measure_one(pixels: Images) -> NDArray[np.float64]:
    image = np.asarray(Image.fromarray(pixels).resize((_WORK, _WORK), Image.Resampling.BOX), np.float64) / 255
    radius, band = _grid()
    mask = ndimage.binary_fill_holes(image > 0.02)
    if not mask.any():
        mask = np.ones_like(image, bool)
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    inside = image[mask]
    corner = _WORK // 10
    corners = np.concatenate([image[a, b].ravel() for a in (slice(corner), slice(-corner, None))
                              for b in (slice(corner), slice(-corner, None))])  # fmt: skip
    dy, dx = np.gradient(image)
    edge = np.hypot(dy, dx)[mask]
    local = np.sqrt(np.maximum(ndimage.uniform_filter(image**2, 5) - ndimage.uniform_filter(image, 5) ** 2, 0))[mask]
    ring = np.minimum((radius * _RINGS).astype(int), _RINGS - 1).ravel()
    count = np.bincount(ring, minlength=_RINGS)
    level = np.bincount(ring, image.ravel(), _RINGS) / count
    spread = np.sqrt(np.maximum(np.bincount(ring, image.ravel() ** 2, _RINGS) / count - level**2, 0))
    power = np.abs(np.fft.rfft2(image - image.mean())) ** 2
    bands = np.log(np.bincount(band.ravel(), power.ravel(), _BANDS) + 1e-3)
    head = [
        mask.mean(), mask.sum() / (height * width), height / width, corners.mean(),
        _likeness(image, image[:, ::-1]), _likeness(image, image[::-1]),
        inside.mean(), inside.std(), (inside < 0.04).mean(), (inside > 0.96).mean(),
        edge.mean(), edge.std() / (edge.mean() + 1e-3), (np.abs(dx).sum() - np.abs(dy).sum()) / (edge.sum() + 1e-3),
        (local < 0.01).mean(), local.mean(), local.std(),
    ]  # fmt: skip
    greys = np.histogram(inside, bins=_BINS, range=(0, 1))[0] / inside.size
    return np.concatenate([head, level, spread, bands - bands.mean(), greys])


def _likeness(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (math.sqrt((a * a).sum() * (b * b).sum()) + 1e-6))
