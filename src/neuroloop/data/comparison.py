"""What changed from one data version to the next, in images and in how they look."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.stats import chi2

from neuroloop.core.schemas import LABELS, ImageEntry, Record, Snapshot
from neuroloop.data.statistics import ClassStatistics, Statistics

Grade = Literal["stable", "moderate", "large", "too few"]

MODERATE, LARGE = 0.10, 0.25
"""Population stability index from which a distribution counts as moderately and as largely shifted: the convention of
credit scoring (Lewis, An Introduction to Credit Scoring, 1994; Siddiqi, Credit Risk Scorecards, 2006)."""

CHANCE = 0.99
"""Two samples of one distribution differ too: their index, times nm/(n+m), follows chi-square with bins - 1 degrees of
freedom (Yurdakul, Statistical Properties of Population Stability Index, 2018). Below this quantile of it no shift is
graded, whatever the convention says; else every small class would alarm."""

_BINS = 10
_FEWEST = 20
_LEAST = 0.01  # share of a size, a source or a class below which it counts as if it had that
_LISTED = 100
_RARE = 10  # images of both versions together, below which a source is one of the others: it is mostly chance
_AREAS = np.linspace(10, 26, 65)  # log2 of a frame's pixels, from 32 x 32 to 8192 x 8192, in quarters


class Shift(Record):
    """How far one distribution moved."""

    psi: float = Field(description="population stability index, 0 for equal distributions")
    chance: float = Field(description="what it would stay under in 99 of 100 draws from one distribution")
    grade: Grade


class ClassChange(Record):
    """One class: images that came and went, by recovered source, and how far the training images moved."""

    added: dict[str, int] = Field(description="recovered source -> images that the earlier version had not")
    removed: dict[str, int] = Field(description="recovered source -> images that are not there any more")
    relabelled: dict[str, int] = Field(description="class they had before -> images")
    shifts: dict[str, Shift] = Field(
        description="grey_level and contrast (mean and deviation of an image), size (area), origin (recovered source)"
    )


class Comparison(Record):
    """What changed from the data version `previous` to `version`."""

    previous: str
    version: str
    unchanged: int = Field(description="images that both have, under the same class")
    classes: dict[str, ClassChange]
    mix: Shift = Field(description="how far the shares of the classes moved")
    relabelled: tuple[tuple[str, str, str], ...] = Field(
        description="path, class before and class now of the first hundred relabelled images"
    )

    @property
    def psi_max(self) -> float:
        """The largest index that is more than chance, 0 where there is none."""
        return max((shift.psi for _, shift in self._shifts() if shift.psi > shift.chance), default=0.0)

    @property
    def grade(self) -> Grade:
        """The worst grade of all shifts."""
        grades = {shift.grade for _, shift in self._shifts()}
        return next((grade for grade in ("large", "moderate", "stable") if grade in grades), "too few")

    def summary(self) -> dict[str, object]:
        """Small JSON: totals, the worst grade, and each shift that is not stable."""
        return {
            "previous": self.previous,
            "unchanged": self.unchanged,
            "added": sum(sum(change.added.values()) for change in self.classes.values()),
            "removed": sum(sum(change.removed.values()) for change in self.classes.values()),
            "relabelled": sum(sum(change.relabelled.values()) for change in self.classes.values()),
            "psi_max": self.psi_max,
            "grade": self.grade,
            "shifted": {name: shift.psi for name, shift in self._shifts() if shift.grade in ("moderate", "large")},
        }

    def _shifts(self) -> list[tuple[str, Shift]]:
        return [("class mix", self.mix)] + [
            (f"{label} {name}", shift)
            for label, change in self.classes.items()
            for name, shift in change.shifts.items()
        ]


def compare(before: Snapshot, after: Snapshot, earlier: Statistics, later: Statistics) -> Comparison:
    """Images by their content, all parts; distributions of the training part, per class.

    An image that only changed its name or place counts as unchanged. `earlier` and `later` are the statistics of the
    snapshots `before` and `after`.
    """
    unchanged, relabelled, removed, added = _matched(before, after)
    return Comparison(
        previous=before.version,
        version=after.version,
        unchanged=unchanged,
        classes={
            label: ClassChange(
                added=_counted(image.origin for image in added if image.label == label),
                removed=_counted(image.origin for image in removed if image.label == label),
                relabelled=_counted(then for _, then, now in relabelled if now == label),
                shifts=_class_shifts(earlier.classes[label], later.classes[label]),
            )
            for label in LABELS
        },
        mix=_mix(earlier, later),
        relabelled=tuple(relabelled[:_LISTED]),
    )


def _matched(
    before: Snapshot, after: Snapshot
) -> tuple[int, list[tuple[str, str, str]], list[ImageEntry], list[ImageEntry]]:
    """How many images stayed; those relabelled (path, class then, class now); those that went; those that came.

    The same bytes may stand there several times, under several classes too: first each finds its like.
    """
    old, new = defaultdict[str, list[ImageEntry]](list), defaultdict[str, list[ImageEntry]](list)
    for images, snapshot in ((old, before), (new, after)):
        for image in sorted(snapshot.images, key=lambda image: image.path):
            images[image.sha256].append(image)
    unchanged, relabelled, removed, added = 0, [], [], []
    for sha256 in old.keys() | new.keys():
        gone, came = old[sha256], new[sha256]
        for image in list(gone):
            like = next((other for other in came if other.label == image.label), None)
            if like is not None:
                gone.remove(image)
                came.remove(like)
                unchanged += 1
        both = min(len(gone), len(came))
        relabelled += [(now.path, then.label, now.label) for then, now in zip(gone[:both], came[:both], strict=True)]
        removed += gone[both:]
        added += came[both:]
    return unchanged, sorted(relabelled), removed, added


def psi(
    reference: Sequence[int], current: Sequence[int], *, samples: tuple[int, int] | None = None, least: float = 0.0
) -> Shift:
    """The population stability index of two ordered histograms over the same fine bins.

    Neighbouring bins are joined until each holds a tenth of the reference (fewer where there are few images), those
    below all of the reference are one of their own, and half an image is added to each, so that an empty one does not
    make the index infinite. `samples` are the independent images in each, where they are fewer than the counts say:
    similar images of one group count once for what is chance. No bin counts for less than the share `least`: else a
    size that is new would weigh more, the more images there are.
    """
    old, new = np.asarray(reference, float), np.asarray(current, float)
    if len(old) != len(new):
        old = new = np.zeros(1)
    n, m = samples or (int(old.sum()), int(new.sum()))
    if min(n, m, old.sum(), new.sum()) < _FEWEST:
        return Shift(psi=0.0, chance=0.0, grade="too few")
    share = 1 / min(_BINS, min(n, m) // 10)
    lowest = int(np.flatnonzero(old)[0])  # below it is a bin of its own, or what moves down there would not be seen
    cuts, filled = sorted({0, lowest}), 0.0
    for index in range(len(old) - 1):
        filled += old[index] / old.sum()
        if filled >= share - 1e-9:
            cuts.append(index + 1)
            filled = 0.0
    return _graded(np.add.reduceat(old, cuts), np.add.reduceat(new, cuts), n, m, least)


def _graded(old: NDArray[np.float64], new: NDArray[np.float64], n: int, m: int, least: float = 0.0) -> Shift:
    """The index of two histograms over the same bins, of `n` and `m` independent images."""
    p, q = old + 0.5, new + 0.5
    p, q = (np.maximum(each / each.sum(), least) for each in (p, q))
    value = float(((q - p) * np.log(q / p)).sum())
    chance = float(chi2.ppf(CHANCE, max(1, len(p) - 1))) * (1 / n + 1 / m)
    grade: Grade = "stable"
    if value > chance and value >= MODERATE:
        grade = "large" if value >= LARGE else "moderate"
    return Shift(psi=round(value, 4), chance=round(chance, 4), grade=grade)


def _class_shifts(earlier: ClassStatistics, later: ClassStatistics) -> dict[str, Shift]:
    # A sample may have been measured of each; of groups there are never more than images.
    groups = tuple(min(each.groups["train"], each.measured) for each in (earlier, later))
    samples = (groups[0], groups[1])
    return {
        "grey_level": psi(earlier.mean_counts, later.mean_counts, samples=samples),
        "contrast": psi(earlier.deviation_counts, later.deviation_counts, samples=samples),
        "size": psi(_areas(earlier.sizes), _areas(later.sizes), samples=samples, least=_LEAST),
        "origin": _by_name(_origins(earlier), _origins(later), samples),
    }


def _origins(of: ClassStatistics) -> dict[str, int]:
    return {name: origin.images.get("train", 0) for name, origin in of.origins.items()}


def _mix(earlier: Statistics, later: Statistics) -> Shift:
    """The shares of the classes among the training images; each class is a bin, however small it has become."""
    old, new = (np.array([each.classes[label].images["train"] for label in LABELS], float) for each in (earlier, later))
    n, m = (sum(each.classes[label].groups["train"] for label in LABELS) for each in (earlier, later))
    return _graded(old, new, n, m, _LEAST) if min(n, m) >= _FEWEST else Shift(psi=0.0, chance=0.0, grade="too few")


def _areas(sizes: Mapping[str, int]) -> list[int]:
    """Images by the area of their frame: of names without an order, two draws of many sizes would share few."""
    areas = [np.log2(np.prod([int(side) for side in size.split(" x ")])) for size in sizes]
    counts, _ = np.histogram(np.clip(areas, _AREAS[0], _AREAS[-1]), _AREAS, weights=list(sizes.values()))
    return [int(count) for count in counts]


def _by_name(earlier: Mapping[str, int], later: Mapping[str, int], samples: tuple[int, int]) -> Shift:
    """Each name is a bin, for names have no neighbours to be joined with; rare ones together are one."""
    both = Counter(earlier) + Counter(later)
    if min(*samples, sum(earlier.values()), sum(later.values())) < _FEWEST:
        return Shift(psi=0.0, chance=0.0, grade="too few")
    least = max(_RARE, _LEAST * both.total())
    names = [name for name in both if both[name] >= least]
    old, new = ([float(each.get(name, 0)) for name in names] for each in (earlier, later))
    if len(names) < len(both):
        old.append(sum(earlier.values()) - sum(old))
        new.append(sum(later.values()) - sum(new))
    return _graded(np.array(old), np.array(new), *samples, _LEAST)


def _counted(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(value or "unknown" for value in values).most_common())
