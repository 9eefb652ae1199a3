"""Simulated images of other parts of the body, and of heads by other means: what an input gate must learn to refuse.

They are drawn from ellipses, bands and smooth random fields, bent a little, in signals that MRI, CT, X-ray and
ultrasound give to fat, muscle, bone and fluid. Rough sketches, but of the right grain: at the size at which a gate
looks, they have the outlines, layers and textures of the real ones.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from neuroloop.imaging.phantom import smooth_field

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

_SIZE = 128


@dataclass(frozen=True)
class _Signals:
    """Signal of each tissue, 0..1."""

    fat: float
    muscle: float
    organ: float
    cortex: float
    marrow: float
    fluid: float
    air: float
    ct: bool = False


def _signals(generator: np.random.Generator) -> _Signals:
    """T1, T2, fat-saturated MRI or CT, each somewhat different every time."""
    draw = generator.uniform(0, 1, 5)
    match generator.integers(4):
        case 0:
            return _Signals(0.7 + 0.3 * draw[0], 0.25 + 0.2 * draw[1], 0.35 + 0.25 * draw[2], 0.03,
                            0.5 + 0.4 * draw[3], 0.1 + 0.2 * draw[4], 0.01)  # fmt: skip
        case 1:
            return _Signals(0.5 + 0.4 * draw[0], 0.15 + 0.15 * draw[1], 0.25 + 0.25 * draw[2], 0.03,
                            0.4 + 0.4 * draw[3], 0.85 + 0.15 * draw[4], 0.01)  # fmt: skip
        case 2:
            return _Signals(0.05 + 0.25 * draw[0], 0.3 + 0.2 * draw[1], 0.4 + 0.4 * draw[2], 0.03,
                            0.1 + 0.2 * draw[3], 0.5 + 0.5 * draw[4], 0.01)  # fmt: skip
        case _:
            return _Signals(0.25 + 0.2 * draw[0], 0.5 + 0.1 * draw[0], 0.55 + 0.12 * draw[2], 1.0,
                            0.7 + 0.2 * draw[3], 0.45, 0.0, ct=True)  # fmt: skip


class _Sketch:
    """An image in the making: bent and turned coordinates -1..1, the signals, and what has been painted so far."""

    def __init__(self, generator: np.random.Generator, *, bend: float = 0.06, turn: float = 6.0) -> None:
        self.generator, self.signals = generator, _signals(generator)
        rows, columns = np.mgrid[-1 : 1 : _SIZE * 1j, -1 : 1 : _SIZE * 1j]
        angle = math.radians(generator.uniform(-turn, turn))
        x = columns * math.cos(angle) - rows * math.sin(angle)
        y = columns * math.sin(angle) + rows * math.cos(angle)
        bumps = int(generator.integers(2, 5))
        self.x: Floats = x + bend * smooth_field(generator, _SIZE, bumps)
        self.y: Floats = y + bend * smooth_field(generator, _SIZE, bumps)
        self.image: Floats = np.zeros((_SIZE, _SIZE))

    def field(self, low: int, high: int) -> Floats:
        """A smooth random field of about unit variance with `low` to `high` bumps along a side."""
        return smooth_field(self.generator, _SIZE, int(self.generator.integers(low, high)))

    def ellipse(self, centre: tuple[float, float], radii: tuple[float, float], power: float = 2.0) -> Floats:
        """Negative inside, 0 on the edge; a `power` above 2 makes it boxier."""
        across, down = np.abs((self.x - centre[0]) / radii[0]), np.abs((self.y - centre[1]) / radii[1])
        return across**power + down**power - 1

    def paint(self, where: Mask, signal: float) -> None:
        """One flat signal."""
        self.image[where] = signal

    def tissue(self, where: Mask, signal: float, amount: float = 0.12) -> None:
        """A signal with the unevenness of a tissue."""
        texture = 1 + amount * self.field(6, 30) + 0.7 * amount * self.field(30, 70)
        self.image[where] = (signal * texture)[where]

    def bone(self, where: Mask, rim: int = 2) -> None:
        """Cortex around marrow; `rim` in pixels."""
        self.paint(where, self.signals.cortex)
        self.tissue(ndimage.binary_erosion(where, iterations=rim), self.signals.marrow, 0.08)

    def any_of(self, *values: float) -> float:
        """One of the values."""
        return float(self.generator.choice(values))

    def finished(self) -> NDArray[np.uint8]:
        """Blurred, shaded (not in CT), noisy, and stretched to 0..255."""
        return _finished(self.image, self.generator, shaded=not self.signals.ct)


def _finished(image: Floats, generator: np.random.Generator, *, shaded: bool) -> NDArray[np.uint8]:
    image = ndimage.gaussian_filter(image, generator.uniform(0.3, 1.3))
    if shaded:
        image = image * np.exp(generator.uniform(0, 0.35) * smooth_field(generator, len(image), 2))
    real, imaginary = generator.standard_normal((2, *image.shape)) * generator.uniform(0.005, 0.04)
    image = np.hypot(image + real, imaginary)
    white = max(float(np.percentile(image, generator.uniform(98.5, 99.8))), 1e-6)
    return np.clip(np.rint(image * (255 / white)), 0, 255).astype(np.uint8)


def trunk(generator: np.random.Generator) -> NDArray[np.uint8]:
    """Chest, abdomen or pelvis, axial, MRI or CT: uint8 (128, 128)."""
    sketch = _Sketch(generator)
    signals, draw = sketch.signals, generator.uniform
    wide, deep, power = draw(0.75, 0.97), draw(0.5, 0.75), draw(2, 2.8)
    fat = draw(0.02, 0.2)
    skin = sketch.ellipse((0, 0), (wide, deep), power) < 0
    inside = sketch.ellipse((0, -0.04), (wide - fat - 0.08, deep - fat - 0.08), power) < 0
    sketch.paint(skin, signals.fat)
    sketch.tissue(sketch.ellipse((0, 0.02), (wide - fat, deep - fat), power) < 0, signals.muscle)
    sketch.tissue(inside, signals.fat * 0.9)
    (_chest, _abdomen, _pelvis)[generator.integers(3)](sketch, inside, wide, deep)
    _vertebra(sketch, deep * draw(0.38, 0.5))
    for angle in draw(0, 2 * math.pi, int(generator.integers(0, 14))):  # ribs
        at = (wide - fat - 0.05) * math.cos(angle), (deep - fat - 0.05) * math.sin(angle)
        sketch.paint(sketch.ellipse(at, (0.08, 0.03)) < 0, signals.cortex)
    sketch.paint(~skin, 0.0)
    return sketch.finished()


def _chest(sketch: _Sketch, inside: Mask, wide: float, deep: float) -> None:
    signals, draw = sketch.signals, sketch.generator.uniform
    for side in (-1, 1):
        lung = sketch.ellipse((side * wide * 0.45, -0.03), (wide * draw(0.3, 0.38), deep * draw(0.55, 0.72))) < 0
        sketch.paint(lung & inside, signals.air + 0.02)
        sketch.paint(lung & inside & (sketch.field(40, 41) > 1.1), signals.organ * draw(0.3, 0.9))  # vessels
    sketch.tissue((sketch.ellipse((draw(-0.15, 0.1), -0.15), (0.28, 0.26)) < 0) & inside, signals.organ)
    sketch.paint((sketch.ellipse((0.05, -0.12), (0.12, 0.1)) < 0) & inside, 0.75 if signals.ct else signals.fluid)


def _abdomen(sketch: _Sketch, inside: Mask, wide: float, deep: float) -> None:
    signals, draw = sketch.signals, sketch.generator.uniform
    liver = (sketch.ellipse((-wide * 0.42, -0.08), (wide * 0.45, deep * 0.55)) < 0) & inside
    sketch.tissue(liver, signals.organ)
    sketch.paint(liver & (np.abs(sketch.field(14, 15)) < 0.08), signals.fluid * draw(0.3, 1))
    spleen = sketch.ellipse((wide * 0.55, 0.1), (0.18, 0.25)) < 0
    sketch.paint(spleen & inside, signals.organ * draw(0.7, 1.3))
    stomach = sketch.ellipse((wide * 0.35, -0.2), (0.24, 0.16)) < 0
    sketch.paint(stomach & inside, sketch.any_of(signals.air, signals.fluid, signals.organ))
    for side in (-1, 1):
        kidney = sketch.ellipse((side * wide * 0.42, deep * 0.35), (0.13, 0.16)) < 0
        sketch.paint(kidney & inside, min(signals.organ * draw(0.9, 1.6), 1.1))
        sketch.paint((sketch.ellipse((side * wide * 0.36, deep * 0.35), (0.05, 0.07)) < 0) & inside, signals.fluid)
    _bowel(sketch, inside, wide, deep)


def _pelvis(sketch: _Sketch, inside: Mask, wide: float, deep: float) -> None:
    draw = sketch.generator.uniform
    _bowel(sketch, inside, wide, deep)
    sketch.paint((sketch.ellipse((0, -0.15), (draw(0.15, 0.3), draw(0.12, 0.22))) < 0) & inside, sketch.signals.fluid)
    for side in (-1, 1):
        sketch.bone(sketch.ellipse((side * wide * 0.6, 0.05), (0.17, 0.19)) < 0)


def _bowel(sketch: _Sketch, inside: Mask, wide: float, deep: float) -> None:
    signals, draw = sketch.signals, sketch.generator.uniform
    for _loop in range(int(sketch.generator.integers(3, 12))):
        at, radius = (draw(-0.6, 0.6) * wide, draw(-0.7, 0.2) * deep), draw(0.04, 0.12)
        sketch.paint((sketch.ellipse(at, (radius, radius * draw(0.6, 1))) < 0) & inside, signals.muscle)
        content = sketch.any_of(signals.air, signals.fluid, signals.organ)
        sketch.paint((sketch.ellipse(at, (radius * 0.7, radius * 0.5)) < 0) & inside, content)


def _vertebra(sketch: _Sketch, row: float) -> None:
    signals = sketch.signals
    sketch.bone(sketch.ellipse((0, row), (0.15, 0.12)) < 0)
    sketch.paint(sketch.ellipse((0, row + 0.17), (0.07, 0.055)) < 0, signals.fluid)
    sketch.paint(sketch.ellipse((0, row + 0.17), (0.035, 0.03)) < 0, signals.organ)
    for side in (-1, 1):
        sketch.paint(sketch.ellipse((side * 0.12, row + 0.22), (0.12, 0.03)) < 0, signals.cortex)
        sketch.tissue(sketch.ellipse((side * 0.3, row + 0.2), (0.2, 0.12)) < 0, signals.muscle)
    aorta = sketch.any_of(0.02, signals.fluid, 1.0)
    sketch.paint(sketch.ellipse((0.04, row - 0.17), (0.05, 0.05)) < 0, aorta)


def limb(generator: np.random.Generator) -> NDArray[np.uint8]:
    """Thigh, calf, arm or wrist, axial, one or a pair, MRI or CT: uint8 (128, 128)."""
    sketch = _Sketch(generator, turn=40)
    signals, draw = sketch.signals, generator.uniform
    pair = generator.random() < 0.35
    for middle, wide in ((-0.48, 0.44), (0.48, 0.44)) if pair else ((0.0, draw(0.6, 0.95)),):
        deep, fat = wide * draw(0.75, 1.1), draw(0.04, 0.25) * wide
        sketch.paint(sketch.ellipse((middle, 0), (wide, deep)) < 0, signals.fat)
        muscle = sketch.ellipse((middle, 0), (wide - fat, deep - fat)) < 0
        sketch.tissue(muscle, signals.muscle)
        sketch.paint(muscle & (np.abs(sketch.field(4, 9)) < 0.1), signals.fat)  # fasciae
        for _bone in range(int(generator.integers(1, 3))):
            at, radius = (middle + draw(-0.3, 0.3) * wide, draw(-0.3, 0.3) * deep), draw(0.12, 0.5) * wide
            sketch.bone(sketch.ellipse(at, (radius, radius * draw(0.7, 1.1))) < 0, rim=int(generator.integers(2, 6)))
        for _vessel in range(int(generator.integers(0, 5))):
            at = middle + draw(-0.5, 0.5) * wide, draw(-0.5, 0.5) * deep
            sketch.paint(sketch.ellipse(at, (0.04, 0.04)) < 0, sketch.any_of(0.02, 1.0))
    return sketch.finished()


def joint(generator: np.random.Generator) -> NDArray[np.uint8]:
    """Knee, ankle or shoulder from the side: two bone ends that meet, in soft tissue; uint8 (128, 128)."""
    sketch = _Sketch(generator, turn=25)
    signals, draw = sketch.signals, generator.uniform
    side = np.abs(sketch.x)
    half = draw(0.5, 0.9)
    sketch.paint(side < half * (1 + 0.15 * sketch.field(3, 4)), signals.fat)
    muscle = side < half - 0.1
    sketch.tissue(muscle, signals.muscle)
    sketch.paint(muscle & (np.abs(sketch.field(7, 8)) < 0.09), signals.fat)
    gap, wide, middle = draw(-0.15, 0.15), draw(0.25, 0.5), draw(-0.15, 0.15)
    for end in (-1, 1):
        shaft = (np.abs(sketch.x - middle) < wide * 0.6) & (end * (sketch.y - gap) > 0.2)
        sketch.bone(shaft | (sketch.ellipse((middle, gap + end * 0.3), (wide, 0.26), 2.4) < 0), rim=3)
    sketch.paint((np.abs(sketch.y - gap) < 0.03) & (np.abs(sketch.x - middle) < wide), signals.fluid)
    if generator.random() < 0.6:  # a kneecap
        sketch.bone(sketch.ellipse((middle - wide - 0.1, gap - 0.25), (0.09, 0.2)) < 0)
    return sketch.finished()


def spine(generator: np.random.Generator) -> NDArray[np.uint8]:
    """Vertebrae, discs and canal from the side: uint8 (128, 128)."""
    sketch = _Sketch(generator, turn=8, bend=0.03)
    signals, draw = sketch.signals, generator.uniform
    u = sketch.x - draw(-0.25, 0.25) * sketch.y**2 - draw(-0.2, 0.2) * sketch.y - draw(-0.25, 0.15)
    everywhere = np.ones_like(u, bool)
    sketch.tissue(everywhere, signals.muscle, 0.2)
    sketch.paint(u > draw(0.4, 0.7), signals.fat)
    front = u < -0.35
    sketch.tissue(front, signals.organ, 0.4)
    sketch.paint(front & (sketch.field(10, 11) > 0.8), sketch.any_of(0.02, signals.fat, signals.fluid))
    beat = sketch.y * draw(2, 4.5) + draw(0, 1)
    column = np.abs(u) < draw(0.12, 0.2)
    sketch.paint(column, signals.fluid * draw(0.2, 0.8))  # discs
    sketch.tissue(column & (beat % 1 > 0.2), signals.marrow, 0.08)
    sketch.paint(column & (np.abs(beat % 1 - 0.2) < 0.04), signals.cortex)
    sketch.paint(np.abs(u - 0.3) < 0.08, signals.fluid)
    sketch.paint(np.abs(u - 0.3) < 0.04, signals.organ)  # the cord
    sketch.paint((np.abs(u - 0.5) < 0.1) & ((beat + 0.5) % 1 < 0.5), signals.marrow)
    if generator.random() < 0.5:
        sketch.paint(np.abs(sketch.x) > draw(0.75, 1.0), 0.0)
    return sketch.finished()


def x_ray(generator: np.random.Generator) -> NDArray[np.uint8]:
    """A projection of chest, hand, limb or skull, dense is bright, now and then inverted: uint8 (128, 128)."""
    sketch = _Sketch(generator, turn=10, bend=0.03)
    dense = (_chest_shadow, _hand_shadow, _limb_shadow, _skull_shadow)[generator.integers(4)](sketch)
    image = generator.uniform(0, 0.15) + 1 - np.exp(-1.6 * np.clip(dense, 0, None))
    if generator.random() < 0.15:
        image = image.max() - image
    return _finished(image, generator, shaded=False)


def _thickness(shape: Floats) -> Floats:
    """How much of a solid a ray passes, from its outline."""
    return np.sqrt(np.clip(-shape, 0, None))


def _chest_shadow(sketch: _Sketch) -> Floats:
    draw, x, y = sketch.generator.uniform, sketch.x, sketch.y
    dense = 0.9 * _thickness(sketch.ellipse((0, 0.2), (1.05, 1.3), 3))
    for side in (-1, 1):
        dense = dense - draw(0.45, 0.7) * _thickness(sketch.ellipse((side * 0.42, -0.05), (0.33, 0.62)))
        dense = dense + 0.15 * np.exp(-(((y + 0.72 + 0.15 * side * x) / 0.03) ** 2))  # collarbone
    dense = dense + 0.35 * _thickness(sketch.ellipse((0.08, 0.25), (0.3, 0.38))) + 0.35 * np.exp(-((x / 0.08) ** 2))
    for rib in range(9):
        row = -0.75 + rib * 0.17 + 0.25 * x**2 + 0.1 * np.abs(x)
        dense = dense + 0.1 * np.exp(-(((y - row) / 0.025) ** 2)) * (np.abs(x) < 0.85)
    return dense + 0.08 * sketch.field(25, 26) * (dense > 0.2)


def _hand_shadow(sketch: _Sketch) -> Floats:
    draw = sketch.generator.uniform
    dense = 0.25 * _thickness(sketch.ellipse((0, 0.45), (0.42, 0.4), 3))
    x, y = sketch.x, sketch.y
    for angle in np.linspace(-0.5, 0.45, 5) + draw(-0.05, 0.05, 5):
        c, s = math.cos(angle), math.sin(angle)
        for phalanx in range(4):
            reach = 0.05 + 0.27 * (phalanx + 0.5)
            across, along = x - reach * s * 1.6, y - 0.25 + reach * 1.05 * c
            sketch.x, sketch.y = across * c + along * s, along * c - across * s
            dense = dense + 0.12 * _thickness(sketch.ellipse((0, 0), (0.11, 0.17), 3))
            dense = dense + 0.5 * _thickness(sketch.ellipse((0, 0), (0.045, 0.12), 3))
    sketch.x, sketch.y = x, y
    for _carpal in range(8):
        at = draw(-0.2, 0.2), draw(0.35, 0.55)
        dense = dense + 0.25 * _thickness(sketch.ellipse(at, (0.08, 0.08)))
    return dense


def _limb_shadow(sketch: _Sketch) -> Floats:
    generator, draw = sketch.generator, sketch.generator.uniform
    dense = 0.4 * _thickness(sketch.ellipse((0, 0), (draw(0.35, 0.7), 1.4), 4))
    for side in (-1, 1)[: int(generator.integers(1, 3))]:
        dense = dense + 0.7 * _thickness(sketch.ellipse((side * 0.15, 0), (draw(0.1, 0.2), 1.3), 5))
        dense = dense - 0.25 * _thickness(sketch.ellipse((side * 0.15, 0), (0.07, 1.2), 5))
    if generator.random() < 0.7:
        dense = dense + 0.5 * _thickness(sketch.ellipse((0, draw(-0.3, 0.3)), (0.35, 0.25)))
    return dense


def _skull_shadow(sketch: _Sketch) -> Floats:
    vault = sketch.ellipse((0, -0.15), (0.72, 0.72))
    dense = 0.35 * _thickness(vault) + 0.8 * np.exp(-((vault / 0.06) ** 2))
    dense = dense + 0.5 * _thickness(sketch.ellipse((0.2, 0.55), (0.45, 0.35)))
    dense = dense + 0.3 * np.clip(sketch.field(12, 13), 0, 2) * (sketch.ellipse((0.15, 0.4), (0.5, 0.4)) < 0)
    for _vessel in range(6):
        dense = dense + 0.12 * np.exp(-((sketch.field(5, 6) / 0.05) ** 2)) * (vault < 0)
    return dense


def ultrasound(generator: np.random.Generator) -> NDArray[np.uint8]:
    """A sector or a rectangle of speckle with layers and cysts: uint8 (128, 128)."""
    sketch = _Sketch(generator, turn=0, bend=0)
    draw, x, y = generator.uniform, sketch.x, sketch.y
    layers = sketch.field(3, 9) + draw(0, 0.8) * np.sin(y * draw(3, 14) + sketch.field(3, 4))
    echo = np.exp(draw(0.5, 1.1) * layers) * np.exp(-draw(0, 1.2) * (y + 1))
    for _cyst in range(int(generator.integers(0, 5))):
        shape = sketch.ellipse((draw(-0.5, 0.5), draw(-0.6, 0.6)), (draw(0.08, 0.35), draw(0.06, 0.3)))
        echo = np.where(shape < 0, echo * draw(0, 0.2), echo) + np.exp(-((shape / 0.15) ** 2)) * draw(0, 0.8)
    grain = draw(0.8, 2.2), draw(0.4, 1.2)
    real, imaginary = (ndimage.gaussian_filter(part, grain) for part in generator.standard_normal((2, _SIZE, _SIZE)))
    speckle = np.hypot(real, imaginary)
    image = np.log1p(draw(4, 20) * echo * speckle / speckle.mean())
    if generator.random() < 0.7:
        top = draw(1.05, 1.6)
        radius, angle = np.hypot(x, y + top), np.abs(np.arctan2(x, y + top))
        seen = (angle < draw(0.35, 0.75)) & (radius < top + draw(0.7, 0.98)) & (radius > top - draw(0.6, 0.98))
    else:
        seen = (np.abs(x) < draw(0.6, 1)) & (np.abs(y) < draw(0.6, 1))
    image = np.where(seen, image, 0)
    return np.clip(np.rint(image * (255 / max(float(np.percentile(image, 99.5)), 1e-6))), 0, 255).astype(np.uint8)


def head_ct(head: NDArray[np.uint8], generator: np.random.Generator) -> NDArray[np.uint8]:
    """A CT made of an MRI of a head on black, uint8 (s, s) to (s, s): bone around a nearly flat brain.

    Bone is a ring, and in part what is dark in the MRI near the outline, as the base of the skull and the face are;
    some of that is air.
    """
    size = len(head)
    x = head.astype(np.float64) / 255
    mask = ndimage.binary_fill_holes(x > 0.02)
    depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1] / size + 0.006 * smooth_field(
        generator, size, 6
    )
    outer = generator.uniform(0.02, 0.06)
    inner = outer + generator.uniform(0.025, 0.07)
    contrast = generator.uniform(-0.25, 0.25)
    brain = generator.uniform(0.3, 0.6) + contrast * (x - (x[mask].mean() if mask.any() else 0.0))
    scalp = np.where(mask, generator.uniform(0.1, 0.35), 0.0)
    around = np.where((depth > outer) & mask, 1.0, scalp)
    image = np.where(depth > inner, brain, around)
    if generator.random() < 0.6:
        dark = mask & (x < generator.uniform(0.1, 0.25)) & (depth > outer) & (depth < generator.uniform(0.12, 0.35))
        hollow = smooth_field(generator, size, int(generator.integers(4, 12))) > generator.uniform(0.2, 1.5)
        image = np.where(dark, np.where(hollow, 0.0, generator.uniform(0.7, 1.0)), image)
    return _finished(image, generator, shaded=False)


BODY_PARTS: dict[str, Callable[[np.random.Generator], NDArray[np.uint8]]] = {
    "trunk": trunk,
    "limb": limb,
    "joint": joint,
    "spine": spine,
    "x-ray": x_ray,
    "ultrasound": ultrasound,
}
"""What can be drawn from nothing but chance, by name."""
