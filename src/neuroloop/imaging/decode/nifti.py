"""NIfTI, by nibabel: one slice of a volume."""

import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from neuroloop.core.errors import InvalidImage, UnsupportedImage
from neuroloop.imaging.decode import foreign
from neuroloop.imaging.decode.bounds import Limits, check_size, check_unpacked, choose, damaged, inflate
from neuroloop.imaging.decode.greys import eight_bits, luma, square

if TYPE_CHECKING:  # half a second that only those pay who read NIfTI
    from nibabel.nifti1 import Nifti1Header

_GZIP = b"\x1f\x8b"
_MARKS = ((344, b"n+1\0"), (4, b"n+2\0"))
_THICK = 1.2  # how much wider than the next the slices of a volume must lie apart to be the ones it was scanned in
_AXIAL = 2


def is_nifti(data: bytes) -> bool:
    """Whether the bytes have the mark of a NIfTI file with its image in it, version 1 or 2."""
    return any(data.startswith(mark, at) for at, mark in _MARKS)


def is_gzip(data: bytes) -> bool:
    """Whether the bytes begin like gzip."""
    return data.startswith(_GZIP)


def unzip(data: bytes, limits: Limits) -> bytes:
    """What a gzip file of one or more parts holds. Raises `ImageTooLarge`, `InvalidImage`, `UnsupportedImage`."""
    parts, size, rest = [], 0, data
    while rest.startswith(_GZIP):
        unpacked, rest = inflate(rest, zlib.MAX_WBITS | 16, limits)
        parts.append(unpacked)
        size += len(unpacked)
        check_unpacked(size, limits)
        if not is_nifti(parts[0]):
            raise UnsupportedImage(
                "The file is no image that can be read",
                why="of compressed files only NIfTI (.nii.gz) is read, and it holds something else",
                fix="unpack it and upload one image",
            )
    if rest.strip(b"\0"):
        raise foreign.more_than_an_image("has other data behind its compressed part")
    return b"".join(parts)


def read(data: bytes, frame: int | None, limits: Limits) -> tuple[NDArray[np.uint8], int, int]:
    """Grey pixels, uint8 (H, W), of one slice; how many slices there are; which one it is.

    Slices are cut across the axis along which they lie furthest apart, or axially where there is no such axis, and
    counted from the patient's left, back or feet. They are shown as radiologists look at them: the patient's
    right at the left of the image, face or crown upwards; a sagittal slice looks to the left. Of a series of
    volumes the first is read.
    """
    import nibabel
    from nibabel.orientations import io_orientation

    two = data.startswith(b"n+2\0", 4)
    try:
        image = (nibabel.Nifti2Image if two else nibabel.Nifti1Image).from_bytes(data)
        shape = _check(image, data, limits)
        order = io_orientation(image.affine) if np.isfinite(image.affine).all() else np.full((3, 2), np.nan)
        if not np.isfinite(order).all():  # no orientation that makes sense: the axes as they stand
            order = np.array([[0, 1], [1, 1], [2, 1]])
        spacing = _spacing(image.header)
        stored = [
            int(np.flatnonzero(order[:, 0] == axis)[0]) for axis in range(3)
        ]  # axis of the patient -> of the file
        across = _across([shape[axis] for axis in stored], [spacing[axis] for axis in stored])
        frames = shape[stored[across]]
        chosen = choose(frame, frames, limits)
        shown = [axis for axis in range(3) if axis != across]
        check_size(shape[stored[shown[0]]], shape[stored[shown[1]]], limits)
        backwards = [order[stored[axis], 1] < 0 for axis in range(3)]
        place: list[Any] = [slice(None)] * 3 + [0] * (len(shape) - 3)
        place[stored[across]] = frames - chosen if backwards[across] else chosen - 1
        values = _values(image, tuple(place))
        if stored[shown[0]] > stored[shown[1]]:
            values = values.swapaxes(0, 1)
        # Now (first shown axis, second): both have to run from large to small, the second of them down the rows.
        values = values[:: 1 if backwards[shown[0]] else -1, :: 1 if backwards[shown[1]] else -1].swapaxes(0, 1)
        pixels = luma(values, bits=8) if values.ndim == 3 else eight_bits(values)
        return square(pixels, spacing[stored[shown[1]]], spacing[stored[shown[0]]], limits), frames, chosen
    except (InvalidImage, MemoryError):
        raise
    except Exception:  # nibabel and numpy raise half a dozen types for a bad header
        raise damaged("its NIfTI header contradicts itself or its data") from None


def _check(image: Any, data: bytes, limits: Limits) -> tuple[int, ...]:
    """The shape, at least three-dimensional. Raises unless the volume is within the limits and wholly there."""
    header = image.header
    shape = tuple(int(side) for side in header.get_data_shape())
    if len(shape) < 2 or min(shape) < 1:
        raise damaged("its NIfTI header says that it has no pixels")
    if header.get_data_dtype().kind == "c":
        raise UnsupportedImage(
            "The volume has complex values", why="only its magnitude is an image", fix="export the magnitude"
        )
    needed = int(header.get_data_dtype().itemsize) * int(np.prod(shape, dtype=object))
    check_unpacked(needed, limits)
    end = int(image.dataobj.offset) + needed  # the header's own offset is reset on loading
    if end > len(data):
        raise damaged("it ends before its last slice")
    if data[end:].strip(b"\0"):
        raise foreign.more_than_an_image("has other data behind the end of the image")
    return shape + (1,) * (3 - len(shape))


def _spacing(header: "Nifti1Header") -> list[float]:
    """Distance of voxels along the file's first three axes; 1 where it makes no sense."""
    zooms = [abs(float(zoom)) for zoom in header.get_zooms()[:3]]
    return [zoom if np.isfinite(zoom) and zoom > 0 else 1.0 for zoom in zooms] + [1.0] * (3 - len(zooms))


def _across(shape: list[int], spacing: list[float]) -> int:
    """The axis of the patient (right, front, up) across which the slices lie."""
    if shape.count(1) == 1:
        return shape.index(1)
    second, first = sorted(spacing)[1:]
    return spacing.index(first) if first >= _THICK * second else _AXIAL


def _values(image: Any, place: tuple[Any, ...]) -> NDArray[Any]:
    """The voxels of one slice, (a, b) or colour (a, b, 3), scaled as the header says."""
    values = np.asanyarray(image.dataobj[place[: image.ndim]])
    return np.stack([values[name] for name in values.dtype.names[:3]], axis=-1) if values.dtype.names else values
