"""Probabilities that mean what they say: temperature, conformal prediction sets and the limit for abstaining.

All three are fitted on a part of their own. Fitting counts every group of twins once, whatever its size: copies of one
image are one observation, and new patients do not come in copies. Applying needs numpy alone.
"""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from neuroloop.core.schemas import LABELS, Record

Floats = NDArray[np.floating]
Integers = NDArray[np.integer]

LEVELS = ("0.90", "0.95")
"""The coverages for which prediction sets are made."""
ANSWERED_ACCURACY = 0.99
"""Of the images that are answered, not referred to a reader, this share should be right: the project's target."""
ANSWERED_LEAST, ANSWERED_MOST = 0.85, 0.90
"""Bounds of the share that is answered. A model that answers less is of little use; and however well it does on the
calibration part, its least certain tenth goes to a reader, because images from elsewhere are harder."""

_LOG_RANGE = (-3.0, 3.0)  # temperatures of 0.05 to 20; beyond, the held-out set is too small or wrong
_TINY = 1e-9  # sums of weights such as 1/3 are equal up to this


class Calibration(Record):
    """What turns logits into an answer; part of a bundle."""

    temperature: Annotated[float, Field(gt=0, description="What logits are divided by, see `fit_temperature`")]
    conformal: dict[str, dict[str, Annotated[float, Field(ge=0, le=1)]]] = Field(
        description="level -> class -> q: the class is in the set iff its probability is at least 1 - q; "
        "class-conditional split conformal, see `fit_conformal`"
    )
    refer_below: Annotated[float, Field(ge=0, le=1)] = Field(
        description="An image whose largest probability is below this goes to a reader, see `fit_refer_below`"
    )
    groups: dict[str, int] = Field(default={}, description="class -> groups of twins that all this was fitted on")

    @field_validator("conformal")
    @classmethod
    def _complete(cls, conformal: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        wrong = [level for level, of in conformal.items() if level not in LEVELS or of.keys() != set(LABELS)]
        if wrong:
            raise ValueError(f"a level is one of {', '.join(LEVELS)} with every class, which {wrong[0]!r} is not")
        return conformal

    def probabilities(self, logits: Floats) -> NDArray[np.float32]:
        """Calibrated probabilities float32 (n, classes) of `logits` (n, classes); each row sums to 1."""
        return softmax(logits, self.temperature).astype(np.float32)

    def prediction_sets(self, probabilities: Floats, level: str) -> NDArray[np.bool_]:
        """Which classes an answer at `level` ("0.90", "0.95") leaves open: bool, shape of `probabilities` (n, classes).

        Of the images of each class, the share `level` has its class in the set. A set may be empty: the image is less
        typical of every class than that share of the calibration images, so a reader should look. Raises `KeyError`
        on an unknown level.
        """
        least = 1 - np.array([self.conformal[level][label] for label in LABELS])
        return np.asarray(np.asarray(probabilities, np.float64) >= least)

    def refer(self, probabilities: Floats) -> NDArray[np.bool_]:
        """Which of the images with `probabilities` (n, classes) are too uncertain to answer: bool (n,)."""
        return np.asarray(probabilities, np.float64).max(axis=1) < self.refer_below


def fit(logits: Floats, labels: Integers, groups: Integers | None = None) -> Calibration:
    """Everything of `Calibration` from one held-out part that neither trained the model nor chose it.

    `logits` (n, classes), `labels` (n,) in 0..classes-1, `groups` (n,): twins have the same number; without it every
    image is its own group. A class with too few groups for a level (9 for 90 %, 19 for 95 %) is in every set of that
    level, which is the only honest answer. Raises `ValueError` on no image.
    """
    groups = np.arange(len(labels)) if groups is None else np.asarray(groups)
    weights = group_weights(groups)
    temperature = fit_temperature(logits, labels, weights)
    # As they will be served, so that ties between images that are certain to the last bit are ties here too.
    probabilities = softmax(logits, temperature).astype(np.float32)
    return Calibration(
        temperature=temperature,
        conformal={level: fit_conformal(probabilities, labels, groups, float(level)) for level in LEVELS},
        refer_below=fit_refer_below(probabilities, labels, weights),
        groups={label: len(np.unique(groups[labels == index])) for index, label in enumerate(LABELS)},
    )


def group_weights(groups: Integers) -> NDArray[np.float64]:
    """One weight an image, float64 (n,): 1 over the size of its group, so that they sum to the number of groups."""
    _, inverse, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    return np.asarray(1.0 / sizes[inverse])


def fit_temperature(logits: Floats, labels: Integers, weights: Floats | None = None) -> float:
    """The temperature that minimises the negative log-likelihood of held-out images.

    `logits` (n, classes), `labels` (n,), `weights` (n,), by default equal; the result lies in 0.05..20. It never
    changes which class is largest. Method: Guo et al., On Calibration of Modern Neural Networks, ICML 2017. Raises
    `ValueError` on no image.
    """
    from scipy.optimize import minimize_scalar  # slow to load, and a server does not fit

    if len(labels) == 0:
        raise ValueError("a temperature needs at least one held-out image")
    result = minimize_scalar(
        lambda log_t: negative_log_likelihood(softmax(logits, float(np.exp(log_t))), labels, weights),
        bounds=_LOG_RANGE,
        method="bounded",
        options={"xatol": 1e-4},
    )
    return float(np.exp(result.x))


def fit_conformal(
    probabilities: Floats, labels: Integers, groups: Integers, level: float, classes: Sequence[str] = LABELS
) -> dict[str, float]:
    """For each class the q with which the share `level` of its images gets a set that holds it.

    `probabilities` (n, classes), `labels` and `groups` (n,), `level` in 0..1. The score is 1 - p(class): the sets of
    least average size (Sadinle et al., JASA 2019), and the only common score whose sets may be empty, without which
    the coverage of a model that is right more often than `level` could not come down to it. One quantile a class
    (Vovk 2012) of scores in which each group has weight 1 and an unseen group stands at infinity (hierarchical
    conformal prediction: Lee et al., 2023). Where the quantile falls between two scores they are interpolated in
    log-odds: the usual rounding up to the next score would cover 97 % instead of 95 % with the 30 groups that the
    smallest class has in the public data set. A class with too few groups for the level gets 1: always in the set.
    """
    thresholds = {}
    for index, label in enumerate(classes):
        own = np.asarray(labels) == index
        p = np.asarray(probabilities, np.float64)[own, index]
        order = np.argsort(-p, kind="stable")
        cumulative = np.cumsum(group_weights(np.asarray(groups)[own])[order])
        thresholds[label] = _threshold(p[order], cumulative, level)
    return thresholds


def _threshold(p: Floats, cumulative: Floats, level: float) -> float:
    """q from falling probabilities `p` (n,) and the weight `cumulative` (n,) of all as large or larger ones."""
    wanted = level * ((cumulative[-1] if len(p) else 0.0) + 1)
    above = int(np.searchsorted(cumulative, wanted - _TINY))  # the first that reaches it
    if above == len(p):
        return 1.0
    least = float(p[above])
    if above and cumulative[above - 1] < wanted - _TINY and p[above - 1] > least:
        share = (wanted - cumulative[above - 1]) / (cumulative[above] - cumulative[above - 1])
        high, low = (_log_odds(float(value)) for value in (p[above - 1], least))
        between = 1 / (1 + np.exp(-(high + min(share, 1.0) * (low - high))))
        least = float(np.clip(between, least, p[above - 1]))
    q = 1 - least
    # 1 - (1 - p) may be p and a rounding error, and then the image that set the limit would fall out.
    return float(q if 1 - q <= least else np.nextafter(q, 2.0))


def _log_odds(p: float) -> float:
    inside = min(max(p, 1e-12), 1 - 1e-12)
    return float(np.log(inside / (1 - inside)))


def fit_refer_below(probabilities: Floats, labels: Integers, weights: Floats | None = None) -> float:
    """The largest probability below which an image is referred to a reader.

    `probabilities` (n, classes), `labels` (n,), `weights` (n,), by default equal. Rule: of the shares answered from
    `ANSWERED_LEAST` to `ANSWERED_MOST`, the largest at which (errors + 1) / (answered + 1) is at most
    1 - `ANSWERED_ACCURACY`, the one more as in conformal risk control (Angelopoulos et al., ICLR 2024), because that
    few images prove little; where none is, `ANSWERED_LEAST`: a model too weak for the target still answers, and its
    measured risk-coverage curve shows it. Images with equal probabilities are answered or referred together, which
    may answer more.
    """
    weights = np.ones(len(labels)) if weights is None else np.asarray(weights, np.float64)
    confidence = np.asarray(probabilities, np.float64).max(axis=1)
    wrong = np.argmax(probabilities, axis=1) != labels
    order = np.argsort(-confidence, kind="stable")
    confidence, answered = confidence[order], np.cumsum(weights[order])
    errors = np.cumsum((weights * wrong)[order])
    last = np.append(confidence[:-1] > confidence[1:], True)  # of equal ones, only the last is a possible limit
    share = answered / answered[-1]
    enough = last & (share >= ANSWERED_LEAST - _TINY)
    good = enough & (share <= ANSWERED_MOST + _TINY) & ((errors + 1) / (answered + 1) <= 1 - ANSWERED_ACCURACY + _TINY)
    chosen = np.flatnonzero(good)[-1] if good.any() else np.flatnonzero(enough)[0]
    return float(min(confidence[chosen], 1.0))


def softmax(logits: Floats, temperature: float = 1.0) -> NDArray[np.float64]:
    """Probabilities at a `temperature`, shape of `logits` (n, classes), each row summing to 1.

    Raises `ValueError` unless `temperature` is positive.
    """
    if not temperature > 0:
        raise ValueError(f"a temperature is positive, not {temperature}")
    scaled = np.asarray(logits, np.float64) / temperature
    exponentials = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True))


