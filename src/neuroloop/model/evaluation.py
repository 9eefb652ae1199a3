"""How good a model is, with its uncertainty and beside baselines that never look at a lesion."""

import io
from collections.abc import Callable

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.ensemble import RandomForestClassifier

from neuroloop.core.schemas import LABELS
from neuroloop.model.calibration import expected_calibration_error, negative_log_likelihood

Images = NDArray[np.uint8]
Floats = NDArray[np.floating]
Integers = NDArray[np.integer]


def evaluate(
    probabilities: Floats, labels: Integers, groups: Integers, *, bootstrap: int = 1000, generator: np.random.Generator
) -> dict[str, float]:
    """Scores of one set of images, each in 0..1 but `nll` (nats).

    `probabilities` (n, 4), `labels` (n,) in 0..3, `groups` (n,): images of one group are twins and are drawn
    together by the bootstrap, or the intervals would be too narrow. Keys: accuracy, macro_f1, ece, nll,
    precision_<class> (0 where the class is never predicted), recall_<class> (left out where the set has no image of
    it), and the 95 % interval accuracy_low, accuracy_high, macro_f1_low, macro_f1_high. Macro-F1 is the mean over
    the classes that occur as a label or a prediction. Raises `ValueError` on an empty set.
    """
    if len(labels) == 0:
        raise ValueError("nothing to evaluate: the set has no image")
    classes = len(LABELS)
    predicted = np.argmax(probabilities, axis=1)
    _, group = np.unique(groups, return_inverse=True)
    per_group = np.zeros((int(group.max()) + 1, classes * classes))
    np.add.at(per_group, (group, labels * classes + predicted), 1)
    confusion = per_group.sum(axis=0).reshape(classes, classes)
    scores = {
        "accuracy": _accuracy(confusion),
        "macro_f1": _macro_f1(confusion),
        "ece": expected_calibration_error(probabilities, labels),
        "nll": negative_log_likelihood(probabilities, labels),
    }
    for index, label in enumerate(LABELS):
        hits = confusion[index, index]
        scores[f"precision_{label}"] = float(hits / max(confusion[:, index].sum(), 1))
        if confusion[index].sum():
            scores[f"recall_{label}"] = float(hits / confusion[index].sum())
    draws = generator.multinomial(len(per_group), np.full(len(per_group), 1 / len(per_group)), size=bootstrap)
    resampled = (draws @ per_group).reshape(bootstrap, classes, classes)
    for name, measure in (("accuracy", _accuracy), ("macro_f1", _macro_f1)):
        low, high = np.quantile([measure(one) for one in resampled], (0.025, 0.975))
        scores |= {f"{name}_low": float(low), f"{name}_high": float(high)}
    return scores


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
        "nearest": train_labels[(test @ train.T).argmax(axis=1)],
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
    figure = Figure(figsize=(5, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    axes.set_xticks(range(len(LABELS)), LABELS, rotation=20)
    axes.set_yticks(range(len(LABELS)), LABELS)
    for row in range(len(LABELS)):
        for column in range(len(LABELS)):
            colour = "white" if share[row, column] > 0.5 else "black"
            text = f"{confusion[row, column]:.0f}\n{share[row, column]:.1%}"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


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
    """Area means, (n, side * side); a remainder at the far edges is cut off."""
    step = max(images.shape[1] // side, 1)
    cut = images[:, : step * side, : step * side].astype(np.float32)
    fit = cut.shape[1] // step
    return cut.reshape(len(images), fit, step, fit, step).mean(axis=(2, 4)).reshape(len(images), -1)


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
