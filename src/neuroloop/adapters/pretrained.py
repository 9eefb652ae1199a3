"""ImageNet weights of the transfer-learning architectures, as Keras publishes them (without the top)."""

import hashlib
import os
import time
from pathlib import Path

import httpx

from neuroloop.core.errors import InvalidSetting, Unavailable

PUBLISHER = "https://storage.googleapis.com/tensorflow/keras-applications"
_FILES: dict[str, tuple[str, str]] = {
    # (path below the publisher's, md5: the ones that keras.applications asks for)
    "xception": (
        "xception/xception_weights_tf_dim_ordering_tf_kernels_notop.h5",
        "b0042744bf5b25fce3cb969f33bebb97",
    ),
    "inceptionv3": (
        "inception_v3/inception_v3_weights_tf_dim_ordering_tf_kernels_notop.h5",
        "bcbd6486424b2319ff4ef7d526e38f63",
    ),
    "resnet101v2": (
        "resnet/resnet101v2_weights_tf_dim_ordering_tf_kernels_notop.h5",
        "c0ed64b8031c3730f411d2eb4eea35b5",
    ),
}
_SILENCE = 10.0  # seconds without an answer, or between two pieces of one, after which the download is given up
_BUDGET = 900.0  # seconds for a whole file (171 MB at most): 200 kB a second


def locate(
    chosen: str, architecture: str, cache: Path, *, publisher: str = PUBLISHER, budget: float = _BUDGET
) -> Path | None:
    """The weights file from which `architecture` starts; None where it starts from random weights.

    `chosen` is `imagenet` (fetched once into the folder `cache`, its hash checked), `none`, or the path of a file. It
    matters to transfer-learning architectures only. Raises `InvalidSetting` where the path is no file, and
    `Unavailable` where the publisher cannot be reached, answers nothing for 10 seconds, or sends something else.
    """
    if architecture not in _FILES or chosen == "none":
        return None
    if chosen != "imagenet":
        path = Path(chosen).expanduser()
        if not path.is_file():
            raise InvalidSetting(
                f"NEUROLOOP_PRETRAINED={chosen} is no file",
                fix="give a Keras weights file (.h5) without its top, imagenet, or none for random weights",
            )
        return path
    name, md5 = _FILES[architecture]
    target = cache / Path(name).name
    if not (target.is_file() and _md5(target) == md5):
        _fetch(f"{publisher}/{name}", target, md5, architecture, budget)
    return target


def _fetch(url: str, target: Path, md5: str, architecture: str, budget: float) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}")  # two tasks may fetch at once
    deadline = time.monotonic() + budget
    try:
        with part.open("wb") as file, httpx.stream("GET", url, timeout=_SILENCE, follow_redirects=True) as answer:
            answer.raise_for_status()
            for piece in answer.iter_bytes():
                file.write(piece)
                if time.monotonic() > deadline:
                    raise TimeoutError(f"it was not complete after {budget:.0f} seconds")
        if _md5(part) != md5:
            raise OSError(f"what {url} sent is not the file that keras.applications expects (md5 {md5})")
        part.rename(target)
    except (httpx.HTTPError, OSError) as error:
        raise Unavailable(
            f"the ImageNet weights of {architecture} cannot be downloaded",
            why=str(error).partition("\n")[0] or type(error).__name__,
            fix=f"fetch {url} where there is a network and put it at {target}; "
            "or set NEUROLOOP_PRETRAINED to a weights file, or to none for random weights",
        ) from error
    finally:
        part.unlink(missing_ok=True)


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
