"""How much a model loses on images that a worse scanner, a restless patient or a re-saved file would give.

The stressors act on canonical images, after the head has been cut out and its greys stretched: what the canonical form
would take away again in part (a tilted box, a changed contrast) stays here, so the drops are upper bounds. Around the
head, where the canonical form leaves nothing, it stays black.

| stressor | mild | strong | origin |
| --- | --- | --- | --- |
| `noise` | Rician, sigma 3 % of the range | 9 % | BrainWeb's 3 and 9 % noise (Kwan et al., IEEE TMI 1999) |
| `blur` | Gaussian, 3 mm wide at half maximum | 6 mm | thick slices and motion, in a head of 190 mm |
| `bias` | receive field within +-10 % | +-20 % | BrainWeb's 20 and 40 % non-uniformity |
| `contrast` | gamma 1.25 or its inverse | 1.6 or its inverse | window settings of exported images |
| `rotation` | 10 degrees either way | 20 degrees | a tilted head |
| `scale` | larger or smaller by 10 % | 20 % | a head box set too tight or too wide |
| `jpeg` | quality 50 | 20 | images saved once more on their way |
"""

import io
import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from sklearn.metrics import f1_score

from neuroloop.imaging.canonical import MARGIN

Images = NDArray[np.uint8]
Greys = NDArray[np.floating]
Integers = NDArray[np.integer]

MOST_IMAGES = 600
"""A larger set is subsampled: seven stressors at two levels are 14 passes over it, and 600 images still show a drop of
two points."""
LEVELS = ("mild", "strong")
_HEAD_MM = 190.0  # length of an adult head, the longer side of the canonical frame but for its margins


def suite(
    predict: Callable[[Images], NDArray[np.floating]],
    images: Images,
    labels: Integers,
    generator: np.random.Generator,
    *,
    groups: Integers | None = None,
    most: int = MOST_IMAGES,
) -> dict[str, dict[str, float]]:
    """Accuracy and macro-F1 of `predict` under each of `STRESSORS`, and what they lose against `clean`.

    `predict` maps canonical uint8 (n, s, s) to probabilities (n, classes); `images` uint8 (n, s, s), `labels` (n,),
    `groups` (n,) of twins. At most `most` images are used, each class with its share and as many unlike ones as there
    are. Keys of `clean`: accuracy, macro_f1, images; of a stressor: <level>_accuracy, <level>_macro_f1 for each of
    `LEVELS`, and drop and accuracy_drop, the loss in macro-F1 and accuracy at the strong level (below 0 where it
    helps). The same generator state gives the same result. Raises `ValueError` on an empty set.
    """
    if len(labels) == 0:
        raise ValueError("nothing to stress: the set has no image")
    chosen = _chosen(labels, np.arange(len(labels)) if groups is None else groups, most, generator)
    images, labels = images[chosen], np.asarray(labels)[chosen]
    clean = _scores(predict(images), labels)
    result = {"clean": {**clean, "images": float(len(labels))}}
    for (name, stressor), own in zip(STRESSORS.items(), generator.spawn(len(STRESSORS)), strict=True):
        scores: dict[str, float] = {}
        for level, severity in zip(LEVELS, SEVERITIES[name], strict=True):
            last = _scores(predict(stressor(images, severity, own)), labels)
            scores |= {f"{level}_{score}": value for score, value in last.items()}
        scores |= {"drop": clean["macro_f1"] - last["macro_f1"], "accuracy_drop": clean["accuracy"] - last["accuracy"]}
        result[name] = scores
    return result


def noise(images: Images, sigma: float, generator: np.random.Generator) -> Images:
    """Rician noise, the noise of magnitude images: `sigma` is a share of 255 in each of the two channels."""
    real, imaginary = (generator.normal(0, sigma * 255, images.shape) for _ in range(2))
    return _finished(np.hypot(images + real, imaginary), images)


def blur(images: Images, width: float, generator: np.random.Generator) -> Images:
    """A Gaussian `width` mm wide at half its maximum, in a head of 190 mm within the frame's margins. Draws nothing."""
    pixels_a_mm = images.shape[1] / (1 + 2 * MARGIN) / _HEAD_MM
    sigma = width / math.sqrt(8 * math.log(2)) * pixels_a_mm
    return _finished(ndimage.gaussian_filter(images.astype(np.float32), (0, sigma, sigma)), images)


