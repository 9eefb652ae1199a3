"""What the training images look like, as data and as plots: the reference for monitoring and for a reader."""

import io
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray
from pydantic import Field

from neuroloop.core.schemas import LABELS, PARTS, Record, Split, SplitEntry
from neuroloop.data.packed import pack, unpack
from neuroloop.imaging.decode import decode

BINS = 64


class Measure(NamedTuple):
    """What is measured of one image."""

    size: str  # "width x height"
    histogram: NDArray[np.float64]  # (64,), the share of pixels in each of 64 equal grey bins
    mean: float  # of the grey levels, 0 to 255
    deviation: float  # their standard deviation


_COLOURS = {"glioma": "#4269d0", "meningioma": "#e07b39", "notumor": "#3f9b6c", "pituitary": "#a463b0"}
_PART_COLOURS = dict(zip(PARTS, ("#1f3a5f", "#4f7cac", "#9cc0dd", "#e3a857"), strict=True))
_INK, _FAINT = "#22303c", "#d5dbe1"


class OriginStatistics(Record):
    """The images of one class that came from one source: counts of all parts, measures of the training part."""

    images: dict[str, int] = Field(description="part -> images")
    measured: int = Field(description="training images that the figures below are of")
    mean: float = Field(description="mean grey level, 0 to 255, averaged over images")
    deviation: float = Field(description="standard deviation of grey levels within an image, averaged over images")
    sizes: dict[str, int] = Field(description="'width x height' -> images, most frequent first")


class ClassStatistics(Record):
    """One class: counts of all parts; everything measured is of the training part only."""

    images: dict[str, int] = Field(description="part -> images")
    groups: dict[str, int] = Field(description="part -> groups of unlike images")
    measured: int = Field(description="training images that the figures below are of")
    sizes: dict[str, int] = Field(description="'width x height' -> images, most frequent first")
    histogram: tuple[float, ...] = Field(description="mean over images of the share of pixels in 64 equal grey bins")
    mean: float = Field(description="mean grey level, 0 to 255, averaged over images")
    deviation: float = Field(description="standard deviation of grey levels within an image, averaged over images")
    mean_deciles: tuple[float, ...] = Field(
        description="0, 10, ... 100 % quantiles over images of an image's mean grey"
    )
    deviation_deciles: tuple[float, ...] = Field(description="the same of an image's standard deviation")
    mean_counts: tuple[int, ...] = Field(default=(), description="images by mean grey, 32 equal bins of 0 to 256")
    deviation_counts: tuple[int, ...] = Field(default=(), description="by standard deviation, 32 bins of 0 to 128")
    origins: dict[str, OriginStatistics] = Field(default={}, description="recovered source -> its images, large first")


class Statistics(Record):
    """What `capture` found; JSON through pydantic."""

    version: str = Field(description="data version")
    simulated: bool
    quarantined: int
    classes: dict[str, ClassStatistics]
    samples: dict[str, tuple[SplitEntry, ...]] = Field(
        description="class -> training images chosen for the sample grid"
    )


def measure(pixels: NDArray[np.uint8]) -> Measure:
    """The figures of one decoded image uint8 (H, W)."""
    counts = np.bincount(pixels.ravel(), minlength=256).reshape(BINS, -1).sum(axis=1)
    height, width = pixels.shape
    return Measure(f"{width} x {height}", counts / pixels.size, float(pixels.mean()), float(pixels.std()))


def pack_measures(measures: Mapping[str, Measure]) -> bytes:
    """Measures by path, as bytes that `unpack_measures` reads."""
    found = list(measures.values())
    return pack(
        paths=np.array(list(measures), np.str_),
        sizes=np.array([each.size for each in found], np.str_),
        histograms=np.array([each.histogram for each in found], np.float64).reshape(-1, BINS),
        means=np.array([each.mean for each in found], np.float64),
        deviations=np.array([each.deviation for each in found], np.float64),
    )


def unpack_measures(data: bytes) -> dict[str, Measure]:
    """The inverse of `pack_measures`."""
    found = unpack(data)
    columns = (found["sizes"].tolist(), found["histograms"], found["means"].tolist(), found["deviations"].tolist())
    return {path: Measure(*row) for path, *row in zip(found["paths"].tolist(), *columns, strict=True)}


