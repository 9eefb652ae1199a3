"""What the input gate learns from: brains as other scanners would show them, and images that are no brain MRI.

The other images are made here, or cropped from the sample photographs inside the scikit-image, scikit-learn and
matplotlib packages: nothing needs a download, and nothing is of a patient.
"""

import functools
import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from neuroloop.imaging import anatomy
from neuroloop.imaging.canonical import canonicalize
from neuroloop.imaging.phantom import ct_head, smooth_field, varied_head

Images = NDArray[np.uint8]
Floats = NDArray[np.float64]


# --- varied brains ------------------------------------------------------------------------------


def widen(brains: Images, generator: np.random.Generator) -> Images:
    """Each canonical brain in another contrast, as another scanner or sequence might show it; uint8 (n, s, s)."""
    return np.stack([_widen_one(pixels, generator) for pixels in brains])


def _widen_one(pixels: Images, generator: np.random.Generator) -> Images:
    size = len(pixels)
    x = pixels.astype(np.float64) / 255
    mask = ndimage.binary_fill_holes(x > 0.02)
    if generator.random() < 0.35:  # skull-stripping, roughly: the rim goes
        depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
        mask &= depth > generator.uniform(0.04, 0.13) * size
        if mask.mean() < 0.05:
            mask = ndimage.binary_fill_holes(x > 0.02)
    curve = generator.integers(4)
    if curve == 0:
        x = x ** math.exp(generator.uniform(-0.7, 0.7))
    elif curve == 1:  # a T2 of a T1: what was dark is bright; air stays black
        x = np.where(x > 0.05, (1.05 - x) ** math.exp(generator.uniform(-0.3, 0.7)), x)
    elif curve == 2:  # any smooth curve of greys, as tissue contrasts differ between sequences
        knots = np.r_[0.0, generator.uniform(0, 1, 4)]
        x = np.interp(x, np.linspace(0, 1, 5), knots)
    if generator.random() < 0.5:  # bias field of a surface coil
        y, z = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
        a, b, c = generator.uniform(-0.35, 0.35, 3)
        x = x * np.exp(a * y + b * z + c * y * z)
    if generator.random() < 0.4:
        x = ndimage.gaussian_filter(x, generator.uniform(0.3, 1.3) * size / 128)
    if generator.random() < 0.25:
        x = _echo_planar(x, mask, generator)
    x = x + generator.normal(0, generator.uniform(0, 0.06), x.shape)
    x = np.where(mask, np.maximum(x, 0.02), 0)
    turned = Image.fromarray(_grey(x * 220)).rotate(generator.uniform(-15, 15), Image.Resampling.BILINEAR)
    flipped = np.asarray(turned)[:, :: -1 if generator.random() < 0.5 else 1]
    return canonicalize(np.ascontiguousarray(flipped), size)


def _echo_planar(x: Floats, mask: NDArray[np.bool_], generator: np.random.Generator) -> Floats:
    """As functional and diffusion MRI show it: few large voxels, and signal lost where air is near."""
    size = len(x)
    side = int(size * generator.uniform(0.3, 0.65))
    coarse = np.asarray(Image.fromarray(x.astype(np.float32)).resize((side, side), Image.Resampling.BOX))
    x = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BILINEAR)).astype(np.float64)
    depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1] / size
    lost = (smooth_field(generator, size, 3) > generator.uniform(0.5, 1.5)) & (depth < generator.uniform(0.05, 0.25))
    return x * (1 - generator.uniform(0.3, 1) * ndimage.gaussian_filter(lost * 1.0, 0.02 * size))


def render(count: int, size: int, generator: np.random.Generator) -> Images:
    """Canonical simulated heads in any contrast and plane, some skull-stripped: uint8 (count, size, size)."""
    return np.stack([canonicalize(varied_head(generator), size) for _ in range(count)])


# --- images that are no brain -------------------------------------------------------------------


class Material(NamedTuple):
    """What some images are made of."""

    brains: Images
    """(n, s, s)"""
    scenes: tuple[Images, ...]
    textures: tuple[Images, ...]
    """Grey photographs (H, W)"""


def make(kind: str, brains: Images, count: int, generator: np.random.Generator, *, aside: bool = False) -> Images:
    """`count` canonical images uint8 (count, s, s) of a `kind` of the table below; some are made of `brains`.

    Where photographs are wanted, of those to learn from, or of those that are set `aside` to measure with.
    """
    size, material = brains.shape[1], Material(brains, _photos("scene", aside), _photos("texture", aside))
    return np.stack([canonicalize(KINDS[kind](material, generator), size) for _ in range(count)])


def _uniform(_: Material, generator: np.random.Generator) -> Images:
    y, x = np.mgrid[-1:1:160j, -1:1:160j]
    a, b, c = generator.normal(0, 1, 3)
    shape = (a * x + b * y, c * np.hypot(x - a / 2, y - b / 2), 0 * x, np.where(a * x + b * y > c / 2, 1.0, 0.0))
    level = generator.uniform(0, 255) + generator.uniform(0, 120) * shape[generator.integers(4)]
    return _grey(level + generator.normal(0, generator.uniform(0, 4), x.shape))


