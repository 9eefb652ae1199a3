"""Small drawn images, each unlike the others, and snapshots of them."""

import hashlib
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from neuroloop.core.schemas import LABELS, ImageEntry, Snapshot
from neuroloop.imaging.decode import encode_png


def picture(number: int, side: int = 64) -> NDArray[np.uint8]:
    """Smooth blobs on black: (side, side)."""
    field = gaussian_filter(np.random.default_rng(number).normal(size=(side, side)), side / 12)
    return np.clip(field / np.abs(field).max() * 255, 0, 255).astype(np.uint8)


def ct(side: int = 128, brain: int = 90) -> NDArray[np.uint8]:
    """A drawn CT: scalp, a closed saturated ring of bone, and a brain that touches it."""
    rows, columns = np.mgrid[:side, :side]
    distance = np.hypot((rows - side / 2) / (0.43 * side), (columns - side / 2) / (0.35 * side))
    return np.select([distance < 0.8, distance < 0.93, distance < 1], [brain, 255, 60], 0).astype(np.uint8)


def mri(side: int = 128, brain: int = 110) -> NDArray[np.uint8]:
    """A drawn MRI: the bright fat of the scalp, dark bone, and brain."""
    rows, columns = np.mgrid[:side, :side]
    distance = np.hypot((rows - side / 2) / (0.43 * side), (columns - side / 2) / (0.35 * side))
    return np.select([distance < 0.85, distance < 0.91, distance < 1], [brain, 10, 255], 0).astype(np.uint8)


def four_classes(each: int) -> dict[str, bytes]:
    """Path -> PNG of `each` unlike pictures a class."""
    return {
        f"{label}/{number:03d}.png": encode_png(picture(1000 * order + number))
        for order, label in enumerate(LABELS)
        for number in range(each)
    }


def snapshot_of(files: Mapping[str, bytes], version: str = "v1", simulated: bool = False) -> Snapshot:
    """The snapshot of `[part/]class/name` files."""
    entries = []
    for path, data in files.items():
        folders = path.split("/")[:-1]
        entries.append(
            ImageEntry(
                path=path,
                label=folders[-1],
                part=folders[0] if len(folders) > 1 else "",
                md5=hashlib.md5(data, usedforsecurity=False).hexdigest(),
                sha256=hashlib.sha256(data).hexdigest(),
                size=len(data),
            )
        )
    return Snapshot(version=version, source="drawn", simulated=simulated, images=tuple(entries))
