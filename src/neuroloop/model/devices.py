"""What TensorFlow computes on. Imports TensorFlow: for the offline side only."""

import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass

import tensorflow as tf

from neuroloop.core.errors import InvalidSetting
from neuroloop.core.schemas import Distribution

_EXAMPLE = '{"cluster": {"worker": ["host-0:2222", "host-1:2222"]}, "task": {"type": "worker", "index": 0}}'


@dataclass(frozen=True)
class Host:
    """This host among those that train together: how many there are, and whether it is the first one, the chief."""

    hosts: int
    chief: bool


def prepare() -> str:
    """Let TensorFlow take GPU memory as it needs it; names what it will compute on, such as `GPU NVIDIA L4` or `CPU`.

    By default it takes all memory of every GPU at the first operation, and whoever shares the GPU gets none. Called
    again, or after the first operation, it changes nothing.
    """
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        try:
            tf.config.experimental.set_memory_growth(gpu, True)
        except RuntimeError:  # the GPU is in use already: it was prepared before, or keeps TensorFlow's default
            break
    found = [f"GPU {tf.config.experimental.get_device_details(gpu).get('device_name', gpu.name)}" for gpu in gpus]
    return ", ".join(found) or "CPU"


def strategy(chosen: Distribution) -> tf.distribute.Strategy:
    """How training is spread, after `prepare`; model, optimiser and averages are made and trained in its scope.

    - `auto`: as `mirrored` where this host has two GPUs or more, else as `one`;
    - `one`: TensorFlow's default, one device;
    - `mirrored`: every GPU of this host, or its CPU devices where it has no GPU and was given two by hand;
    - `multi_worker`: every device of every host that `TF_CONFIG` names. It waits for them, and must come before the
      first operation of the process, which is in that cluster until it ends.

    Raises `InvalidSetting` where there is but one device to mirror on, or `TF_CONFIG` says nothing that makes sense.
    """
    if chosen == "auto":
        chosen = "mirrored" if len(tf.config.list_physical_devices("GPU")) > 1 else "one"
    if chosen == "one":
        return tf.distribute.get_strategy()
    if chosen == "multi_worker":
        host()
        return _multi_worker()
    found = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    if len(found) < 2:
        raise InvalidSetting(
            "NEUROLOOP_DISTRIBUTION=mirrored needs two devices",
            why=f"TensorFlow sees {len(found)} here: {', '.join(device.name for device in found)}",
            fix="set it to auto, or give the host or pod a second GPU and TensorFlow for GPUs (the extra gpu)",
        )
    return _mirrored(tuple(device.name for device in found))


# One of each in a process: it joins a cluster once, and two that mirror take each other's exchanges for their own.
@functools.cache
def _mirrored(names: tuple[str, ...]) -> tf.distribute.Strategy:
    return tf.distribute.MirroredStrategy(names)


@functools.cache
def _multi_worker() -> tf.distribute.Strategy:
    return tf.distribute.MultiWorkerMirroredStrategy()


def host(environ: Mapping[str, str] | None = None) -> Host:
    """What `TF_CONFIG` says of this host: the chief is the task `chief`, or the first worker where there is none.

    Raises `InvalidSetting` where it is missing or malformed, or names tasks that are neither chief nor worker.
    """
    text = (os.environ if environ is None else environ).get("TF_CONFIG", "")
    if not text:
        raise _wrong("is not set", "it says which hosts train together, and which of them this is")
    try:
        config = json.loads(text)
        cluster, kind, index = config["cluster"], config["task"]["type"], config["task"]["index"]
        count = {name: len(addresses) for name, addresses in cluster.items()}
        addresses = [address for some in cluster.values() for address in some]
        index = int(index)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _wrong("cannot be read", f"{type(error).__name__}: {error}") from None
    for name in count:
        if name not in ("chief", "worker"):
            raise _wrong(f"names hosts of the type {name!r}", "those that train here are of the types chief and worker")
    if kind not in count or not 0 <= index < count[kind]:
        raise _wrong(f"calls this host {kind} {index}", f"its cluster has no such host: {json.dumps(cluster)}")
    if count.get("chief", 0) > 1 or len(set(addresses)) < len(addresses):
        raise _wrong("names more than one chief, or one address twice", json.dumps(cluster))
    for address in addresses:
        name, _, port = str(address).rpartition(":")
        if not name or not port.isdecimal():
            raise _wrong(f"names {address!r}", "an address is host:port")
    return Host(len(addresses), chief=kind == "chief" or ("chief" not in count and index == 0))


def _wrong(what: str, why: str) -> InvalidSetting:
    return InvalidSetting(
        f"NEUROLOOP_DISTRIBUTION=multi_worker, but TF_CONFIG {what}", why=why, fix=f"such as: {_EXAMPLE}"
    )
