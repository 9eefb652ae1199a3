"""From bytes of unknown origin to grey pixels, and back to PNG.

`read` takes pictures (`raster`), DICOM (`dicom`) and NIfTI (`nifti`). Only pixels leave it, and evidence for the gate:
what a DICOM header says of modality and body part, in words of the standard (`declared`), and how much is in colour
(`colour`). No text of a file gets into an error or a log.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from neuroloop.core.errors import ImageTooLarge, UnsupportedImage
from neuroloop.imaging.decode import colour, declared, dicom, foreign, nifti, raster
from neuroloop.imaging.decode.bounds import SMALLEST_SIDE, Limits, check_bytes, check_size
from neuroloop.imaging.decode.greys import encode_png

__all__ = [
    "FORMATS",
    "SMALLEST_SIDE",
    "Decoded",
    "Limits",
    "check_bytes",
    "check_size",
    "declared",
    "decode",
    "encode_png",
    "is_plain",
    "objection",
    "read",
]

FORMATS = (*raster.FORMATS, "DICOM", "NIfTI")
"""What is read. The bytes say which it is; no name or declared type is looked at."""


_USUAL = Limits()
_CHOSEN = Limits(bytes=600_000_000, pixels=150_000_000, foreign=True)  # what any setting lets in, and its PNG
_TEXTS = 1_000_000  # bytes before the voxels of a volume where text may stand


class Decoded(NamedTuple):
    """One image of a file."""

    pixels: NDArray[np.uint8]
    """(H, W), 0..255, both sides at least 32"""
    kind: str
    """One of `FORMATS`"""
    frames: int = 1
    """How many frames, slices or pages the file has"""
    frame: int = 1
    """Which of them this is, from 1"""
    modality: str = ""
    """As a DICOM header declares it, see `declared.modality`; empty: it says nothing"""
    body_part: str = ""
    """The same, see `declared.body_part`"""
    colour: float = 0.0
    """Share of the lit pixels that are coloured, see `colour.share`"""


def decode(data: bytes) -> NDArray[np.uint8]:
    """The pixels alone of an image that somebody has chosen to learn from, see `read`.

    Nobody sends it from outside, so it may be larger than an upload, and may have other data in it.
    """
    return read(data, limits=_CHOSEN).pixels


def read(data: bytes, *, frame: int | None = None, limits: Limits = _USUAL) -> Decoded:
    """Read one image as grey pixels: the frame that is asked for, counted from 1, or the middle one.

    Colour becomes luma (ITU-R 601), transparency is laid over black, more than 8 bits are spread over 8 (see
    `greys.eight_bits`), EXIF orientation is honoured and all other metadata dropped. Sizes are checked before any pixel
    is decoded.

    Raises `ImageTooLarge` beyond the limits, `UnsupportedImage` where the bytes are no image in one of `FORMATS`,
    `InvalidImage` where the image is damaged, cut off, too small or more than an image.
    """
    check_bytes(data, limits)
    try:
        return _read(data, frame, limits)
    except MemoryError:
        raise ImageTooLarge(
            "The image needs too much memory",
            why="reading it takes more than is set aside for one image",
            fix="upload a single slice as JPEG or PNG",
        ) from None


def objection(seen: Decoded) -> str:
    """Why this is no MRI of a brain, whatever its greys show, in words; empty where nothing speaks against it."""
    return declared.objection(seen.modality, seen.body_part) or colour.objection(seen.colour)


def is_plain(data: bytes) -> bool:
    """Whether `read` would take this for a picture of little cost, see `raster.is_plain`."""
    return raster.is_plain(data) and not dicom.is_dicom(data) and not nifti.is_nifti(data)


def _no_check(data: bytes, kind: str) -> None:
    pass


def _read(data: bytes, frame: int | None, limits: Limits) -> Decoded:
    check = _no_check if limits.foreign else foreign.check
    if dicom.is_dicom(data):
        check(data, "DICOM")
        found = dicom.read(data, frame, limits)
        return Decoded(found.pixels, "DICOM", *found[1:])
    volume = nifti.unzip(data, limits) if nifti.is_gzip(data) else data
    if nifti.is_nifti(volume):
        for part in (data, volume[:_TEXTS]):
            check(part, "NIfTI")
        pixels, frames, chosen = nifti.read(volume, frame, limits)
        return Decoded(pixels, "NIfTI", frames, chosen)
    kind = raster.kind_of(data)
    if not kind:
        raise UnsupportedImage(
            "The file is no image that can be read",
            why=f"its bytes are not {', '.join(FORMATS[:-1])} or {FORMATS[-1]}",
            fix="upload a slice as JPEG, PNG, DICOM or NIfTI",
        )
    check(data, kind)
    pixels, frames, chosen, coloured = raster.read(data, kind, frame, limits)
    return Decoded(pixels, kind, frames, chosen, colour=coloured)