def _noise(_: Material, generator: np.random.Generator) -> Images:
    side = int(generator.integers(96, 224))
    draw = (
        generator.normal(0, 1, (side, side)),
        generator.uniform(-1, 1, (side, side)),
        (generator.random((side, side)) < generator.uniform(0.02, 0.5)) * 1.0,
        generator.exponential(1, (side, side)),
    )[generator.integers(4)]
    if generator.random() < 0.6:
        draw = ndimage.gaussian_filter(draw, math.exp(generator.uniform(-1, 3)))
    return _windowed(draw, generator)


def _text(_: Material, generator: np.random.Generator) -> Images:
    width, height = (int(v) for v in generator.integers(150, 420, 2))
    paper, ink = (
        (255, int(generator.integers(0, 90))) if generator.random() < 0.7 else (int(generator.integers(40)), 255)
    )
    page = Image.new("L", (width, height), paper)
    draw = ImageDraw.Draw(page)
    height_of_text = int(generator.integers(9, 34))
    font = ImageFont.load_default(height_of_text)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxzETAOINSHR0123456789,.:-"))
    y = int(generator.integers(2, 20))
    while y < height:
        words = ("".join(generator.choice(letters, generator.integers(2, 11))) for _ in range(width // 20))
        if generator.random() < 0.85:
            draw.text((int(generator.integers(2, 30)), y), " ".join(words), fill=ink, font=font)
        y += int(height_of_text * generator.uniform(1.1, 1.6))
    return np.asarray(page)


def _drawing(_: Material, generator: np.random.Generator) -> Images:
    """Charts, diagrams, logos: flat shapes and lines."""
    size = 224
    dark = generator.random() < 0.5
    page = Image.new("L", (size, size), 0 if dark else 255)
    draw = ImageDraw.Draw(page)
    for _shape in range(int(generator.integers(1, 12))):
        x0, x1, y0, y1 = (int(v) for v in generator.integers(0, size, 4))
        box = (min(x0, x1), min(y0, y1), max(x0, x1) + 1, max(y0, y1) + 1)
        grey, line = int(generator.integers(256)), int(generator.integers(1, 6))
        match generator.integers(5):
            case 0:
                draw.rectangle(box, fill=grey)
            case 1:
                draw.ellipse(box, fill=grey)
            case 2:
                draw.ellipse(box, outline=grey, width=line)
            case 3:
                draw.line([tuple(p) for p in generator.integers(0, size, (8, 2)).tolist()], fill=grey, width=line)
            case _:
                curve = size / 2 + np.cumsum(generator.normal(0, 6, 60))
                draw.line(list(zip(np.linspace(10, size, 60), curve, strict=True)), fill=grey, width=line)
    return np.asarray(page)


def _body(_: Material, generator: np.random.Generator) -> Images:
    """A dark field with one large round thing full of smaller round things: a limb, a trunk, a dish, a noise disc."""
    size = 200
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]

    def ellipse(centre: NDArray[np.float64], radii: NDArray[np.float64]) -> NDArray[np.bool_]:
        return ((x - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2 < 1

    hull = generator.uniform(0.45, 0.95, 2)
    outline = ellipse(np.zeros(2), hull)
    image = outline * generator.uniform(40, 160)
    for _part in range(int(generator.integers(0, 14))):
        centre = generator.uniform(-0.7, 0.7, 2) * hull
        image = np.where(ellipse(centre, generator.uniform(0.05, 0.4, 2)) & outline, generator.uniform(0, 255), image)
    image = image + outline * ndimage.gaussian_filter(generator.normal(0, 1, x.shape), generator.uniform(0, 3)) * 40
    return _grey(ndimage.gaussian_filter(image, generator.uniform(0, 2)))


def _photo(of: Material, generator: np.random.Generator) -> Images:
    return _crop(of.scenes, generator)


def _texture(of: Material, generator: np.random.Generator) -> Images:
    """Surfaces, skies, tissue under a microscope."""
    return _crop(of.textures, generator)


def _crop(photos: tuple[Images, ...], generator: np.random.Generator) -> Images:
    photo = photos[generator.integers(len(photos))]
    side = int(generator.uniform(0.3, 1.0) * min(photo.shape))
    y, x = (int(generator.integers(0, length - side + 1)) for length in photo.shape)
    crop = photo[y : y + side, x : x + side][:, :: -1 if generator.random() < 0.5 else 1]
    return np.ascontiguousarray(np.rot90(crop, int(generator.integers(4)) if generator.random() < 0.3 else 0))


def _framed(of: Material, generator: np.random.Generator) -> Images:
    """A texture or noise inside the outline of a head: the right shape alone is not enough."""
    head = of.brains[generator.integers(len(of.brains))]
    mask = ndimage.binary_fill_holes(head > 5)
    filling = _texture(of, generator) if generator.random() < 0.6 else _noise(of, generator)
    resized = np.asarray(Image.fromarray(filling).resize(head.shape[::-1], Image.Resampling.BILINEAR))
    return np.where(mask, np.maximum(resized, 20), 0).astype(np.uint8)


def _shuffled(of: Material, generator: np.random.Generator) -> Images:
    """A brain cut into tiles that are dealt out anew."""
    head = of.brains[generator.integers(len(of.brains))]
    tiles = int(generator.choice([3, 4, 6, 8, 16, len(head)]))
    step = len(head) // tiles
    cut = head[: tiles * step, : tiles * step].reshape(tiles, step, tiles, step).swapaxes(1, 2).reshape(-1, step, step)
    dealt = cut[generator.permutation(len(cut))].reshape(tiles, tiles, step, step).swapaxes(1, 2)
    return np.ascontiguousarray(dealt.reshape(tiles * step, tiles * step))


def _phases(of: Material, generator: np.random.Generator) -> Images:
    """A brain's spectrum with random phases: its texture without its form."""
    head = of.brains[generator.integers(len(of.brains))].astype(np.float64)
    random = np.fft.rfft2(generator.normal(size=head.shape))
    phase = random / np.maximum(np.abs(random), 1e-9)
    return _windowed(np.fft.irfft2(np.abs(np.fft.rfft2(head)) * phase, head.shape), generator)


def _head_ct(of: Material, generator: np.random.Generator) -> Images:
    if generator.random() < 0.5:
        return ct_head(generator)
    return anatomy.head_ct(of.brains[generator.integers(len(of.brains))], generator)


def _drawn(part: Callable[[np.random.Generator], Images]) -> Callable[[Material, np.random.Generator], Images]:
    return lambda _, generator: part(generator)


KINDS: dict[str, Callable[[Material, np.random.Generator], Images]] = {
    "uniform or gradient": _uniform,
    "noise": _noise,
    "text": _text,
    "drawing": _drawing,
    "round body": _body,
    "photograph": _photo,
    "texture or micrograph": _texture,
    "head outline, other content": _framed,
    "brain in shuffled tiles": _shuffled,
    "brain with random phases": _phases,
    "head CT": _head_ct,
    **{name: _drawn(part) for name, part in anatomy.BODY_PARTS.items()},
}
"""What is no brain MRI, by name; each maker gives one uint8 (H, W) image."""


def _grey(values: NDArray[np.floating]) -> Images:
    return np.clip(values, 0, 255).astype(np.uint8)


def _windowed(values: NDArray[np.floating], generator: np.random.Generator) -> Images:
    """Stretch to 0..255 between two percentiles, and half of the time keep only a disc."""
    low, high = np.percentile(values, (generator.uniform(0, 20), generator.uniform(90, 100)))
    image = _grey((values - low) / max(high - low, 1e-9) * 255)
    if generator.random() < 0.5:
        y, x = np.mgrid[-1 : 1 : len(image) * 1j, -1 : 1 : len(image) * 1j]
        image = np.where((x / generator.uniform(0.6, 1)) ** 2 + y**2 < 0.9, image, 0).astype(np.uint8)
    return image


_PHOTO_FILES: dict[str, dict[str, tuple[str, ...]]] = {
    "scene": {
        "skimage": ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg"),
        "sklearn": ("china.jpg", "flower.jpg"),
        "matplotlib": ("grace_hopper.jpg", "Minduka_Present_Blue_Pack.png"),
    },
    "texture": {
        "skimage": (
            "brick.png", "cell.png", "clock_motion.png", "coins.png", "color.png", "grass.png", "gravel.png",
            "hubble_deep_field.jpg", "ihc.png", "moon.png", "retina.jpg",
        ),
    },
}  # fmt: skip
_ASIDE = frozenset({"astronaut.png", "china.jpg", "coffee.png", "gravel.png", "ihc.png", "retina.jpg"})
"""Pictures that a gate is measured with and never learns from: a face, a place, things; a surface, cells, an eye."""
_PHOTO_FOLDERS = {"skimage": "data", "sklearn": "datasets/images", "matplotlib": "mpl-data/sample_data"}


@functools.cache
def _photos(theme: str, aside: bool) -> tuple[Images, ...]:
    """Grey photographs that lie inside the installed packages, at most 512 px; what a release dropped is left out."""
    found = []
    for package, names in _PHOTO_FILES[theme].items():
        root = Path(cast(str, importlib.import_module(package).__file__)).parent / _PHOTO_FOLDERS[package]
        for path in (root / name for name in names if (name in _ASIDE) == aside):
            if path.is_file():
                with Image.open(path) as photo:
                    grey = photo.convert("L")
                grey.thumbnail((512, 512))
                found.append(np.asarray(grey))
    return tuple(found)
