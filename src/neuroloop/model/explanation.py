"""Where a network looked, and whether that can be believed."""

import functools
from collections.abc import Callable
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.ndimage import distance_transform_edt, gaussian_filter, map_coordinates

from neuroloop.core.schemas import LABELS, NO_TUMOUR, Record
from neuroloop.imaging.canonical import canonicalize, head_box, place
from neuroloop.imaging.phantom import scan

Images = NDArray[np.uint8]
Heat = NDArray[np.float32]

TOLERANCE = 0.05
"""Of the image's width: how far beside the lesion the hottest pixel may lie. A cell of the map is about 1/8 wide."""
_PATCH = 3 / 16
"""Of the width, the patch that `displacement` covers: about a lesion."""
FRESH_SEED = 0xE7
"""Seed of the scans that `check` draws; no build simulates its training scans with it unless told to."""


class Passed(Protocol):
    """What a forward pass gives: `bundle.RawOutputs` and `bundle.Outputs` do."""

    @property
    def logits(self) -> NDArray[np.float32]:
        """(n, classes)."""

    @property
    def cam(self) -> NDArray[np.float32]:
        """(n, h, w, classes)."""


class Pointing(Record):
    """How often the hottest pixel lies on the lesion; shares in 0..1."""

    scans: int = Field(ge=0, description="Scans with a tumour that were looked at")
    shown: float = Field(description="Of them, the share the model calls a tumour; only these have a heat map")
    hits: float = Field(description="Of those shown, the share whose hottest pixel lies in the dilated lesion")
    chance: float = Field(description="The same for a pixel drawn at random from the head")
    per_class: dict[str, float] = Field(description="hits by the lesion's class")
    tolerance: float = Field(description="Dilation of the lesion, share of the width")


class Check(Record):
    """What was found about the heat maps of one network."""

    pointing: Pointing
    randomised_correlation: float = Field(
        description="Mean rank correlation between the maps and those of the same network with shuffled weights; near "
        "0: the maps come from what was learned (Adebayo et al., NeurIPS 2018)"
    )


def heat_map(cam: NDArray[np.floating], class_index: int, size: int, offset: tuple[float, float] = (0.0, 0.0)) -> Heat:
    """The class-activation map of one class, float32 (size, size) in 0..1.

    `cam` (h, w, classes), whose mean over the places is the logit. What speaks for the class beyond the mean of all
    classes is shown, scaled so that the strongest place is 1; all zero where nothing does. The cells are a sixteenth of
    the image or more, so they are interpolated by cubic splines, whose peak may lie between them: on simulated scans
    the hottest pixel hit the lesion in 84 % instead of linear interpolation's 76 %. `offset` (down, right) is how far
    the map lies beside what it speaks of, shares of the width, see `displacement`; it is taken back.
    """
    positive = _positive(cam, class_index)
    if not positive.max() > 0:
        return np.zeros((size, size), np.float32)
    down, across = (
        _interpolation(side, size, round(shift, 4)) for side, shift in zip(positive.shape, offset, strict=True)
    )
    large = np.maximum(down @ (positive / positive.max()) @ across.T, 0.0)
    return np.asarray(large / max(large.max(), 1e-9), np.float32)


def displacement(run: Callable[[Images], Passed], images: Images) -> tuple[float, float]:
    """How far the map of a network lies beside what it responds to: (down, right), shares of the image's width.

    A network whose answer is a mean over places is free to move evidence about on the way there, and those trained here
    do: by half a cell downwards, not sideways, which flipped training images forbid. Measured as by occlusion (Zeiler
    and Fergus, ECCV 2014), without knowing any lesion: patches of `images` (canonical uint8, (n, size, size); 16 or
    more) are smoothed away one at a time, and the centre of what the map of the class loses is compared with the centre
    of the patch, weighted by the loss. (0, 0) where no image is named a tumour.
    """
    size = images.shape[1]
    side, step = max(2, round(_PATCH * size)), max(1, round(_PATCH * size / 2))
    passed = run(images)
    moved, lost = np.zeros(2), 0.0
    for image, logits, cam in zip(images, passed.logits, passed.cam, strict=True):
        named = int(logits.argmax())
        corners = [
            (row, column)
            for row in range(step, size - side - step + 1, step)
            for column in range(step, size - side - step + 1, step)
            if image[row + side // 2, column + side // 2]
        ]
        if named == LABELS.index(NO_TUMOUR) or not corners:
            continue
        inside = (image > 0).astype(np.float64)
        smooth = (
            gaussian_filter(image * inside, side / 2) / np.maximum(gaussian_filter(inside, side / 2), 1e-3) * inside
        )
        covered = np.repeat(image[None], len(corners), axis=0)
        for one, (row, column) in zip(covered, corners, strict=True):
            area = np.s_[row : row + side, column : column + side]
            one[area] = smooth[area]
        loss = np.maximum(_positive(cam, named) - _positive(run(covered).cam, named), 0.0)
        centres = (np.array(corners) + side / 2) / size
        for axis in (0, 1):
            cells = (np.arange(loss.shape[1 + axis]) + 0.5) / loss.shape[1 + axis]
            found = loss.sum(axis=2 - axis) @ cells
            moved[axis] += float((found - loss.sum(axis=(1, 2)) * centres[:, axis]).sum())
        lost += float(loss.sum())
    return (float(moved[0] / lost), float(moved[1] / lost)) if lost > 0 else (0.0, 0.0)


def hit(heat: Heat, lesion: NDArray[np.bool_], tolerance: float = TOLERANCE) -> bool:
    """Whether the hottest pixel of `heat` (H, W) lies within `tolerance` times the width of `lesion` (H, W).

    The pointing game (Zhang et al., Top-down Neural Attention by Excitation Backprop, IJCV 2018). False for a map
    without heat. Raises `ValueError` on an empty lesion.
    """
    if not heat.max() > 0:
        return False
    return bool(_dilated(lesion, tolerance).flat[int(heat.argmax())])


def pointing_game(
    heats: list[Heat | None],
    lesions: list[NDArray[np.bool_]],
    heads: list[NDArray[np.bool_]],
    labels: list[str],
    *,
    tolerance: float = TOLERANCE,
) -> Pointing:
    """The pointing game over n scans with a known lesion.

    `heats[i]` is None where no map is shown; `heads[i]` is where the head is, for the chance level. All of one scan
    have one shape (H, W). Raises `ValueError` on no scan, or a scan without a lesion.
    """
    if not lesions:
        raise ValueError("the pointing game needs at least one scan with a lesion")
    chances, outcomes = [], []
    for heat, lesion, head, label in zip(heats, lesions, heads, labels, strict=True):
        chances.append(float(_dilated(lesion, tolerance)[head].mean()))
        if heat is not None:
            outcomes.append((label, hit(heat, lesion, tolerance)))
    return Pointing(
        scans=len(lesions),
        shown=len(outcomes) / len(lesions),
        hits=_share([one for _, one in outcomes]),
        chance=float(np.mean(chances)),
        per_class={
            label: _share([one for name, one in outcomes if name == label])
            for label in LABELS
            if any(name == label for name, _ in outcomes)
        },
        tolerance=tolerance,
    )


def rank_correlation(one: Heat, other: Heat) -> float:
    """Spearman's correlation of two maps of one shape, in -1..1; 0 where one of them is the same everywhere."""
    from scipy.stats import rankdata  # slow to load, and a server does not need it

    ranks = [rankdata(each.ravel()) for each in (one, other)]
    if any(np.ptp(rank) == 0 for rank in ranks):
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])


