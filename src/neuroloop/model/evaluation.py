"""How good a model is, with its uncertainty and beside baselines that never look at a lesion."""

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from sklearn.ensemble import RandomForestClassifier

from neuroloop.core.schemas import LABELS
from neuroloop.model import calibration
from neuroloop.model.calibration import LEVELS, Calibration, expected_calibration_error, negative_log_likelihood

Images = NDArray[np.uint8]
Floats = NDArray[np.floating]
Integers = NDArray[np.integer]

_INTERVAL = (0.025, 0.975)  # the 95 % between
_Z = 1.96
_FEW = 10  # right or wrong groups, below which a bootstrap is too narrow: where all are right, it says 1 to 1


def evaluate(
    probabilities: Floats, labels: Integers, groups: Integers, *, bootstrap: int = 1000, generator: np.random.Generator
) -> dict[str, float]:
    """Scores of one set of images, each in 0..1 but `nll` (nats).

    `probabilities` (n, 4), `labels` (n,) in 0..3, `groups` (n,): images of one group are twins and are drawn
    together by the bootstrap, or the intervals would be too narrow. Keys: accuracy, macro_f1, ece, ece_floor and
    ece_chance (what chance gives a perfectly calibrated model here, on average and in 95 of 100 cases at most), nll,
    precision_<class> (0 where the class is never predicted), recall_<class> (left out where the set has no image of
    it), and <name>_low, <name>_high, the 95 % interval of accuracy, macro_f1 and each recall. With fewer
    than 10 groups right, or wrong, that of a share is at least as wide as Wilson's of so many groups (JASA 1927), and
    where nothing at all is wrong, macro_f1_low is the mean of the recalls'. Macro-F1 is the mean over the classes that
    occur as a label or a prediction.
    Raises `ValueError` on an empty set.
    """
    if len(labels) == 0:
        raise ValueError("nothing to evaluate: the set has no image")
    classes = len(LABELS)
    predicted = np.argmax(probabilities, axis=1)
    per_group = _per_group(groups, _one_hot(labels * classes + predicted, classes * classes))
    confusion = per_group.sum(axis=0).reshape(classes, classes)
    resampled = (_draws(len(per_group), bootstrap, generator) @ per_group).reshape(bootstrap, classes, classes)
    scores = {
        "accuracy": _accuracy(confusion),
        "macro_f1": _macro_f1(confusion),
        "ece": expected_calibration_error(probabilities, labels),
        "nll": negative_log_likelihood(probabilities, labels),
    }
    scores |= _share_bounds(
        "accuracy", np.array([_accuracy(one) for one in resampled]), scores["accuracy"], len(per_group)
    )
    scores |= _bounds("macro_f1", np.array([_macro_f1(one) for one in resampled]))
    scores["ece_floor"], scores["ece_chance"] = calibration.calibration_floor(
        probabilities, groups, generator=generator
    )
    own_groups = (per_group.reshape(-1, classes, classes).sum(axis=2) > 0).sum(axis=0)
    for index, label in enumerate(LABELS):
        hits, found = confusion[index, index], confusion[index].sum()
        scores[f"precision_{label}"] = float(hits / max(confusion[:, index].sum(), 1))
        if found:
            scores[f"recall_{label}"] = float(hits / found)
            drawn = resampled[:, index].sum(axis=1)
            recalls = resampled[drawn > 0, index, index] / drawn[drawn > 0]
            scores |= _share_bounds(f"recall_{label}", recalls, scores[f"recall_{label}"], own_groups[index])
    if scores["macro_f1"] == 1:
        lows = [scores[f"recall_{label}_low"] for label in LABELS if f"recall_{label}" in scores]
        scores["macro_f1_low"] = float(np.mean(lows))
    return scores


def share(hits: NDArray[np.bool_], groups: Integers, *, generator: np.random.Generator) -> dict[str, float]:
    """Of the images, those that are `hits` (n,), with an interval as in `evaluate`: share, share_low, share_high."""
    per_group = _per_group(groups, np.stack([hits, np.ones(len(hits))], axis=1).astype(np.float64))
    drawn = _draws(len(per_group), 1000, generator) @ per_group
    found = float(hits.mean())
    return {"share": found} | _share_bounds("share", drawn[:, 0] / drawn[:, 1], found, len(per_group))