def bias(images: Images, amplitude: float, generator: np.random.Generator) -> Images:
    """A smooth field between 1 - `amplitude` and 1 + `amplitude`, one a image: a random polynomial of degree 2."""
    axis = np.linspace(-1, 1, images.shape[1], dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    terms = np.stack([x, y, x * y, x * x, y * y])
    field = np.tensordot(generator.normal(size=(len(images), len(terms))).astype(np.float32), terms, 1)
    low, high = field.min(axis=(1, 2), keepdims=True), field.max(axis=(1, 2), keepdims=True)
    return _finished(images * (1 + amplitude * (2 * (field - low) / (high - low) - 1)), images)


def contrast(images: Images, gamma: float, generator: np.random.Generator) -> Images:
    """Greys to the power of `gamma` or, with even odds, of its inverse; black and white stay."""
    exponents = gamma ** generator.choice([-1.0, 1.0], (len(images), 1, 1))
    return _finished(255 * (images / np.float32(255)) ** exponents.astype(np.float32), images)


def rotation(images: Images, degrees: float, generator: np.random.Generator) -> Images:
    """Turned about the centre by `degrees` to either side."""
    turns = np.radians(degrees) * generator.choice([-1.0, 1.0], len(images))
    cos, sin = np.cos(turns), np.sin(turns)
    return _moved(images, np.stack([np.stack([cos, -sin], axis=-1), np.stack([sin, cos], axis=-1)], axis=-2))


def scale(images: Images, share: float, generator: np.random.Generator) -> Images:
    """Larger or, with even odds, smaller by `share`; a larger head loses its rim."""
    factors = 1 + share * generator.choice([-1.0, 1.0], len(images))
    return _moved(images, np.eye(2) / factors[:, None, None])


def jpeg(images: Images, quality: float, generator: np.random.Generator) -> Images:
    """Saved as JPEG at `quality` (1..95) and read again. Draws nothing."""

    def saved(pixels: Images) -> Images:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=round(quality))
        return np.asarray(Image.open(buffer))

    return _finished(np.stack([saved(pixels) for pixels in images]).astype(np.float32), images)


STRESSORS: Mapping[str, Callable[[Images, float, np.random.Generator], Images]] = {
    "noise": noise,
    "blur": blur,
    "bias": bias,
    "contrast": contrast,
    "rotation": rotation,
    "scale": scale,
    "jpeg": jpeg,
}
"""name -> a function of images uint8 (n, s, s), a severity and a generator, to images of the same kind."""
SEVERITIES: Mapping[str, tuple[float, float]] = {
    "noise": (0.03, 0.09),
    "blur": (3.0, 6.0),
    "bias": (0.10, 0.20),
    "contrast": (1.25, 1.6),
    "rotation": (10.0, 20.0),
    "scale": (0.10, 0.20),
    "jpeg": (50.0, 20.0),
}
"""name -> mild and strong; units and origins stand in the table above."""


def _finished(greys: Greys, images: Images) -> Images:
    """As uint8, black where `images` has no head."""
    kept = np.stack([ndimage.binary_fill_holes(pixels > 0) for pixels in images])
    return np.where(kept, np.clip(np.rint(greys), 0, 255), 0).astype(np.uint8)


def _moved(images: Images, matrices: NDArray[np.float64]) -> Images:
    """Each image under the inverse of its 2x2 matrix (n, 2, 2) about the centre, bilinearly; black from outside."""
    size = images.shape[1]
    out = np.empty_like(images)
    for number, (pixels, matrix) in enumerate(zip(images, matrices, strict=True)):
        offset = np.full(2, size / 2) - matrix @ np.full(2, size / 2)  # pixel centres lie at +0.5
        data = np.column_stack([matrix, offset]).ravel().tolist()
        moved = Image.fromarray(pixels).transform((size, size), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)
        out[number] = np.asarray(moved)
    return out


def _chosen(labels: Integers, groups: Integers, most: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Positions of at most `most` images in order: each class with its share; of each group one before any other."""
    if len(labels) <= most:
        return np.arange(len(labels))
    order = generator.permutation(len(labels))
    rank = np.empty(len(labels), np.int64)  # 0 for the first image of its group in this order, then 1, ...
    for group in np.unique(groups):
        own = order[groups[order] == group]
        rank[own] = np.arange(len(own))
    order = order[np.argsort(rank[order], kind="stable")]
    chosen = []
    for label in np.unique(labels):
        own = order[labels[order] == label]
        chosen.append(own[: max(most * len(own) // len(labels), 1)])
    return np.sort(np.concatenate(chosen))


def _scores(probabilities: NDArray[np.floating], labels: Integers) -> dict[str, float]:
    predicted = np.argmax(probabilities, axis=1)
    macro_f1 = f1_score(labels, predicted, average="macro", zero_division=0)
    return {"accuracy": float((predicted == labels).mean()), "macro_f1": float(macro_f1)}