def randomised(onnx: bytes, generator: np.random.Generator) -> bytes:
    """The exported network `onnx` with the weights of every layer shuffled: what it learned is gone, its form stays."""
    from onnx import load_from_string, numpy_helper  # slow to load, and a server does not need it

    proto = load_from_string(onnx)
    for tensor in proto.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and values.ndim > 1:
            shuffled = generator.permutation(values.ravel()).reshape(values.shape)
            tensor.CopyFrom(numpy_helper.from_array(shuffled, tensor.name))
    return cast(bytes, proto.SerializeToString())


def check(
    run: Callable[[Images], Passed],
    run_randomised: Callable[[Images], Passed],
    size: int,
    *,
    offset: tuple[float, float] = (0.0, 0.0),
    per_class: int = 50,
    scanner: str = "A",
    seed: int = FRESH_SEED,
) -> Check:
    """Play the pointing game on fresh simulated scans, and compare with the same network `randomised`.

    `run` and `run_randomised` are forward passes of canonical images uint8 (n, size, size); `offset` as in `heat_map`;
    `per_class` scans of each
    tumour class. The map is that of the class the model names, in the frame of the scan: what a reader would see.
    """
    scans = [
        scan(label, index, seed=seed, scanner=scanner)
        for label in LABELS
        if label != NO_TUMOUR
        for index in range(per_class)
    ]
    scans = [one for one in scans if one.lesion.any()]  # a glioma at the brain's edge may be cut away altogether
    images = np.stack([canonicalize(one.pixels, size) for one in scans])
    passed, shuffled = run(images), run_randomised(images)
    heats: list[Heat | None] = []
    heads, correlations = [], []
    for number, one in enumerate(scans):
        named = int(passed.logits[number].argmax())
        small = heat_map(passed.cam[number], named, size, offset)
        if named == LABELS.index(NO_TUMOUR):
            heats.append(None)
        else:
            heats.append(place(small, head_box(one.pixels), one.pixels.shape))
            correlations.append(rank_correlation(small, heat_map(shuffled.cam[number], named, size, offset)))
        everywhere = np.ones((size, size), np.float32) * (images[number] > 0)
        heads.append(place(everywhere, head_box(one.pixels), one.pixels.shape) > 0.5)
    pointing = pointing_game(heats, [one.lesion for one in scans], heads, [one.label for one in scans])
    return Check(pointing=pointing, randomised_correlation=float(np.mean(correlations)) if correlations else 0.0)


def _dilated(lesion: NDArray[np.bool_], tolerance: float) -> NDArray[np.bool_]:
    if not lesion.any():
        raise ValueError("the pointing game needs a lesion, and this mask has none")
    return cast(NDArray[np.bool_], distance_transform_edt(~lesion) <= tolerance * lesion.shape[1])


def _share(outcomes: list[bool]) -> float:
    return float(np.mean(outcomes)) if outcomes else 0.0


def _positive(cam: NDArray[np.floating], class_index: int) -> NDArray[np.floating]:
    """What of `cam` (..., h, w, classes) speaks for the class beyond the mean of all classes: (..., h, w)."""
    return np.maximum(cam[..., class_index] - cam.mean(axis=-1), 0.0)


@functools.lru_cache
def _interpolation(small: int, large: int, shift: float) -> NDArray[np.float64]:
    """The (large, small) matrix of a cubic interpolation between cell centres, read `shift` (share) further on.

    Zero where that is beyond the map.
    """
    at = (np.arange(large) + 0.5) / large + shift
    inside = (at >= 0) & (at <= 1)
    position = np.clip(at * small - 0.5, 0, small - 1)[None]
    columns = [map_coordinates(cell, position, order=3, mode="nearest") for cell in np.eye(small)]
    return np.asarray(np.stack(columns, axis=1) * inside[:, None])
