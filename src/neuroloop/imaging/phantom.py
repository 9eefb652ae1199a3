"""Simulated brain scans: a stand-in for patient data with which the whole platform runs without a download.

Anatomy is the MNI152 2009a average brain (1 mm T1, grey- and white-matter maps) that nilearn carries in its package.
It is skull-stripped, so skull, marrow, scalp, face and neck are added around it from distance fields and ellipsoids.
Each scan bends and tilts the head anew, cuts one slice, renders it from tissue maps in one contrast, adds a lesion that
looks like its class, and ends with bias field, blur and Rician noise. Plane, position and contrast are drawn alike for
every class (but pituitary tumours are only cut where the sella is, so half of all other scans are cut there too):
nothing but the lesion tells the class. Good for exercising software and training loops; no substitute for real scans.
"""

import functools
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from neuroloop.core.errors import NeuroLoopError
from neuroloop.core.schemas import LABELS

Floats = NDArray[np.float64]

PLANES = ("axial", "coronal", "sagittal")


@dataclass(frozen=True)
class Contrast:
    """Signal of each tissue, 0..1, in one kind of image; the last five are what lesions look like in it."""

    csf: float
    gm: float
    wm: float
    fat: float
    marrow: float
    muscle: float
    gland: float
    texture: float  # how the template's T1 detail inside a tissue shows, signed
    necrosis: float
    rim: float
    oedema: float
    meningioma: float
    pituitary: float
    vessel: float
    edge: float  # signal of a thin line around meningioma and pituitary tumour
    edge_width: float = 0.0  # mm, 0 for no line
    bone: float = 0.05  # dark in MRI, the brightest of all in CT


@dataclass(frozen=True)
class Scanner:
    """A way of imaging: which contrasts, and the ranges of its imperfections."""

    name: str
    contrasts: dict[str, tuple[float, Contrast]]  # name -> (share of scans, signals)
    noise: tuple[float, float]  # standard deviation of each complex channel, of full scale
    bias: tuple[float, float]  # amplitude of the log gain over the frame
    blur: tuple[float, float]  # mm, standard deviation
    gamma: tuple[float, float]


@dataclass(frozen=True)
class SimulatedScan:
    """One slice: `pixels` uint8 (H, W) 0..255, `lesion` bool (H, W), all False for notumor."""

    pixels: NDArray[np.uint8]
    label: str
    lesion: NDArray[np.bool_]
    plane: str
    contrast: str
    scanner: str


SCANNERS: dict[str, Scanner] = {
    "A": Scanner(
        name="A",
        contrasts={
            "T1c": (
                0.6,
                Contrast(
                    csf=0.14,
                    gm=0.42,
                    wm=0.56,
                    fat=0.78,
                    marrow=0.50,
                    muscle=0.36,
                    gland=0.62,
                    texture=0.5,
                    necrosis=0.15,
                    rim=1.0,
                    oedema=0.33,
                    meningioma=1.0,
                    pituitary=0.95,
                    vessel=0.75,
                    edge=0.30,
                ),
            ),
            "T2": (
                0.2,
                Contrast(
                    csf=0.80,
                    gm=0.56,
                    wm=0.38,
                    fat=0.55,
                    marrow=0.45,
                    muscle=0.24,
                    gland=0.46,
                    texture=-0.4,
                    necrosis=0.92,
                    rim=0.40,
                    oedema=0.95,
                    meningioma=0.74,
                    pituitary=0.72,
                    vessel=0.15,
                    edge=0.95,
                    edge_width=1.2,
                ),
            ),
            "FLAIR": (
                0.2,
                Contrast(
                    csf=0.10,
                    gm=0.54,
                    wm=0.43,
                    fat=0.55,
                    marrow=0.36,
                    muscle=0.30,
                    gland=0.52,
                    texture=-0.3,
                    necrosis=0.2,
                    rim=0.95,
                    oedema=0.80,
                    meningioma=0.92,
                    pituitary=0.90,
                    vessel=0.15,
                    edge=0.20,
                ),
            ),
        },
        noise=(0.008, 0.028),
        bias=(0.05, 0.22),
        blur=(0.3, 0.8),
        gamma=(0.9, 1.12),
    ),
    # A proton-density contrast on which tumours are bright, and an inversion recovery on which they are dark with a
    # bright edge: on half of its images, what the other scanner's teach about tumours does not hold.
    "B": Scanner(
        name="B",
        contrasts={
            "PD": (
                0.4,
                Contrast(
                    csf=0.45,
                    gm=0.66,
                    wm=0.52,
                    fat=0.62,
                    marrow=0.46,
                    muscle=0.40,
                    gland=0.58,
                    texture=-0.3,
                    necrosis=0.40,
                    rim=0.90,
                    oedema=0.72,
                    meningioma=0.92,
                    pituitary=0.92,
                    vessel=0.15,
                    edge=0.25,
                    edge_width=1.8,
                ),
            ),
            "IR": (
                0.6,
                Contrast(
                    csf=0.80,
                    gm=0.50,
                    wm=0.22,
                    fat=0.34,
                    marrow=0.18,
                    muscle=0.42,
                    gland=0.46,
                    texture=-0.5,
                    necrosis=0.75,
                    rim=0.04,
                    oedema=0.36,
                    meningioma=0.08,
                    pituitary=0.08,
                    vessel=0.10,
                    edge=1.0,
                    edge_width=2.2,
                ),
            ),
        },
        noise=(0.015, 0.035),
        bias=(0.12, 0.25),
        blur=(0.7, 1.1),
        gamma=(0.75, 0.95),
    ),
}
"""The simulated scanners by name. "B" is one that a model trained on "A" has not met."""