def capture(split: Split, measured: Mapping[str, Measure], *, shown: int = 6) -> Statistics:
    """Count every part, and sum up what was measured of the training images of each class, by path.

    Only the training part is measured, because the result goes with the model as its reference and must tell nothing
    of the test images; whatever else is in `measured` is left aside. `shown` bounds the images listed for the sample
    grid, each of another group, drawn by content hash, the same every time. Raises `KeyError` where a training image
    was not measured.
    """
    drawn = {label: _draw([e for e in split.of("train") if e.label == label]) for label in LABELS}
    classes = {}
    for label, entries in drawn.items():
        of_class = [entry for entry in split.entries if entry.label == label]
        measures = [measured[entry.path] for entry in entries]
        found = Counter(entry.origin for entry in of_class)
        classes[label] = ClassStatistics(
            images={part: sum(entry.part == part for entry in of_class) for part in PARTS},
            groups={part: len({entry.group for entry in of_class if entry.part == part}) for part in PARTS},
            measured=len(measures),
            sizes=dict(Counter(size for size, _, _, _ in measures).most_common()),
            histogram=_rounded(np.mean([m[1] for m in measures], axis=0) if measures else np.zeros(BINS), 6),
            mean=_mean([m[2] for m in measures]),
            deviation=_mean([m[3] for m in measures]),
            mean_deciles=_deciles([m[2] for m in measures]),
            deviation_deciles=_deciles([m[3] for m in measures]),
            mean_counts=_binned([m[2] for m in measures], 256),
            deviation_counts=_binned([m[3] for m in measures], 128),
            origins={
                origin: _of_origin(origin, of_class, list(zip(entries, measures, strict=True)))
                for origin, _ in found.most_common()
                if origin
            },
        )
    return Statistics(
        version=split.version,
        simulated=split.simulated,
        quarantined=len(split.quarantined),
        classes=classes,
        samples={label: tuple(_unlike(entries)[:shown]) for label, entries in drawn.items()},
    )


def plots(statistics: Statistics, read: Callable[[SplitEntry], bytes]) -> dict[str, bytes]:
    """PNGs by file name: `class_counts`, `intensity`, `samples`; `sizes` and `origins` where images differ in them."""
    made = {
        "class_counts.png": _class_counts(statistics),
        "intensity.png": _intensity(statistics),
        "samples.png": grid(
            {label: [decode(read(entry)) for entry in entries] for label, entries in statistics.samples.items()},
            title="Training images",
            simulated=statistics.simulated,
        ),
    }
    if len({size for each in statistics.classes.values() for size in each.sizes}) > 1:
        made["sizes.png"] = _sizes(statistics)
    if len({origin for each in statistics.classes.values() for origin in each.origins}) > 1:
        made["origins.png"] = _origins(statistics)
    return made


def grid(rows: Mapping[str, Sequence[NDArray[np.uint8]]], *, title: str, simulated: bool) -> bytes:
    """A PNG with one named row of grey images uint8 (H, W) each; images of any size."""
    columns = max((len(images) for images in rows.values()), default=0)
    if columns == 0:
        raise ValueError("a grid needs at least one image")
    side, margin, head = 1.45, 1.25, 0.62  # inches
    figure = Figure(figsize=(margin + columns * side + 0.1, head + len(rows) * side + 0.1), facecolor="white")
    width, height = figure.get_size_inches()
    figure.text(
        0.12 / width, 1 - 0.32 / height, _titled(title, simulated), color=_INK, size=13, weight="bold", va="center"
    )
    for row, (name, images) in enumerate(rows.items()):
        bottom = height - head - (row + 1) * side
        figure.text(0.12 / width, (bottom + side / 2) / height, name, color=_INK, size=11, va="center")
        for column, pixels in enumerate(images):
            box = (margin + column * side, bottom, side - 0.08, side - 0.08)
            axes = figure.add_axes((box[0] / width, box[1] / height, box[2] / width, box[3] / height))
            axes.imshow(pixels, cmap="gray", vmin=0, vmax=255)
            axes.set_facecolor("black")
            axes.set_axis_off()
    return _png(figure)


def _of_origin(origin: str, of_class: list[SplitEntry], measured: list[tuple[SplitEntry, Measure]]) -> OriginStatistics:
    own = [measure for entry, measure in measured if entry.origin == origin]
    return OriginStatistics(
        images={part: sum(e.part == part and e.origin == origin for e in of_class) for part in PARTS},
        measured=len(own),
        mean=_mean([m[2] for m in own]),
        deviation=_mean([m[3] for m in own]),
        sizes=dict(Counter(m[0] for m in own).most_common(20)),
    )


def _mean(values: list[float]) -> float:
    return round(float(np.mean(values)), 3) if values else 0.0


def _binned(values: list[float], end: int) -> tuple[int, ...]:
    counts, _ = np.histogram(np.clip(values, 0, end), bins=32, range=(0, end))
    return tuple(counts.tolist())


def _draw(entries: list[SplitEntry]) -> list[SplitEntry]:
    # A checksum of the hash, not the hash itself: that one orders the groups of the split.
    return sorted(entries, key=lambda entry: (zlib.crc32(entry.sha256.encode()), entry.path))


def _unlike(entries: list[SplitEntry]) -> list[SplitEntry]:
    return list({entry.group: entry for entry in reversed(entries)}.values())[::-1]