def coverage(
    probabilities: Floats,
    labels: Integers,
    groups: Integers,
    fitted: Calibration,
    *,
    bootstrap: int = 1000,
    generator: np.random.Generator,
) -> dict[str, dict[str, float]]:
    """How often the prediction sets hold the true class, for each level of `fitted`.

    `probabilities` (n, 4) as `fitted` gives them, `labels` and `groups` (n,). For each class that occurs: <class>, the
    share of its groups of twins that are covered (a group counts once, as in the fit, and in parts where it is covered
    in parts), <class>_low and <class>_high (95 %, bootstrapped over groups), and <class>_images, the share of its
    images. Intervals as in `evaluate`. Over all classes: size, the mean number of classes in a set; single and empty,
    the shares of sets with one class and none. With few groups the measured share scatters: of 60 groups covered with
    95 %, by 3 points.
    """
    result: dict[str, dict[str, float]] = {}
    for level in fitted.conformal:
        sets = fitted.prediction_sets(probabilities, level)
        sizes = sets.sum(axis=1)
        figures = {"size": sizes.mean(), "single": (sizes == 1).mean(), "empty": (sizes == 0).mean()}
        for index, label in enumerate(LABELS):
            own = labels == index
            if own.any():
                held = sets[own, index]
                weights = calibration.group_weights(groups[own])
                per_group = _per_group(groups[own], (held * weights)[:, None])[:, 0]
                draws = _draws(len(per_group), bootstrap, generator)
                figures |= {label: per_group.mean(), f"{label}_images": held.mean()}
                figures |= _share_bounds(label, draws @ per_group / len(per_group), per_group.mean(), len(per_group))
        result[level] = {name: float(value) for name, value in figures.items()}
    return result


def resplit_coverage(
    probabilities: Floats,
    labels: Integers,
    groups: Integers,
    *,
    share: float,
    repeats: int = 100,
    generator: np.random.Generator,
) -> dict[str, dict[str, float]]:
    """What the sets would cover had chance divided calibration and test differently: level -> class -> mean share.

    `probabilities` (n, 4), `labels` and `groups` (n,) of both parts together. Each time, the share `share` of each
    class's groups fits thresholds, which are then dropped, and the rest measures them as in `coverage`. One division
    of some hundred groups says little about the method; the mean over many says whether it covers what it promises
    (Angelopoulos and Bates, A Gentle Introduction to Conformal Prediction, 2021). A class with fewer than two groups
    is left out.
    """
    found: dict[str, dict[str, list[float]]] = {level: {} for level in LEVELS}
    for index, label in enumerate(LABELS):
        own = np.flatnonzero(labels == index)
        names, group = np.unique(groups[own], return_inverse=True)
        fitted_on = int(np.clip(round(share * len(names)), 1, max(len(names) - 1, 1)))
        for _ in range(repeats if len(names) > 1 else 0):
            fitting = np.isin(group, generator.permutation(len(names))[:fitted_on])
            first, rest = own[fitting], own[~fitting]
            weights = calibration.group_weights(groups[rest])
            for level in LEVELS:
                q = calibration.fit_conformal(probabilities[first], labels[first], groups[first], float(level))[label]
                held = probabilities[rest, index] >= 1 - q
                found[level].setdefault(label, []).append(float(np.average(held, weights=weights)))
    return {level: {label: float(np.mean(shares)) for label, shares in of.items()} for level, of in found.items()}


@dataclass(frozen=True)
class RiskCoverage:
    """The accuracy of what is answered against the share that is answered, most certain images first.

    `coverage` float64 (n,) rises to 1; `accuracy` float64 (n,). Images that are equally certain are answered in
    random order, and `accuracy` is its mean.
    """

    coverage: NDArray[np.float64]
    accuracy: NDArray[np.float64]

    def at(self, share: float) -> float:
        """The accuracy when at least `share` (0..1) of the images are answered."""
        first = int(np.searchsorted(self.coverage, share - 1e-9))
        return float(self.accuracy[min(first, len(self.accuracy) - 1)])

    @property
    def area(self) -> float:
        """The mean of the risk, 1 - accuracy, over all shares (AURC: Geifman et al., ICLR 2019); lower is better."""
        return float(1 - self.accuracy.mean())


def risk_coverage(probabilities: Floats, labels: Integers) -> RiskCoverage:
    """How accurate the answers are when the least certain images go to a reader; `probabilities` (n, 4), `labels` (n,).

    Certainty is the largest probability (El-Yaniv and Wiener, JMLR 2010). Raises `ValueError` on an empty set.
    """
    if len(labels) == 0:
        raise ValueError("nothing to evaluate: the set has no image")
    confidence = np.asarray(probabilities, np.float64).max(axis=1)
    right = (np.argmax(probabilities, axis=1) == labels).astype(np.float64)
    _, tie = np.unique(-confidence, return_inverse=True)
    mean = np.bincount(tie, weights=right) / np.bincount(tie)
    answered = np.arange(1, len(labels) + 1)
    return RiskCoverage(answered / len(labels), np.cumsum(mean[np.sort(tie)]) / answered)