_ANATOMY = ("csf", "gm", "wm", "fat", "marrow", "muscle", "gland")  # the signals of healthy tissue
_SELLA = np.array([0.0, 4.0, -31.0])  # mm, MNI: right, anterior, superior


def scan(label: str, index: int, *, seed: int = 0, scanner: str = "A", size: int = 224) -> SimulatedScan:
    """The `index`-th simulated scan of a class: uint8 (size, size), the same for the same arguments in every process.

    `index` and `seed` are not negative; `size` is in pixels, at least 32. Takes some 20 ms, the first call seconds more
    for the template. Raises `NeuroLoopError` on an unknown label or scanner.
    """
    if label not in LABELS or scanner not in SCANNERS:
        raise NeuroLoopError(
            f"No scan of {label!r} on scanner {scanner!r} can be simulated",
            why=f"classes are {', '.join(LABELS)}, scanners {', '.join(SCANNERS)}",
        )
    machine = SCANNERS[scanner]
    generator = np.random.default_rng([seed, index, LABELS.index(label), zlib.crc32(scanner.encode()), size])
    shares = [share for share, _ in machine.contrasts.values()]
    name = str(generator.choice(list(machine.contrasts), p=shares))
    contrast = _jitter(machine.contrasts[name][1], generator)
    view = _view(generator, size, sellar=label == "pituitary" or generator.random() < 0.5)
    bends, paint = _GROW[label](view, generator)
    tissue = _sample(view.points + bends, view.folds)
    image = _render(tissue, contrast, generator)
    _incidental(image, view, tissue, contrast, generator)
    mask = paint(image, tissue, contrast)
    return SimulatedScan(_acquire(image, machine, view.spacing, generator), label, mask, view.plane, name, scanner)


def varied_head(generator: np.random.Generator, *, size: int = 160) -> NDArray[np.uint8]:
    """A slice through a head as any scanner might show it, uint8 (size, size): what an input gate must not refuse.

    Any plane and position, with a lesion or without; mostly in a contrast that no sequence has, for what is common to
    all contrasts is the anatomy; a third skull-stripped, a fifth of the rest fat-saturated.
    """
    machine = list(SCANNERS.values())[generator.integers(len(SCANNERS))]
    contrasts = [contrast for _, contrast in machine.contrasts.values()]
    contrast = contrasts[generator.integers(len(contrasts))]
    if generator.random() < 0.7:
        signals = _any_signals(generator)
        contrast = replace(contrast, texture=float(generator.uniform(-0.5, 0.5)), **signals)
    stripped = generator.random() < 0.35
    if stripped or generator.random() < 0.2:
        contrast = replace(contrast, fat=0.1 * contrast.fat)
    label = LABELS[generator.integers(len(LABELS))]
    view = _view(generator, size, sellar=label == "pituitary" or generator.random() < 0.3)
    bends, paint = _GROW[label](view, generator)
    tissue = _sample(view.points + bends, view.folds)
    image = _render(tissue, contrast, generator)
    _incidental(image, view, tissue, contrast, generator)
    paint(image, tissue, contrast)
    if stripped:
        image *= _inside(tissue.hull - generator.uniform(-1, 2), 1.5)
    return _acquire(image, machine, view.spacing, generator)


