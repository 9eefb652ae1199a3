"""Canaries: a few canonical images whose class is known, in every bundle. A model answers them before it serves.

Hashes show that a file is the one that was written. They do not show that what was written is a sound model: weights
that are no numbers, outputs in another order, a network that belongs to another manifest. The canaries' answers do.
"""

import io
import zipfile
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from neuroloop.core.errors import InvalidBundle
from neuroloop.core.schemas import LABELS

PER_CLASS = 4
TOLERANCE = 0.02
"""Another processor rounds otherwise, in the fifth decimal; what a reader would notice begins at about this."""
_MOST_BYTES = 16_000_000
"""Of the arrays unpacked: 16 images of 512 pixels a side take 4 MB."""
_LOST = 1 / 3
"""Another model that gets fewer of a class right does not know the class: its predecessor got every one right."""


class Canary(NamedTuple):
    """n images with what is known of them."""

    images: NDArray[np.uint8]
    """(n, size, size), canonical"""
    labels: NDArray[np.int64]
    """(n,): their class, as readers gave it"""
    probabilities: NDArray[np.float32]
    """(n, classes): what the model said of them when it was built"""

    def to_bytes(self) -> bytes:
        """As a compressed .npz."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **self._asdict())
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Canary":
        """The inverse of `to_bytes`. Raises `InvalidBundle`; nothing in the file is run."""
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                if (unpacked := sum(each.file_size for each in archive.infolist())) > _MOST_BYTES:
                    raise ValueError(f"they unpack to {unpacked:,} bytes, more than {_MOST_BYTES:,}")
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                found = cls(*(arrays[name] for name in cls._fields))
        except (ValueError, KeyError, OSError, EOFError, MemoryError, zipfile.BadZipFile) as error:
            raise InvalidBundle("the canaries cannot be read", why=str(error)) from error
        n, classes = len(found.images), len(LABELS)
        shapes = found.images.ndim == 3 and found.labels.shape == (n,) and found.probabilities.shape == (n, classes)
        if not shapes or found.images.dtype != np.uint8 or not n or not np.isin(found.labels, range(classes)).all():
            raise InvalidBundle("the canaries do not fit together", fix="build the model again")
        return found

    def verify(self, probabilities: NDArray[np.float32]) -> None:
        """Raise `InvalidBundle` unless a model that says this of the images is the one they were chosen with."""
        named = probabilities.argmax(axis=1)
        if (wrong := np.flatnonzero(named != self.labels)).size:
            first = wrong[0]
            raise InvalidBundle(
                f"the network names {wrong.size} of {len(self.labels)} reference images otherwise than at its building",
                why=f"one of {LABELS[self.labels[first]]} is called {LABELS[named[first]]}",
                fix="build the model again",
            )
        if (off := float(np.abs(probabilities - self.probabilities).max())) > TOLERANCE:
            raise InvalidBundle(
                "the network answers the reference images otherwise than at its building",
                why=f"probabilities differ by up to {off:.3f}, more than {TOLERANCE}",
                fix="build the model again",
            )

    def unknown_to(self, probabilities: NDArray[np.float32]) -> list[str]:
        """The classes that another model, which says this of the images, does not know."""
        right = probabilities.argmax(axis=1) == self.labels
        return [
            label
            for index, label in enumerate(LABELS)
            if (self.labels == index).sum() >= 3 and right[self.labels == index].mean() < _LOST
        ]

    def exchanged_by(self, probabilities: NDArray[np.float32]) -> list[str]:
        """The classes of which another model, which says this of the images, names most by one another's names.

        A model of quite other images may not know some of these, but it does not exchange them.
        """
        moved = {}
        for label in range(len(LABELS)):
            counts = np.bincount(probabilities[self.labels == label].argmax(axis=1), minlength=len(LABELS))
            if counts.sum() >= 3 and 2 * counts.max() > counts.sum() and counts.argmax() != label:
                moved[label] = int(counts.argmax())
        return [LABELS[label] for label in moved] if set(moved) == set(moved.values()) else []


def choose(
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    probabilities: NDArray[np.float32],
    *,
    per_class: int = PER_CLASS,
) -> Canary | None:
    """The images of each class that the model names right and most surely; None where it names none right.

    `images` uint8 (n, size, size), canonical; `labels` (n,); `probabilities` (n, classes), the model's.
    """
    chosen: list[int] = []
    for label in range(len(LABELS)):
        right = np.flatnonzero((labels == label) & (probabilities.argmax(axis=1) == label))
        chosen += right[np.argsort(-probabilities[right, label], kind="stable")][:per_class].tolist()
    if not chosen:
        return None
    return Canary(images[chosen], labels[chosen].astype(np.int64), probabilities[chosen].astype(np.float32))
