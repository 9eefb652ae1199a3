"""Named arrays as bytes, and back, without pickle."""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neuroloop.core.errors import NeuroLoopError


def pack(**arrays: NDArray[Any]) -> bytes:
    """Named arrays as an .npz; object arrays are refused, as they would need pickle."""
    buffer = io.BytesIO()
    try:
        np.savez(buffer, allow_pickle=False, **arrays)
    except ValueError as error:
        raise NeuroLoopError("These arrays cannot be packed", why=str(error), fix="give numbers or strings") from error
    return buffer.getvalue()


def unpack(data: bytes) -> dict[str, NDArray[Any]]:
    """The inverse of `pack`; bytes that would need pickle to read, or are no .npz, are refused."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # zipfile, zlib and numpy each raise their own
        raise NeuroLoopError(
            "These bytes are no packed arrays", why=str(error), fix="run the step that made them again"
        ) from error