def ct_head(generator: np.random.Generator, *, size: int = 160) -> NDArray[np.uint8]:
    """A slice through a head as a CT shows it, uint8 (size, size): bright bone around a brain without much contrast.

    Any plane and position, anything from a brain window to a wide one.
    """
    draw = generator.uniform
    brain, marrow = draw(0.25, 0.65), draw(0.6, 1.0)
    contrast = Contrast(
        csf=brain * draw(0.6, 0.95), gm=brain * draw(1.0, 1.12), wm=brain, fat=brain * draw(0.2, 0.7),
        muscle=brain * draw(0.9, 1.15), marrow=marrow, gland=brain, bone=1.1, texture=0.0,
        necrosis=0, rim=0, oedema=0, meningioma=0, pituitary=0, vessel=0, edge=0,
    )  # fmt: skip
    view = _view(generator, size, sellar=generator.random() < 0.3)
    image = _render(_sample(view.points, view.folds), contrast, generator)
    image = ndimage.gaussian_filter(image, draw(0.3, 0.9) / view.spacing)
    image = np.clip(image + generator.normal(0, draw(0, 0.04), image.shape), 0, draw(0.9, 1.1))
    return np.clip(np.rint(image * 255), 0, 255).astype(np.uint8)


def _any_signals(generator: np.random.Generator) -> dict[str, float]:
    """A signal of each tissue in 0..1, such that grey matter, white matter and fluid can be told apart."""
    while True:
        signals = {name: float(generator.uniform(0.05, 1)) for name in _ANATOMY}
        fluid, grey, white = (signals[name] for name in ("csf", "gm", "wm"))
        if abs(grey - white) > 0.1 and abs(grey - fluid) > 0.2:
            return signals


# --- the template ---------------------------------------------------------------------------------

_STEP = 3  # mm of the grid on which distances are kept; they are smooth
_REACH = (np.array([-126, -150, -150]), np.array([126, 150, 132]))  # mm, the box that holds the whole head


@dataclass(frozen=True)
class _Template:
    tissues: NDArray[np.float32]  # (x, y, z, 3): grey matter, white matter, T1 detail
    origin: Floats  # mm of voxel (0, 0, 0); voxels are 1 mm
    hull: NDArray[np.float32]  # mm outside (+) or inside (-) the smooth hull of the brain, every _STEP mm