def baselines(
    train_images: Images, train_labels: Integers, test_images: Images, test_labels: Integers
) -> dict[str, float]:
    """`<name>_accuracy` and `<name>_macro_f1` of four rules a useful model must beat.

    `majority` always says the largest class; `border` sees only edges, corners and the box around the head;
    `thumbnail` sees 8x8 pixels (both a random forest); `nearest` copies the most alike training image at 32x32.
    Images (n, s, s) uint8, labels (n,) in 0..3. Deterministic.
    """

    def forest(describe: Callable[[Images], NDArray[np.float32]]) -> NDArray[np.int64]:
        model = RandomForestClassifier(200, min_samples_leaf=2, random_state=0)
        return np.asarray(model.fit(describe(train_images), train_labels).predict(describe(test_images)))

    train, test = (_normalised(_shrink(images, 32)) for images in (train_images, test_images))
    predictions = {
        "majority": np.full(len(test_labels), np.bincount(train_labels).argmax()),
        "border": forest(_border),
        "thumbnail": forest(lambda images: _shrink(images, 8)),
        # In pieces, for the whole matrix of a large set takes gigabytes.
        "nearest": np.concatenate(
            [train_labels[(test[at : at + 512] @ train.T).argmax(axis=1)] for at in range(0, len(test), 512)]
        ),
    }
    scores: dict[str, float] = {}
    for name, predicted in predictions.items():
        confusion = _confusion(test_labels, predicted)
        scores |= {f"{name}_accuracy": _accuracy(confusion), f"{name}_macro_f1": _macro_f1(confusion)}
    return scores


def confusion_plot(labels: Integers, predicted: Integers, *, title: str = "") -> bytes:
    """A PNG of the confusion matrix; `labels` and `predicted` (n,) in 0..3, rows are the true classes."""
    confusion = _confusion(labels, predicted)
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    figure, axes = _figure()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    axes.set_xticks(range(len(LABELS)), LABELS, rotation=20)
    axes.set_yticks(range(len(LABELS)), LABELS)
    for row in range(len(LABELS)):
        for column in range(len(LABELS)):
            colour = "white" if share[row, column] > 0.5 else "black"
            text = f"{confusion[row, column]:.0f}\n{share[row, column]:.1%}"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=9)
    return _png(figure)


