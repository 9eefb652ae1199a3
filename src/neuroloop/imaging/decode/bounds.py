"""What may be read at all: the limits, and the checks that come before the work."""

import math
import zlib
from typing import NamedTuple

from neuroloop.core.errors import ImageTooLarge, InvalidImage

SMALLEST_SIDE = 32
"""Pixels. Below this no anatomy can be told apart, and the model's input would be mostly interpolation."""


class Limits(NamedTuple):
    """How much of a file is read."""

    bytes: int = 20_000_000
    """Of the file."""
    pixels: int = 40_000_000
    """Of the one frame that is decoded."""
    frames: int = 2_000
    """That a file may hold."""
    unpacked: int = 300_000_000
    """Bytes of a volume, or of what was compressed as a whole; 256 slices of 512 x 512 x 4 bytes fit."""
    depth: int = 16
    """Of sequences within sequences in DICOM; an enhanced MR image has 4."""
    foreign: bool = False
    """Whether a file may be more than an image, as those are that a phone writes data behind."""

    @property
    def longest_side(self) -> int:
        """Pixels. The canonical form pads to a square, which may so have at most some twice the pixels."""
        return max(2 * SMALLEST_SIDE, math.isqrt(2 * self.pixels))


def check_bytes(data: bytes, limits: Limits) -> None:
    """Raise `InvalidImage` where there are none, `ImageTooLarge` where there are too many."""
    if len(data) > limits.bytes:
        raise ImageTooLarge(
            "The file is too large",
            why=f"it has {len(data):,} bytes, at most {limits.bytes:,} are read",
            fix="upload a single slice as JPEG or PNG",
        )
    if not data:
        raise InvalidImage("The file is empty", why="it has 0 bytes", fix="upload a slice as JPEG or PNG")


def check_size(width: int, height: int, limits: Limits) -> None:
    """Raise `ImageTooLarge` or `InvalidImage` for an image of this size."""
    if width * height > limits.pixels:
        raise ImageTooLarge(
            "The image has too many pixels",
            why=f"{width} x {height} px are more than {limits.pixels:,}",
            fix="upload a smaller image",
        )
    if max(width, height) > limits.longest_side:
        raise ImageTooLarge(
            "The image is too long",
            why=f"it has {width} x {height} px, no side may have more than {limits.longest_side:,}",
            fix="upload one slice, not a strip of them",
        )
    if min(width, height) < SMALLEST_SIDE:
        raise InvalidImage(
            "The image is too small",
            why=f"it has {width} x {height} px, each side must have at least {SMALLEST_SIDE}",
            fix="upload the slice in its original size",
        )


def check_unpacked(size: int, limits: Limits) -> None:
    """Raise `ImageTooLarge` for a volume of this many bytes."""
    if size > limits.unpacked:
        raise ImageTooLarge(
            "The file holds too much",
            why=f"unpacked it has more than {limits.unpacked:,} bytes",
            fix="upload one volume, or a single slice of it",
        )


def choose(frame: int | None, frames: int, limits: Limits) -> int:
    """The frame to read, counted from 1: the one that was asked for, else the middle one.

    Raises `ImageTooLarge` beyond the limit of frames, `InvalidImage` where the file has no such frame.
    """
    if frames > limits.frames:
        raise ImageTooLarge(
            "The file has too many frames",
            why=f"it has {frames:,}, at most {limits.frames:,} are read",
            fix="upload the slice you mean as a file of its own",
        )
    if frame is None:
        return (frames + 1) // 2
    if not 1 <= frame <= frames:
        raise InvalidImage(
            f"There is no frame {frame}",
            why="the file has one frame" if frames == 1 else f"the file has the frames 1 to {frames}",
            fix="leave frame out to get the middle one",
        )
    return frame


def inflate(data: bytes, wbits: int, limits: Limits) -> tuple[bytes, bytes]:
    """What one zlib, gzip or raw stream unpacks to (see `zlib.decompressobj`), and the bytes that follow it.

    Raises `ImageTooLarge` as soon as it becomes too much, `InvalidImage` where it is damaged or cut off.
    """
    stream = zlib.decompressobj(wbits)
    try:
        unpacked = stream.decompress(data, limits.unpacked + 1)
    except zlib.error:
        raise damaged("its compressed part contradicts itself") from None
    check_unpacked(len(unpacked), limits)
    if not stream.eof:
        raise damaged("its compressed part ends early")
    return unpacked, stream.unused_data


def damaged(why: str) -> InvalidImage:
    """The error for bytes that are of a known kind, but wrong. `why` is ours: no word of the file is repeated."""
    return InvalidImage("The image is damaged or cut off", why=why, fix="export or download it again")