@functools.cache
def _template() -> _Template:
    from nilearn import datasets  # takes seconds and is needed by nobody who simulates nothing

    t1_image = datasets.load_mni152_template(resolution=1)
    t1 = np.asarray(t1_image.get_fdata(), dtype=np.float32)
    gm = np.asarray(datasets.load_mni152_gm_template(resolution=1).get_fdata(), dtype=np.float32)
    wm = np.asarray(datasets.load_mni152_wm_template(resolution=1).get_fdata(), dtype=np.float32)
    csf = np.clip(1 - gm - wm, 0, 1)
    # An average brain is blurred; raised to a power and normalised again, its tissue borders become sharp.
    grey, white, fluid = (share**2.2 for share in (gm, wm, csf))
    total = np.maximum(grey + white + fluid, 1e-6)
    detail = np.where(t1 > 0, t1 - (0.62 * gm + 0.84 * wm + 0.35 * csf), 0) * (gm + wm)
    tissues = np.ascontiguousarray(np.stack([grey / total, white / total, detail], axis=-1), dtype=np.float32)
    origin = np.asarray(t1_image.affine, dtype=np.float64)[:3, 3]
    low, high = _REACH
    shape = tuple((high - low) // _STEP + 1)
    brain = np.zeros(shape, dtype=bool)
    at = ((np.argwhere((gm + wm)[::2, ::2, ::2] > 0.4) * 2 + origin - low) / _STEP).round().astype(int)
    brain[tuple(at.T)] = True
    brain = ndimage.binary_fill_holes(ndimage.binary_closing(brain, iterations=4))
    outside, inside = ndimage.distance_transform_edt(~brain), ndimage.distance_transform_edt(brain)
    hull = np.ascontiguousarray(ndimage.gaussian_filter((outside - inside) * _STEP, 1.2), dtype=np.float32)
    return _Template(tissues, origin, hull)


def _trilinear(volume: NDArray[np.float32], at: Floats) -> Floats:
    """Values of a (x, y, z) or (x, y, z, c) volume at voxel positions (n, 3); the border repeats outside."""
    _, ny, nz = volume.shape[:3]
    flat = volume.reshape(len(volume) * ny * nz, -1)
    at = np.clip(at, 0, np.array(volume.shape[:3]) - 1.001)
    base = at.astype(np.int64)
    x, y, z = np.ascontiguousarray((at - base).T)
    start = (base[:, 0] * ny + base[:, 1]) * nz + base[:, 2]
    out = np.zeros((len(at), flat.shape[1]))
    for i, share_x in enumerate((1 - x, x)):
        for j, share_y in enumerate((1 - y, y)):
            share = share_x * share_y
            for k, share_z in enumerate((1 - z, z)):
                out += (share * share_z)[:, None] * np.take(flat, start + ((i * ny + j) * nz + k), axis=0)
    return out


# --- one slice through one head -------------------------------------------------------------------


@dataclass(frozen=True)
class _View:
    plane: str
    points: Floats  # (s, s, 3) mm in the template, where each pixel looks
    folds: Floats  # (s, s, 3) mm added to that inside the brain only: each head folds its own way
    u: Floats  # (s, s) mm to the right of the middle of the frame
    v: Floats  # (s, s) mm below it
    axes: Floats  # (2, 3) how many template mm one mm right, and one mm down, are
    spacing: float  # mm a pixel


@functools.cache
def _spline(size: int, cells: int) -> Floats:
    """Weights (size, cells + 3) of the knots of a uniform cubic B-spline at `size` pixel centres."""
    at = (np.arange(size) + 0.5) / size * cells
    offset = np.abs(at[:, None] - np.arange(-1, cells + 2))
    inner, outer = (4 - 6 * offset**2 + 3 * offset**3) / 6, (2 - offset) ** 3 / 6
    weights: Floats = np.where(offset < 1, inner, np.where(offset < 2, outer, 0.0))
    return weights * 1.44  # keeps the variance of the knots


def smooth_field(generator: np.random.Generator, size: int, cells: int) -> Floats:
    """A smooth random field (size, size) of about unit variance, with about `cells` bumps along a side."""
    weights = _spline(size, cells)
    field: Floats = weights @ generator.standard_normal((cells + 3, cells + 3)) @ weights.T
    return field


def _view(generator: np.random.Generator, size: int, *, sellar: bool) -> _View:
    plane = PLANES[generator.integers(3)]
    draw = generator.uniform(-1, 1, 12)
    if plane == "axial":
        right, down, across, centre = [1, 0, 0], [0, -1, 0], [0, 0, 1], [0, -20, 0]
        position = -30 + 5 * draw[0] if sellar else 18 + 38 * draw[0]
        field = 225.0
    elif plane == "coronal":
        right, down, across, centre = [1, 0, 0], [0, 0, -1], [0, 1, 0], [0, 0, -2]
        position = 4 + 5 * draw[0] if sellar else -10 + 52 * draw[0]
        field = 225.0
    else:
        right, down, across, centre = [0, 1, 0], [0, 0, -1], [1, 0, 0], [0, -14, -10]
        position = 5 * draw[0] if sellar else math.copysign(8 + 42 * abs(draw[0]), draw[0])
        field = 250.0
    field *= 1 + 0.10 * draw[1]
    turn, tilt, slant = np.radians([10 * draw[2], 5 * draw[3], 5 * draw[4]])
    basis = np.array([right, down, across], dtype=np.float64)
    # Tilts turn about the middle of the slice's structures, so that a sellar slice still meets the sella.
    basis = _turn(turn, 2) @ _turn(tilt, 0) @ _turn(slant, 1) @ basis
    scale = np.array([1 + 0.07 * draw[5], 1 + 0.07 * draw[6], 1 + 0.07 * draw[7]])
    pivot = np.where(np.abs(across) == 1, position, _SELLA if sellar else np.array([0.0, -18.0, 8.0]))
    middle = np.array(centre, dtype=np.float64) + np.array([6, 6, 6]) * draw[8:11] * (1 - np.abs(across))
    steps = (np.arange(size) + 0.5) / size - 0.5
    u, v = np.meshgrid(steps * field, steps * field)
    axes = basis[:2] * scale
    # The plane goes through the pivot; the frame's middle lies in it, next to `middle`.
    from_pivot = (middle - pivot) @ np.linalg.pinv(axes)
    points = pivot + (u + from_pivot[0])[..., None] * axes[0] + (v + from_pivot[1])[..., None] * axes[1]
    folds = np.empty_like(points)
    for axis in range(3):
        points[..., axis] += 2.8 * smooth_field(generator, size, 2)
        folds[..., axis] = 1.6 * smooth_field(generator, size, 6) + 0.9 * smooth_field(generator, size, 16)
    return _View(plane, points, folds, u, v, axes, field / size)


def _turn(angle: float, axis: int) -> Floats:
    c, s = math.cos(angle), math.sin(angle)
    i, j = [k for k in range(3) if k != axis]
    matrix = np.eye(3)
    matrix[i, i], matrix[i, j], matrix[j, i], matrix[j, j] = c, -s, s, c
    return matrix


@dataclass(frozen=True)
class _Tissue:
    points: Floats  # (s, s, 3) mm
    hull: Floats  # (s, s) mm outside the hull of the brain
    gm: Floats  # (s, s) share, likewise the next
    wm: Floats
    detail: Floats


def _sample(points: Floats, folds: Floats) -> _Tissue:
    template = _template()
    flat = points.reshape(-1, 3)
    hull = _trilinear(template.hull, (flat - _REACH[0]) / _STEP)[:, 0]
    near = hull < 4
    values = np.zeros((len(flat), 3))
    values[near] = _trilinear(template.tissues, (flat + folds.reshape(-1, 3))[near] - template.origin)
    shape = points.shape[:2]
    gm, wm, detail = (values[:, channel].reshape(shape) for channel in range(3))
    return _Tissue(points, hull.reshape(shape), gm, wm, detail)


def _inside(distance: Floats, width: float = 1.0) -> Floats:
    """A soft step: 1 where a signed distance in mm is negative, 0 where it is positive."""
    return np.clip(0.5 - distance / width, 0.0, 1.0)


def _ellipsoid(points: Floats, centre: Floats | tuple[float, ...], radii: tuple[float, float, float]) -> Floats:
    """About the signed distance in mm from an ellipsoid."""
    squares = sum(((points[..., i] - centre[i]) / radii[i]) ** 2 for i in range(3))
    return (np.sqrt(squares) - 1) * min(radii)


def _merge(one: Floats, other: Floats, width: float = 14.0) -> Floats:
    """The signed distance from a union whose seam is rounded over `width` mm (Quilez's polynomial smooth minimum)."""
    near = np.clip(width - np.abs(one - other), 0, None)
    return np.minimum(one, other) - near * near / (4 * width)


def _paired(points: Floats) -> Floats:
    """Points with left folded onto right, for organs that come twice."""
    folded = points.copy()
    folded[..., 0] = np.abs(folded[..., 0])
    return folded


def _blend(image: Floats, share: Floats, signal: float | Floats) -> None:
    image += share * (signal - image)


def _render(tissue: _Tissue, contrast: Contrast, generator: np.random.Generator) -> Floats:
    """The healthy head: signal 0..1, (s, s)."""
    size = tissue.hull.shape[0]
    points = tissue.points
    table, marrow, scalp = generator.uniform((1.6, 2.0, 3.5), (2.6, 5.0, 7.5))
    fluid = generator.uniform(1.0, 2.5)
    skull = fluid + 2 * table + marrow
    calvaria = tissue.hull - (skull + scalp)
    face = _ellipsoid(points, (0, 30, -56), (73, 68, 62))
    nose = _ellipsoid(points, (0, 94, -52), (14, 18, 22))
    neck = np.maximum((np.hypot(points[..., 0] / 64, (points[..., 1] + 20) / 54) - 1) * 54, points[..., 2] + 40)
    head = _merge(_merge(_merge(calvaria, face), neck), nose)

    knots = np.cumsum([0.0, fluid, 0.6, table, 0.8, marrow, 0.8, table, 0.8])
    csf, bone, inner = contrast.csf, contrast.bone, contrast.marrow
    layers = [csf, csf, bone, bone, inner, inner, bone, bone, contrast.fat]
    shell = np.interp(tissue.hull, knots, layers)
    soft = contrast.muscle * (1 + 0.22 * smooth_field(generator, size, 16) + 0.15 * smooth_field(generator, size, 40))
    soft = soft + (contrast.fat - soft) * np.clip(smooth_field(generator, size, 12) - 0.9, 0, 1)
    beyond = np.where(head > -scalp, contrast.fat, soft)
    over = (tissue.hull < knots[-1] + scalp) & (points[..., 2] > -20)
    outside = np.where(tissue.hull < knots[-1], shell, np.where(over, contrast.fat, beyond))
    below = (tissue.hull > fluid) & (head < 1)
    outside[below] = _face(points[below], outside[below], contrast)

    rest = np.clip(1 - tissue.gm - tissue.wm, 0, 1)
    image = tissue.gm * contrast.gm + tissue.wm * contrast.wm + rest * outside
    image += contrast.texture * tissue.detail + 0.012 * smooth_field(generator, size, 60) * (1 - rest)
    gland = _ellipsoid(points, _SELLA + np.array([0, 0, -4]), tuple(generator.uniform((5, 3.5, 2.5), (8, 5.5, 4.5))))
    bed = _ellipsoid(points, _SELLA + np.array([0, 1, -6]), (11, 8, 6))
    _blend(image, _inside(bed, 2.0) * (1 - tissue.wm), 0.10)
    _blend(image, _inside(gland), contrast.gland)
    return image * _inside(head, 1.5)


def _face(points: Floats, signal: Floats, contrast: Contrast) -> Floats:
    """Paint what lies below and before the brain over the signal (n,) at points (n, 3) mm; later covers earlier."""
    air, bone = 0.02, contrast.bone + 0.01
    folded = _paired(points)
    cord = np.hypot(points[..., 0], points[..., 1] + 44 + 0.05 * (points[..., 2] + 70))
    low = _inside(points[..., 2] + 68, 3.0)
    disc = np.cos(points[..., 2] * (2 * np.pi / 17))
    spine = _inside(np.maximum(_ellipsoid(points, (0, -28, -110), (13, 9, 45)), 9 - cord))
    painted = (
        (_inside(_ellipsoid(folded, (34, 46, -39), (20, 26, 17))), contrast.fat),  # orbit
        (_inside(_ellipsoid(folded, (34, 60, -39), (13, 13, 13))), bone),  # sclera, as dark as bone
        (_inside(_ellipsoid(folded, (34, 60, -39), (12, 12, 12))), contrast.csf),  # vitreous
        (_inside(_ellipsoid(points, (0, -7, -52), (15, 8, 18))), contrast.marrow),  # clivus
        (_inside(_ellipsoid(points, (0, 22, -45), (13, 12, 9))), air),  # sphenoid sinus
        (_inside(_ellipsoid(folded, (29, 44, -68), (13, 17, 16))), air),  # maxillary sinus
        (_inside(_ellipsoid(folded, (8, 52, -58), (6, 30, 20))), air),  # nasal cavity
        (_inside(_ellipsoid(folded, (44, -22, -44), (17, 10, 9))), bone),  # petrous bone
        (_inside(_ellipsoid(points, (0, 42, -92), (24, 30, 17))), contrast.muscle * 1.25),  # tongue
        (_inside(_ellipsoid(points, (0, 4, -92), (9, 6, 34))), air),  # pharynx
        (_inside(_ellipsoid(points, (0, 54, -78), (26, 24, 4))), bone),  # palate
        (spine, contrast.marrow),
        (spine * _inside(disc + 0.75, 0.3), bone),
        (_inside(cord - 10) * low, contrast.csf),
        (_inside(cord - 6) * low, contrast.wm),
    )
    for share, value in painted:
        signal = signal + share * (value - signal)
    return signal


def _incidental(
    image: Floats, view: _View, tissue: _Tissue, contrast: Contrast, generator: np.random.Generator
) -> None:
    """What any head may have: vessels, the sagittal sinus, small spots in white matter. Alike for every class."""
    sinus = np.hypot(tissue.points[..., 0] / 4.5, (tissue.hull + 1) / 3.5) - 1
    _blend(image, _inside(sinus * 3.5) * (tissue.points[..., 2] > 0) * generator.uniform(0.2, 0.7), contrast.vessel)
    rows, columns = np.nonzero((tissue.hull < -2) & (tissue.gm < 0.5))
    for spot in range(int(generator.integers(0, 4))):
        if len(rows) == 0:
            break
        pick = int(generator.integers(len(rows)))
        top, left = max(rows[pick] - 4, 0), max(columns[pick] - 4, 0)
        around = np.s_[top : top + 9, left : left + 9]
        distance = np.hypot(view.u[around] - view.u[0, columns[pick]], view.v[around] - view.v[rows[pick], 0])
        radius = generator.uniform(0.8, 1.7)
        signal = contrast.oedema if spot % 2 else contrast.vessel
        _blend(image[around], _inside(distance - radius) * generator.uniform(0.4, 1), signal)


# --- lesions --------------------------------------------------------------------------------------

Paint = Callable[[Floats, _Tissue, Contrast], NDArray[np.bool_]]
"""Adds a lesion to an image (s, s) in place, given the tissue there; returns its mask."""


def _outline(view: _View, centre: tuple[float, float], radius: float, wave: Floats) -> Floats:
    """About the signed distance in mm from a closed curve with the Fourier terms `wave` (cos, sin), from the second."""
    du, dv = view.u - centre[0], view.v - centre[1]
    angle = np.arctan2(dv, du)
    turn = np.linspace(-np.pi, np.pi, 181)
    orders = np.arange(2, 2 + len(wave))[:, None]
    edge = radius * (1 + wave[:, 0] @ np.cos(orders * turn) + wave[:, 1] @ np.sin(orders * turn))
    return np.hypot(du, dv) - np.interp(angle, turn, edge)


def _push(view: _View, centre: tuple[float, float], radius: float, strength: float) -> Floats:
    """Where each pixel looks instead, (s, s, 3) mm, when a mass has shoved tissue outward."""
    du, dv = view.u - centre[0], view.v - centre[1]
    distance = np.hypot(du, dv) + 1e-6
    shove = -strength * radius * np.exp(-((distance / (2.2 * radius)) ** 2)) * np.minimum(distance / radius, 1)
    return (shove / distance)[..., None] * (du[..., None] * view.axes[0] + dv[..., None] * view.axes[1])


def _pick(view: _View, weight: Callable[[_Tissue], Floats], generator: np.random.Generator) -> tuple[float, float]:
    """A random place (u, v) in the frame, drawn by a weight of the tissue there."""
    thin = slice(None, None, 4)
    weights = weight(_sample(view.points[thin, thin], view.folds[thin, thin])).ravel()
    if weights.sum() == 0:
        weights = np.exp(-((view.u[thin, thin] ** 2 + view.v[thin, thin] ** 2) / 500)).ravel()
    place = int(generator.choice(len(weights), p=weights / weights.sum()))
    return float(view.u[thin, thin].ravel()[place]), float(view.v[thin, thin].ravel()[place])


def _distance(points: Floats, place: Floats) -> Floats:
    offset = points - place
    distance: Floats = np.sqrt(np.einsum("...i,...i", offset, offset))
    return distance


def _glioma(view: _View, generator: np.random.Generator) -> tuple[Floats, Paint]:
    """In the white matter, irregular: a necrotic core in a bright rim, oedema along the fibres around it."""

    def weight(tissue: _Tissue) -> Floats:
        return tissue.wm * (tissue.hull < -10) * (tissue.points[..., 2] > -45) * (np.abs(tissue.points[..., 0]) > 6)

    centre = _pick(view, weight, generator)
    radius, rim = generator.uniform((10, 3.0), (25, 6.0))
    spread, strength, solid = generator.uniform((5, 0.1, 0), (16, 0.35, 1))
    size = view.u.shape[0]
    rough = 0.12 * radius * smooth_field(generator, size, 26)
    wave = generator.normal(0, 0.10, (5, 2)) / np.arange(1, 6)[:, None]
    mass = _outline(view, centre, radius, wave) + rough
    core = _outline(view, centre, radius - rim, wave + generator.normal(0, 0.03, (5, 2))) + 1.4 * rough
    halo = _outline(view, centre, radius + spread, generator.normal(0, 0.12, (5, 2))) + 3 * smooth_field(
        generator, size, 10
    )
    faint = generator.uniform(0.75, 1.0)
    mottle = 0.10 * smooth_field(generator, size, 34)

    def paint(image: Floats, tissue: _Tissue, contrast: Contrast) -> NDArray[np.bool_]:
        brain = _inside(tissue.hull + 1, 2.0)
        _blend(image, _inside(halo, 6.0) * brain * (0.25 + 0.75 * tissue.wm) * 0.9, contrast.oedema)
        rim_signal = contrast.gm + faint * (contrast.rim - contrast.gm)
        _blend(image, _inside(mass, 2.5) * brain, rim_signal * (1 + mottle))
        heart = contrast.necrosis if solid > 0.15 else rim_signal * 0.6 + contrast.oedema * 0.4
        _blend(image, _inside(core, 3.0) * brain, heart * (1 + mottle))
        return (mass < 0) & (tissue.hull < 0)

    return _push(view, centre, radius, strength), paint


def _meningioma(view: _View, generator: np.random.Generator) -> tuple[Floats, Paint]:
    """On the inner skull or the falx, round, homogeneous, bright, often with a tail along the dura."""

    def weight(tissue: _Tissue) -> Floats:
        x, z = tissue.points[..., 0], tissue.points[..., 2]
        skull = (np.abs(tissue.hull + 1) < 2.5) & (z > -42)
        falx = (np.abs(x) < 2.5) & (z > 22) & (tissue.hull < -8) & (tissue.gm + tissue.wm < 0.9)
        return (skull + 0.5 * falx) * (_distance(tissue.points, _SELLA) > 26)

    base = _pick(view, weight, generator)
    radius, sink, strength = generator.uniform((11, 0.35, 0.15), (24, 0.75, 0.4))
    inward = math.atan2(-base[1], -base[0]) + generator.normal(0, 0.15)
    centre = (base[0] + sink * radius * math.cos(inward), base[1] + sink * radius * math.sin(inward))
    wave = generator.normal(0, 0.035, (4, 2))
    mass = _outline(view, centre, radius, wave)
    faint, tail, swelling = generator.uniform((0.75, 0, 0), (1.0, 1, 1))
    halo = _outline(view, centre, radius + generator.uniform(3, 10), generator.normal(0, 0.1, (4, 2)))
    mottle = 0.025 * smooth_field(generator, view.u.shape[0], 24)

    def paint(image: Floats, tissue: _Tissue, contrast: Contrast) -> NDArray[np.bool_]:
        within = _inside(tissue.hull - 1.5, 1.0)
        if swelling > 0.75:
            _blend(image, _inside(halo, 5.0) * _inside(tissue.hull + 1, 2.0) * tissue.wm * 0.8, contrast.oedema)
        if tail > 0.4:
            along = np.exp(-((np.maximum(mass, 0) / (0.6 * radius)) ** 2))
            _blend(image, along * _inside(np.abs(tissue.hull - 0.5) - 1.2) * 0.8, contrast.meningioma)
        if contrast.edge_width:
            _blend(image, _inside(mass - contrast.edge_width) * within, contrast.edge)
        signal = contrast.gm + faint * (contrast.meningioma - contrast.gm)
        _blend(image, _inside(mass) * within, signal * (1 + mottle))
        return (mass < 0) & (tissue.hull < 1.5)

    return _push(view, centre, radius, strength), paint


def _pituitary(view: _View, generator: np.random.Generator) -> tuple[Floats, Paint]:
    """In the sella, midline, smooth, growing upward, sometimes waisted by the diaphragm or cystic."""
    wide, deep, high, rise = generator.uniform((9, 8, 9, 0), (16, 14, 16, 1))
    centre = _SELLA + np.array([generator.normal(0, 1.2), generator.normal(0, 1.0), high * 0.45 - 4])
    gap = view.points.reshape(-1, 3)[np.argmin(_distance(view.points, centre))] - centre
    reach = float(np.linalg.norm(gap))
    if reach > 2.5:  # the slice is to cut the tumour, not to graze it
        centre = centre + gap * (1 - 2.5 / reach)
    lower = _ellipsoid(view.points, centre, (wide, deep, high))
    upper = _ellipsoid(view.points, centre + np.array([0, 0, 0.9 * high]), (0.75 * wide, 0.75 * deep, 0.7 * high))
    mass = np.minimum(lower, upper) if rise > 0.5 else lower
    mass = mass + 0.06 * wide * smooth_field(generator, view.u.shape[0], 18)
    faint, cyst, strength = generator.uniform((0.7, 0, 0.1), (1.0, 1, 0.3))
    hollow = centre + np.array([generator.normal(0, 2), 0, 0.3 * high])
    pocket = _ellipsoid(view.points, hollow, (0.4 * wide, 0.5 * deep, 0.35 * high))
    mottle = 0.04 * smooth_field(generator, view.u.shape[0], 30)
    flat = (centre - view.points[0, 0]) @ np.linalg.pinv(view.axes)

    def paint(image: Floats, tissue: _Tissue, contrast: Contrast) -> NDArray[np.bool_]:
        if contrast.edge_width:
            _blend(image, _inside(mass - contrast.edge_width), contrast.edge)
        signal = contrast.gm + faint * (contrast.pituitary - contrast.gm)
        _blend(image, _inside(mass, 1.2), signal * (1 + mottle))
        if cyst > 0.75:
            _blend(image, _inside(pocket, 1.5), contrast.necrosis)
        return mass < 0

    middle = (float(flat[0] + view.u[0, 0]), float(flat[1] + view.v[0, 0]))
    return _push(view, middle, max(wide, high), strength), paint


def _healthy(view: _View, generator: np.random.Generator) -> tuple[Floats, Paint]:
    """Nothing but what any head may have."""

    def paint(image: Floats, tissue: _Tissue, contrast: Contrast) -> NDArray[np.bool_]:
        return np.zeros(image.shape, dtype=bool)

    return np.zeros_like(view.points), paint


_GROW: dict[str, Callable[[_View, np.random.Generator], tuple[Floats, Paint]]] = {
    "glioma": _glioma,
    "meningioma": _meningioma,
    "notumor": _healthy,
    "pituitary": _pituitary,
}


# --- the machine ----------------------------------------------------------------------------------


def _jitter(contrast: Contrast, generator: np.random.Generator) -> Contrast:
    """The same contrast as set on another day: each anatomical signal within some 8 %."""
    factors = generator.normal(1, 0.05, len(_ANATOMY)).clip(0.88, 1.12)
    return replace(
        contrast, **{name: getattr(contrast, name) * float(f) for name, f in zip(_ANATOMY, factors, strict=True)}
    )


def _acquire(image: Floats, machine: Scanner, spacing: float, generator: np.random.Generator) -> NDArray[np.uint8]:
    size = image.shape[0]
    image = np.clip(image, 0, 1.2) ** generator.uniform(*machine.gamma)
    image = image * np.exp(generator.uniform(*machine.bias) * smooth_field(generator, size, 2))
    image = ndimage.gaussian_filter(image, generator.uniform(*machine.blur) / spacing)
    spread = generator.uniform(*machine.noise)
    real, imaginary = generator.standard_normal((2, size, size)) * spread
    image = np.hypot(image + real, imaginary)  # Rician, as the magnitude of a complex signal (Gudbjartsson 1995)
    full = generator.uniform(200, 265) / np.percentile(image[::2, ::2], 99.5)  # few pixels saturate, if any
    return np.clip(np.rint(image * full), 0, 255).astype(np.uint8)
