"""How well things that are no lesion predict the class: the reason why a high accuracy may mean nothing.

Each shortcut is a classifier that is given one trait of an image only. Where it does well, the class can be told from
how, where and by whom the images were made, and a model trained on them may have learnt just that.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from sklearn.ensemble import ExtraTreesClassifier

from neuroloop.core.schemas import Record

FRAME = 128
"""Side, in pixels, of the frames that traits are taken from: whole images, squeezed square."""

TRAITS: Mapping[str, str] = {
    "majority": "nothing: the share of the largest class of those tested on",
    "file_size": "the number of bytes of the file",
    "image_size": "width and height in pixels",
    "border": "mean and deviation of the four edges and corners, each a sixteenth wide",
    "margins": "where the first and the last rows and columns brighter than 10 of 255 lie",
    "histogram": "how often each of 32 grey levels occurs in the whole image",
    "thumbnail": "the image in 8x8 pixels",
    "nearest": "the training image that is most alike at 32x32 pixels: its class is taken over (1-nearest-neighbour)",
}
"""What each shortcut looks at. The last two see something of the picture; the others see nothing of a lesion."""

WELL_ABOVE = 0.10
"""Accuracy above the majority's from which a shortcut is a finding: more than what the platform's own canonical form
leaves to the border on the public set."""

CHANCE = 2.7
"""Standard errors above it that it must be too: of seven traits on two splits, one goes so far by chance in 1 of 20
audits."""

MOST_TRAINED, MOST_TESTED = 8000, 4000
"""Images a shortcut is trained and tested on at most, drawn at random: more change the accuracy by less than a point,
and only cost time."""

_TREES = 100
Floats = NDArray[np.float32]
Indices = NDArray[np.int64]


class Shortcuts(Record):
    """Accuracy of each shortcut, 0 to 1, by the split it was trained and tested on."""

    source: dict[str, float] = Field(description="on the source's own parts; empty where it has none to test on")
    grouped: dict[str, float] = Field(description="on a split in which no group of similar images stands in two parts")
    images: dict[str, tuple[int, int]] = Field(description="split -> images trained and tested on")
    sampled: bool = Field(description="whether only a random sample of the images was used, see `MOST_TRAINED`")
    left_out: tuple[str, ...] = Field(default=(), description="classes with too few groups for the grouped split")

    def tempting(self) -> list[str]:
        """The shortcuts well above the majority on either split, the most telling one first."""
        return list(self.telling())

    def telling(self) -> dict[str, str]:
        """The same, each with the split on which it is furthest above."""
        found: dict[str, tuple[float, str]] = {}
        for split, scores in (("source", self.source), ("grouped", self.grouped)):
            for name in scores:
                base, tested = scores["majority"], self.images.get(split, (0, 0))[1]
                excess = scores[name] - base
                if excess >= max(WELL_ABOVE, CHANCE * float(np.sqrt(base * (1 - base) / max(tested, 1)))):
                    found[name] = max(found.get(name, (0.0, "")), (excess, split))
        return {name: found[name][1] for name in sorted(found, key=lambda name: -found[name][0])}


def describe(
    frames: NDArray[np.uint8], histograms: Sequence[NDArray[np.int64]], sizes: Sequence[tuple[int, int, int]]
) -> dict[str, Floats]:
    """The traits of n images, name -> (n, columns).

    `frames` (n, 128, 128); of each image the counts of its 32 grey levels (32,), and its (bytes, height, width).
    """
    count, width = len(frames), FRAME // 16
    numbers = np.array(sizes, np.float32).reshape(count, 3)
    edges = [frames[:, :width], frames[:, -width:], frames[:, :, :width], frames[:, :, -width:]]
    ends = (slice(width), slice(-width, None))
    edges += [frames[:, rows, columns] for rows in ends for columns in ends]
    strips = [edge.reshape(count, -1).astype(np.float32) for edge in edges]
    occupied = [frames.max(axis=axis) > 10 for axis in (2, 1)]
    counts = np.array(histograms, np.float32).reshape(count, 32)
    step = FRAME // 8
    traits = {
        "file_size": numbers[:, :1],
        "image_size": numbers[:, 1:],
        "border": np.stack([measure for strip in strips for measure in (strip.mean(axis=1), strip.std(axis=1))], 1),
        "margins": np.stack([end for used in occupied for end in (used.argmax(1), used[:, ::-1].argmax(1))], axis=1),
        "histogram": counts / np.maximum(counts.sum(axis=1, keepdims=True), 1),
        "thumbnail": frames.reshape(count, 8, step, 8, step).mean(axis=(2, 4), dtype=np.float32).reshape(count, 64),
    }
    return {name: np.ascontiguousarray(columns, np.float32) for name, columns in traits.items()}


def measure(
    traits: Mapping[str, Floats],
    thumbnails: Floats,
    labels: Sequence[str],
    splits: Mapping[str, tuple[Indices, Indices]],
    *,
    generator: np.random.Generator,
    most: tuple[int, int] = (MOST_TRAINED, MOST_TESTED),
    left_out: Sequence[str] = (),
) -> Shortcuts:
    """Train and test every shortcut on every split.

    `traits` from `describe`, `thumbnails` (n, 1024) of unit norm, `labels` (n,), `splits` maps `source` and `grouped`
    to the indices to train and to test on; one that is missing, or has too little to train or test on, is left out.
    Of larger splits, `most` images to train and to test on are drawn. `left_out` are the classes that are not in the
    grouped split.
    """
    classes, targets = np.unique(np.asarray(labels, np.str_), return_inverse=True)
    accuracy: dict[str, dict[str, float]] = {"source": {}, "grouped": {}}
    images: dict[str, tuple[int, int]] = {}
    sampled = False
    for name, (train, test) in splits.items():
        if len(classes) < 2 or not len(train) or not len(test):
            continue
        sampled |= len(train) > most[0] or len(test) > most[1]
        train, test = _some(train, most[0], generator), _some(test, most[1], generator)
        accuracy[name] = _accuracies(traits, thumbnails, targets, train, test)
        images[name] = (len(train), len(test))
    return Shortcuts(
        source=accuracy["source"],
        grouped=accuracy["grouped"],
        images=images,
        sampled=sampled,
        left_out=tuple(left_out),
    )


def _accuracies(
    traits: Mapping[str, Floats], thumbnails: Floats, targets: Indices, train: Indices, test: Indices
) -> dict[str, float]:
    # Not of those trained on: where the parts differ in their mix, any guess would be far above that.
    predicted = {"majority": np.full(len(test), np.bincount(targets[test]).argmax())}
    for name, columns in traits.items():
        # Extra trees were as good as a random forest of 200 on the public set or better, in a fifth of the time.
        forest = ExtraTreesClassifier(_TREES, min_samples_leaf=2, random_state=0, n_jobs=2)
        predicted[name] = forest.fit(columns[train], targets[train]).predict(columns[test])
    predicted["nearest"] = targets[train[(thumbnails[test] @ thumbnails[train].T).argmax(axis=1)]]
    return {name: float((predicted[name] == targets[test]).mean()) for name in TRAITS}


def _some(indices: Indices, most: int, generator: np.random.Generator) -> Indices:
    return indices if len(indices) <= most else np.sort(generator.choice(indices, most, replace=False))
