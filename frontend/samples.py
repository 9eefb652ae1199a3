"""Simulated scans for readers without a file of their own, rendered in this process and kept."""

import functools
import threading
from dataclasses import dataclass

from layout import CLASS_NAMES

from neuroloop.core.schemas import LABELS
from neuroloop.imaging import phantom
from neuroloop.imaging.decode import encode_png

SAMPLES: tuple[tuple[str, int, str], ...] = tuple(
    (label, index, "A") for index in (900_001, 900_002) for label in LABELS
)
"""Class, index and simulated scanner; indices far beyond those a build trains on."""
_RENDERING = threading.Lock()


@dataclass(frozen=True)
class Sample:
    """A rendered simulated scan, as the PNG that is sent and as words."""

    png: bytes
    label: str
    plane: str
    contrast: str

    @property
    def caption(self) -> str:
        """What was simulated, in words."""
        return f"{CLASS_NAMES[self.label].lower()}, {self.plane}, {self.contrast}"


@functools.cache
def _render(label: str, index: int, scanner: str) -> Sample:
    scan = phantom.scan(label, index, scanner=scanner)
    return Sample(encode_png(scan.pixels), label, scan.plane, scan.contrast)


def render(label: str, index: int, scanner: str = "A") -> Sample:
    """One simulated scan; the second call with the same arguments costs nothing."""
    with _RENDERING:
        return _render(label, index, scanner)


def render_all() -> None:
    """Render them before anybody asks: a page that renders answers no click meanwhile."""
    for sample in SAMPLES:
        render(*sample)
