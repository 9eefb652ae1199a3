"""The input gate: is this a brain MRI at all?

A classifier of four classes has an answer for a cat, too. The gate is a logistic model on what the network computes
anyway (mean and deviation of every channel) and on a few measures of the pixels. It learns from varied brains, with
contrasts that the data may lack (gamma, inversion, bias field, skull-stripping), against varied other images. Distances
to the training features alone do not do it: they refuse a third of the brains from other scanners. How well it works on
kinds of images it has never seen is measured by leaving out each kind in turn, and kept in the gate.
"""

import functools
import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pydantic import Field
from scipy import ndimage

from neuroloop.core.schemas import GateResult, Record
from neuroloop.imaging.canonical import canonicalize

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
    rejected_unseen: dict[str, float] = Field(
        description="kind -> share rejected by a gate fitted without any image of that kind"
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
    (n, s, s), the second one unseen by the network. The other images (uniform, noise, text, drawings, photographs,
    scrambled brains) are made here, or cropped from the sample photographs inside the scikit-image, scikit-learn and
    matplotlib packages, `per_kind` of each, by default as many as there are brains, 40 to 160. The strength of the
    penalty is the one that best rejects kinds left out of the fit. At most some 4,400 forward passes. Raises
    `ValueError` with fewer than 10 brains in a set.
    """
    # Here and not above: a server only judges, and scikit-learn takes seconds to load.
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

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
    plain, wide = (_terms(describe(images), centre, scale) for images in (validation, widen(validation, generator)))
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
    fresh = {kind: _terms(describe(make(kind, validation, per_kind // 4, generator)), centre, scale) for kind in KINDS}
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
        rejected_unseen=unseen,
        rejected={kind: float((rows @ weights < offset).mean()) for kind, rows in fresh.items()},
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


# --- varied brains ------------------------------------------------------------------------------


def widen(brains: Images, generator: np.random.Generator) -> Images:
    """Each canonical brain in another contrast, as another scanner or sequence might show it; uint8 (n, s, s)."""
    return np.stack([_widen_one(pixels, generator) for pixels in brains])


def _widen_one(pixels: Images, generator: np.random.Generator) -> Images:
    size = len(pixels)
    x = pixels.astype(np.float64) / 255
    mask = ndimage.binary_fill_holes(x > 0.02)
    if generator.random() < 0.35:  # skull-stripping, roughly: the rim goes
        depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
        mask &= depth > generator.uniform(0.04, 0.13) * size
        if mask.mean() < 0.05:
            mask = ndimage.binary_fill_holes(x > 0.02)
    curve = generator.integers(4)
    if curve == 0:
        x = x ** math.exp(generator.uniform(-0.7, 0.7))
    elif curve == 1:  # a T2 of a T1: what was dark is bright; air stays black
        x = np.where(x > 0.05, (1.05 - x) ** math.exp(generator.uniform(-0.3, 0.7)), x)
    elif curve == 2:  # any smooth curve of greys, as tissue contrasts differ between sequences
        knots = np.r_[0.0, generator.uniform(0, 1, 4)]
        x = np.interp(x, np.linspace(0, 1, 5), knots)
    if generator.random() < 0.5:  # bias field of a surface coil
        y, z = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
        a, b, c = generator.uniform(-0.35, 0.35, 3)
        x = x * np.exp(a * y + b * z + c * y * z)
    if generator.random() < 0.4:
        x = ndimage.gaussian_filter(x, generator.uniform(0.3, 1.3) * size / 128)
    x = x + generator.normal(0, generator.uniform(0, 0.06), x.shape)
    x = np.where(mask, np.maximum(x, 0.02), 0)
    turned = Image.fromarray(_grey(x * 220)).rotate(generator.uniform(-15, 15), Image.Resampling.BILINEAR)
    flipped = np.asarray(turned)[:, :: -1 if generator.random() < 0.5 else 1]
    return canonicalize(np.ascontiguousarray(flipped), size)


# --- images that are no brain -------------------------------------------------------------------


def make(kind: str, brains: Images, count: int, generator: np.random.Generator) -> Images:
    """`count` canonical images uint8 (count, s, s) of a `kind` out of `KINDS`; some are made of `brains` (n, s, s)."""
    size = brains.shape[1]
    maker = KINDS[kind]
    return np.stack([canonicalize(maker(brains, generator), size) for _ in range(count)])


def _uniform(_: Images, generator: np.random.Generator) -> Images:
    y, x = np.mgrid[-1:1:160j, -1:1:160j]
    a, b, c = generator.normal(0, 1, 3)
    shape = (a * x + b * y, c * np.hypot(x - a / 2, y - b / 2), 0 * x, np.where(a * x + b * y > c / 2, 1.0, 0.0))
    level = generator.uniform(0, 255) + generator.uniform(0, 120) * shape[generator.integers(4)]
    return _grey(level + generator.normal(0, generator.uniform(0, 4), x.shape))


def _noise(_: Images, generator: np.random.Generator) -> Images:
    side = int(generator.integers(96, 224))
    draw = (
        generator.normal(0, 1, (side, side)),
        generator.uniform(-1, 1, (side, side)),
        (generator.random((side, side)) < generator.uniform(0.02, 0.5)) * 1.0,
        generator.exponential(1, (side, side)),
    )[generator.integers(4)]
    if generator.random() < 0.6:
        draw = ndimage.gaussian_filter(draw, math.exp(generator.uniform(-1, 3)))
    return _windowed(draw, generator)


def _text(_: Images, generator: np.random.Generator) -> Images:
    width, height = (int(v) for v in generator.integers(150, 420, 2))
    paper, ink = (
        (255, int(generator.integers(0, 90))) if generator.random() < 0.7 else (int(generator.integers(40)), 255)
    )
    page = Image.new("L", (width, height), paper)
    draw = ImageDraw.Draw(page)
    height_of_text = int(generator.integers(9, 34))
    font = ImageFont.load_default(height_of_text)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxzETAOINSHR0123456789,.:-"))
    y = int(generator.integers(2, 20))
    while y < height:
        words = ("".join(generator.choice(letters, generator.integers(2, 11))) for _ in range(width // 20))
        if generator.random() < 0.85:
            draw.text((int(generator.integers(2, 30)), y), " ".join(words), fill=ink, font=font)
        y += int(height_of_text * generator.uniform(1.1, 1.6))
    return np.asarray(page)


def _drawing(_: Images, generator: np.random.Generator) -> Images:
    """Charts, diagrams, logos: flat shapes and lines."""
    size = 224
    dark = generator.random() < 0.5
    page = Image.new("L", (size, size), 0 if dark else 255)
    draw = ImageDraw.Draw(page)
    for _shape in range(int(generator.integers(1, 12))):
        x0, x1, y0, y1 = (int(v) for v in generator.integers(0, size, 4))
        box = (min(x0, x1), min(y0, y1), max(x0, x1) + 1, max(y0, y1) + 1)
        grey, line = int(generator.integers(256)), int(generator.integers(1, 6))
        match generator.integers(5):
            case 0:
                draw.rectangle(box, fill=grey)
            case 1:
                draw.ellipse(box, fill=grey)
            case 2:
                draw.ellipse(box, outline=grey, width=line)
            case 3:
                draw.line([tuple(p) for p in generator.integers(0, size, (8, 2)).tolist()], fill=grey, width=line)
            case _:
                curve = size / 2 + np.cumsum(generator.normal(0, 6, 60))
                draw.line(list(zip(np.linspace(10, size, 60), curve, strict=True)), fill=grey, width=line)
    return np.asarray(page)


def _body(_: Images, generator: np.random.Generator) -> Images:
    """A dark field with one large round thing full of smaller round things: a limb, a trunk, a dish, a noise disc."""
    size = 200
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]

    def ellipse(centre: NDArray[np.float64], radii: NDArray[np.float64]) -> NDArray[np.bool_]:
        return ((x - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2 < 1

    hull = generator.uniform(0.45, 0.95, 2)
    outline = ellipse(np.zeros(2), hull)
    image = outline * generator.uniform(40, 160)
    for _part in range(int(generator.integers(0, 14))):
        centre = generator.uniform(-0.7, 0.7, 2) * hull
        image = np.where(ellipse(centre, generator.uniform(0.05, 0.4, 2)) & outline, generator.uniform(0, 255), image)
    image = image + outline * ndimage.gaussian_filter(generator.normal(0, 1, x.shape), generator.uniform(0, 3)) * 40
    return _grey(ndimage.gaussian_filter(image, generator.uniform(0, 2)))


def _photo(_: Images, generator: np.random.Generator) -> Images:
    return _crop(_photos("scene"), generator)


def _texture(_: Images, generator: np.random.Generator) -> Images:
    """Surfaces, skies, tissue under a microscope."""
    return _crop(_photos("texture"), generator)


def _crop(photos: tuple[Images, ...], generator: np.random.Generator) -> Images:
    photo = photos[generator.integers(len(photos))]
    side = int(generator.uniform(0.3, 1.0) * min(photo.shape))
    y, x = (int(generator.integers(0, length - side + 1)) for length in photo.shape)
    crop = photo[y : y + side, x : x + side][:, :: -1 if generator.random() < 0.5 else 1]
    return np.ascontiguousarray(np.rot90(crop, int(generator.integers(4)) if generator.random() < 0.3 else 0))


def _framed(brains: Images, generator: np.random.Generator) -> Images:
    """A texture or noise inside the outline of a head: the right shape alone is not enough."""
    head = brains[generator.integers(len(brains))]
    mask = ndimage.binary_fill_holes(head > 5)
    filling = _texture(brains, generator) if generator.random() < 0.6 else _noise(brains, generator)
    resized = np.asarray(Image.fromarray(filling).resize(head.shape[::-1], Image.Resampling.BILINEAR))
    return np.where(mask, np.maximum(resized, 20), 0).astype(np.uint8)


def _shuffled(brains: Images, generator: np.random.Generator) -> Images:
    """A brain cut into tiles that are dealt out anew."""
    head = brains[generator.integers(len(brains))]
    tiles = int(generator.choice([3, 4, 6, 8, 16, len(head)]))
    step = len(head) // tiles
    cut = head[: tiles * step, : tiles * step].reshape(tiles, step, tiles, step).swapaxes(1, 2).reshape(-1, step, step)
    dealt = cut[generator.permutation(len(cut))].reshape(tiles, tiles, step, step).swapaxes(1, 2)
    return np.ascontiguousarray(dealt.reshape(tiles * step, tiles * step))


def _phases(brains: Images, generator: np.random.Generator) -> Images:
    """A brain's spectrum with random phases: its texture without its form."""
    head = brains[generator.integers(len(brains))].astype(np.float64)
    random = np.fft.rfft2(generator.normal(size=head.shape))
    phase = random / np.maximum(np.abs(random), 1e-9)
    return _windowed(np.fft.irfft2(np.abs(np.fft.rfft2(head)) * phase, head.shape), generator)


KINDS: dict[str, Callable[[Images, np.random.Generator], Images]] = {
    "uniform or gradient": _uniform,
    "noise": _noise,
    "text": _text,
    "drawing": _drawing,
    "round body": _body,
    "photograph": _photo,
    "texture or micrograph": _texture,
    "head outline, other content": _framed,
    "brain in shuffled tiles": _shuffled,
    "brain with random phases": _phases,
}
"""What is no brain MRI, by name; each maker gives one uint8 (H, W) image."""


def _grey(values: NDArray[np.floating]) -> Images:
    return np.clip(values, 0, 255).astype(np.uint8)


def _windowed(values: NDArray[np.floating], generator: np.random.Generator) -> Images:
    """Stretch to 0..255 between two percentiles, and half of the time keep only a disc."""
    low, high = np.percentile(values, (generator.uniform(0, 20), generator.uniform(90, 100)))
    image = _grey((values - low) / max(high - low, 1e-9) * 255)
    if generator.random() < 0.5:
        y, x = np.mgrid[-1 : 1 : len(image) * 1j, -1 : 1 : len(image) * 1j]
        image = np.where((x / generator.uniform(0.6, 1)) ** 2 + y**2 < 0.9, image, 0).astype(np.uint8)
    return image


_PHOTO_FILES: dict[str, dict[str, tuple[str, ...]]] = {
    "scene": {
        "skimage": ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg"),
        "sklearn": ("china.jpg", "flower.jpg"),
        "matplotlib": ("grace_hopper.jpg", "Minduka_Present_Blue_Pack.png"),
    },
    "texture": {
        "skimage": (
            "brick.png", "cell.png", "clock_motion.png", "coins.png", "color.png", "grass.png", "gravel.png",
            "hubble_deep_field.jpg", "ihc.png", "moon.png", "retina.jpg",
        ),
    },
}  # fmt: skip
_PHOTO_FOLDERS = {"skimage": "data", "sklearn": "datasets/images", "matplotlib": "mpl-data/sample_data"}


@functools.cache
def _photos(theme: str) -> tuple[Images, ...]:
    """Grey photographs that lie inside the installed packages, at most 512 px; what a release dropped is left out."""
    found = []
    for package, names in _PHOTO_FILES[theme].items():
        root = Path(cast(str, importlib.import_module(package).__file__)).parent / _PHOTO_FOLDERS[package]
        for path in (root / name for name in names):
            if path.is_file():
                with Image.open(path) as photo:
                    grey = photo.convert("L")
                grey.thumbnail((512, 512))
                found.append(np.asarray(grey))
    return tuple(found)