def reliability_plot(probabilities: Floats, labels: Integers, *, bins: int = 15, title: str = "") -> bytes:
    """A PNG of accuracy against confidence; `probabilities` (n, 4), `labels` (n,) in 0..3.

    Below it, how many images each bin holds: a point far from the diagonal that rests on three images is no finding.
    """
    confidence = np.asarray(probabilities, np.float64).max(axis=1)
    right = (np.argmax(probabilities, axis=1) == labels).astype(np.float64)
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    counts = np.bincount(which, minlength=bins)
    filled = counts > 0
    means = [
        np.bincount(which, weights=values, minlength=bins)[filled] / counts[filled] for values in (confidence, right)
    ]
    figure = Figure(figsize=(5, 5), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot([0, 1], [0, 1], "--", color="grey", linewidth=1)
    above.plot(*means, "o-", color="tab:blue")
    error = expected_calibration_error(probabilities, labels, bins)
    above.set(ylabel="share that is right", ylim=(0, 1.02), title=f"{title}\ncalibration error {error:.3f}".strip())
    below.bar((np.arange(bins) + 0.5) / bins, counts, 0.9 / bins, color="tab:blue")
    below.set(xlabel="confidence", ylabel="images", yscale="log", xlim=(0, 1), ylim=(0.5, None))
    return _png(figure)


def risk_coverage_plot(probabilities: Floats, labels: Integers, *, refer_below: float, title: str = "") -> bytes:
    """A PNG of the curve of `risk_coverage`, with the place at which `refer_below` (0..1) puts the model on it."""
    curve = risk_coverage(probabilities, labels)
    answered = np.asarray(probabilities, np.float64).max(axis=1) >= refer_below
    figure, axes = _figure()
    axes.plot(curve.coverage, curve.accuracy, color="tab:blue")
    if answered.any():
        right = (np.argmax(probabilities, axis=1) == labels)[answered].mean()
        text = f"referring below {refer_below:.2f}: {right:.1%} right of {answered.mean():.0%} answered"
        axes.plot(answered.mean(), right, "o", color="tab:orange", label=text)
        axes.legend(loc="lower left", fontsize=8)
    axes.set(xlabel="share of the images that is answered", ylabel="share of the answers that is right", title=title)
    axes.set(xlim=(0, 1.01), ylim=(min(0.9, curve.accuracy.min() - 0.02), 1.005))
    axes.grid(alpha=0.3)
    return _png(figure)


def error_grid(
    images: Images, probabilities: Floats, labels: Integers, *, most: int = 24, columns: int = 6, title: str = ""
) -> bytes:
    """A PNG of the errors, the most certain first: each image with its true and its predicted class and probability.

    `images` uint8 (n, s, s), the canonical ones the model saw; `probabilities` (n, 4), `labels` (n,). At most `most`.
    """
    predicted = np.argmax(probabilities, axis=1)
    wrong = np.flatnonzero(predicted != labels)
    confidence = np.asarray(probabilities, np.float64).max(axis=1)
    shown = wrong[np.argsort(-confidence[wrong], kind="stable")][:most]
    rows = max(-(-len(shown) // columns), 1)
    figure = Figure(figsize=(1.7 * columns, 2.05 * rows + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}\n{len(wrong)} of {len(labels)} wrong, the most certain first".strip(), fontsize=10)
    for place in figure.subplots(rows, columns, squeeze=False).flat:
        place.set_axis_off()
    for number, axes in zip(shown, figure.axes, strict=False):
        axes.imshow(images[number], cmap="gray", vmin=0, vmax=255)
        said = f"{LABELS[predicted[number]]} {confidence[number]:.2f}"
        axes.set_title(f"is {LABELS[labels[number]]}\nsaid {said}", fontsize=8)
    return _png(figure)


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def _per_group(groups: Integers, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sums of `values` (n, k) over each group: (groups, k)."""
    _, group = np.unique(groups, return_inverse=True)
    sums = np.zeros((int(group.max()) + 1, values.shape[1]))
    np.add.at(sums, group, values)
    return sums


def _one_hot(which: Integers, classes: int) -> NDArray[np.float64]:
    return np.eye(classes)[which]


def _draws(groups: int, bootstrap: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """How often each group is drawn, (bootstrap, groups); each row sums to `groups`."""
    return generator.multinomial(groups, np.full(groups, 1 / groups), size=bootstrap)


def _bounds(name: str, resampled: Floats) -> dict[str, float]:
    low, high = np.quantile(resampled, _INTERVAL)
    return {f"{name}_low": float(low), f"{name}_high": float(high)}


def _share_bounds(name: str, resampled: Floats, share: float, groups: int) -> dict[str, float]:
    """As `_bounds`; with few groups right or wrong no narrower than Wilson's score interval of `share` in so many."""
    bounds = _bounds(name, resampled)
    if min(share, 1 - share) * groups >= _FEW:
        return bounds
    centre = (share + _Z**2 / (2 * groups)) / (1 + _Z**2 / groups)
    reach = _Z * np.sqrt(share * (1 - share) / groups + _Z**2 / (4 * groups**2)) / (1 + _Z**2 / groups)
    low, high = max(0.0, float(centre - reach)), min(1.0, float(centre + reach))
    return {f"{name}_low": min(bounds[f"{name}_low"], low), f"{name}_high": max(bounds[f"{name}_high"], high)}


def _confusion(labels: Integers, predicted: Integers) -> NDArray[np.float64]:
    confusion = np.zeros((len(LABELS), len(LABELS)))
    np.add.at(confusion, (labels, predicted), 1)
    return confusion


def _accuracy(confusion: NDArray[np.floating]) -> float:
    return float(np.trace(confusion) / confusion.sum())


def _macro_f1(confusion: NDArray[np.floating]) -> float:
    seen = confusion.sum(axis=0) + confusion.sum(axis=1)
    return float((2 * np.diag(confusion)[seen > 0] / seen[seen > 0]).mean())


def _shrink(images: Images, side: int) -> NDArray[np.float32]:
    """Area means of the whole image, (n, side * side)."""
    return np.stack(
        [
            np.asarray(Image.fromarray(image.astype(np.float32)).resize((side, side), Image.Resampling.BOX)).ravel()
            for image in images
        ]
    )


def _normalised(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    centred = rows - rows.mean(axis=1, keepdims=True)
    return np.asarray(centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-6))


def _border(images: Images) -> NDArray[np.float32]:
    width = max(images.shape[1] // 16, 1)
    strips = [images[:, :width], images[:, -width:], images[:, :, :width], images[:, :, -width:]]
    strips += [images[:, rows, columns] for rows in (slice(width), slice(-width, None))
               for columns in (slice(width), slice(-width, None))]  # fmt: skip
    columns = [measure(strip.reshape(len(images), -1), axis=1) for strip in strips for measure in (np.mean, np.std)]
    for axis in (1, 2):
        occupied = images.max(axis=axis) > 10
        first, last = occupied.argmax(axis=1), occupied[:, ::-1].argmax(axis=1)
        columns += [first, last]
    return np.stack(columns, axis=1).astype(np.float32)