def _rounded(values: NDArray[np.float64], digits: int) -> tuple[float, ...]:
    return tuple(round(float(value), digits) for value in values)


def _deciles(values: list[float]) -> tuple[float, ...]:
    return _rounded(np.quantile(values, np.linspace(0, 1, 11)), 3) if values else ()


def _titled(title: str, simulated: bool) -> str:
    return f"{title} (simulated scans)" if simulated else title


def _axes(title: str, statistics: Statistics, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 4.5), facecolor="white", layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    axes = figure.add_subplot()
    axes.set_title(_titled(title, statistics.simulated), loc="left", color=_INK, size=13, weight="bold", pad=14)
    axes.set_xlabel(xlabel, color=_INK)
    axes.set_ylabel(ylabel, color=_INK)
    axes.tick_params(colors=_INK, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)
    axes.set_axisbelow(True)
    return figure, axes


def _class_counts(statistics: Statistics) -> bytes:
    figure, axes = _axes("Images per class and part", statistics, "images; similar ones form a group", "")
    names = list(statistics.classes)[::-1]
    starts = np.zeros(len(names))
    for part in PARTS:
        counts = np.array([statistics.classes[name].images[part] for name in names])
        bars = axes.barh(names, counts, left=starts, color=_PART_COLOURS[part], height=0.62, label=part)
        ink = "white" if part in ("train", "validation") else _INK
        # A number only where the bar is wide enough to hold it.
        largest = max(sum(each.images.values()) for each in statistics.classes.values()) or 1
        axes.bar_label(
            bars, [str(n) if n > 0.035 * largest else "" for n in counts], label_type="center", color=ink, size=9
        )
        starts += counts
    for position, name in enumerate(names):
        groups = sum(statistics.classes[name].groups.values())
        axes.text(starts[position], position, f"  {groups} groups", va="center", color=_INK, size=9)
    axes.set_xlim(0, max(1.0, starts.max()) * 1.14)
    axes.grid(axis="x", color=_FAINT, linewidth=0.8)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(PARTS), frameon=False)
    return _png(figure)


def _origins(statistics: Statistics) -> bytes:
    figure, axes = _axes("Where the images were first published", statistics, "images", "")
    rows = [(f"{name}, {key}", own) for name, each in statistics.classes.items() for key, own in each.origins.items()]
    # Beyond some twenty rows nobody reads the names; the JSON has them all.
    rows = sorted(rows, key=lambda row: -sum(row[1].images.values()))[:20][::-1]
    names, starts = [name for name, _ in rows], np.zeros(len(rows))
    for part in PARTS:
        counts = np.array([own.images[part] for _, own in rows])
        axes.barh(names, counts, left=starts, color=_PART_COLOURS[part], height=0.7, label=part)
        starts += counts
    for position, total in enumerate(starts):
        axes.text(total, position, f"  {int(total)}", va="center", color=_INK, size=9)
    axes.set_xlim(0, max(1.0, starts.max()) * 1.1)
    axes.grid(axis="x", color=_FAINT, linewidth=0.8)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(PARTS), frameon=False)
    return _png(figure)


def _intensity(statistics: Statistics) -> bytes:
    figure, axes = _axes("Grey levels of the training images", statistics, "grey level", "share of pixels")
    levels = np.linspace(0, 256, BINS + 1)
    for name, each in statistics.classes.items():
        axes.stairs(
            each.histogram,
            levels,
            baseline=None,
            color=_COLOURS[name],
            linewidth=1.8,
            label=f"{name} (mean {each.mean:.0f})",
        )
    axes.set_yscale("log")  # the black background holds half of all pixels
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axes.minorticks_off()
    axes.set_xlim(0, 256)
    axes.grid(axis="y", color=_FAINT, linewidth=0.8)
    axes.legend(frameon=False)
    return _png(figure)


def _sizes(statistics: Statistics) -> bytes:
    figure, axes = _axes("Frame sizes of the training images", statistics, "width, pixels", "height, pixels")
    for name, each in statistics.classes.items():
        points = np.array([[int(side) for side in size.split(" x ")] for size in each.sizes]).reshape(-1, 2)
        areas = 18 + 700 * np.array(list(each.sizes.values()), float) / max(1, each.measured)
        axes.scatter(points[:, 0], points[:, 1], s=areas, color=_COLOURS[name], alpha=0.45, linewidth=0, label=name)
    axes.grid(color=_FAINT, linewidth=0.8)
    legend = axes.legend(frameon=False, title="area: share of the class")
    for handle in legend.legend_handles:
        if handle is not None and hasattr(handle, "set_sizes"):
            handle.set_sizes([50])
    return _png(figure)


def _png(figure: Figure) -> bytes:
    # The canvas by hand: pyplot keeps every figure in global state and is not safe in threads.
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()