def negative_log_likelihood(probabilities: Floats, labels: Integers, weights: Floats | None = None) -> float:
    """Mean of -log p(true class) in nats; `probabilities` (n, classes), `labels` (n,), `weights` (n,)."""
    chosen = np.asarray(probabilities, np.float64)[np.arange(len(labels)), labels]
    return float(np.average(-np.log(np.clip(chosen, 1e-12, 1.0)), weights=weights))


def expected_calibration_error(probabilities: Floats, labels: Integers, bins: int = 15) -> float:
    """Mean distance, in 0..1, between the confidence of the predicted class and its accuracy.

    `probabilities` (n, classes), `labels` (n,); equal-width bins weighted by their share of the images
    (Naeini et al., AAAI 2015). On few images, perfect probabilities score well above 0: see `calibration_floor`.
    """
    confidence = np.asarray(probabilities, np.float64).max(axis=1)
    correct = (np.argmax(probabilities, axis=1) == labels).astype(np.float64)
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    gap = np.bincount(which, weights=confidence - correct, minlength=bins)
    return float(np.abs(gap).sum() / len(labels))


def calibration_floor(
    probabilities: Floats, groups: Integers, *, repeats: int = 200, generator: np.random.Generator
) -> tuple[float, float]:
    """The `expected_calibration_error` that chance gives here were every probability true: mean, 95th percentile.

    `probabilities` (n, classes), `groups` (n,): twins are right or wrong together. An error near this floor is no sign
    of bad calibration (Vaicenavicius et al., AISTATS 2019): it was 0.025 for 840 images in 301 groups of the public
    data set and a model that is right on 94 %.
    """
    confidence = np.asarray(probabilities, np.float64).max(axis=1)
    _, group = np.unique(groups, return_inverse=True)
    found = []
    for _ in range(repeats):
        right = generator.random(int(group.max()) + 1)[group] < confidence
        answers = np.column_stack([confidence, np.zeros(len(confidence))])
        found.append(expected_calibration_error(answers, np.where(right, 0, 1)))
    return float(np.mean(found)), float(np.quantile(found, 0.95))
