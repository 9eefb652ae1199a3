"""One training on several hosts: the chief runs the build's steps, the others only help it to train.

The chief leaves `runs/<run>/training.json` for them, which says what is trained and how; they read it and the run's
arrays, and write nothing.
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from neuroloop.bootstrap import Services
from neuroloop.core.errors import InvalidSetting, NotFound
from neuroloop.core.schemas import ArchitectureName
from neuroloop.loop.handoff import Result, keep, kept, load_arrays, log, training_shards

if TYPE_CHECKING:
    from neuroloop.model.training import TrainConfig


def call(services: Services, run_id: str, config: "TrainConfig", *, size: int, architecture: ArchitectureName) -> None:
    """Tell the other hosts, as the chief, what is trained; nothing unless the setting is `multi_worker`.

    Raises `InvalidSetting` where `TF_CONFIG` is missing or malformed, or this host is not its chief.
    """
    from neuroloop.model import devices  # TensorFlow: only where a model is trained

    if services.settings.distribution != "multi_worker":
        return
    if not devices.host().chief:
        raise InvalidSetting(
            "this host is not the chief of TF_CONFIG, which alone runs the steps of a build",
            fix=f"run neuroloop train-worker {run_id} here",
        )
    keep(services, run_id, "training", {"config": asdict(config), "size": size, "architecture": architecture})


def assist(services: Services, run_id: str, *, wait: float, pause: Callable[[float], Any] = time.sleep) -> Result:
    """Help the chief with the training of a run, waiting at most `wait` seconds for it to begin; leaves nothing.

    Returns the epochs and seconds of the training. Raises `InvalidSetting` where `TF_CONFIG` is missing or malformed,
    or this host is its chief, and `NotFound` where no chief began. Where the chief goes away, TensorFlow raises.
    """
    from neuroloop.model import devices, network, training  # TensorFlow: only where a model is trained

    if devices.host().chief:
        raise InvalidSetting("this host is the chief of TF_CONFIG", why="it runs the build", fix="start the build here")
    job = _job(services, run_id, wait, pause)
    log.info("joining the training of %s on %s", run_id, devices.prepare())
    strategy = devices.strategy("multi_worker")  # waits for the chief, which has made all that is read below
    validation = load_arrays(services, run_id, "validation")
    with strategy.scope():
        # The weights are the chief's, wherever it has them from.
        model = network.build(job["size"], arch=job["architecture"], seed=job["config"]["seed"])
        outcome = training.train(
            model,
            training_shards(services, run_id),
            (validation.images, validation.labels),
            training.TrainConfig(**job["config"]),
            on_epoch=lambda epoch, metrics: log.info("epoch %d: loss %.4g", epoch, metrics["loss"]),
        )
    return {"epochs": outcome.epochs, "seconds": round(outcome.seconds, 1)}


def _job(services: Services, run_id: str, wait: float, pause: Callable[[float], Any]) -> Result:
    """What the chief left, as soon as it is there."""
    for _ in range(max(1, round(wait))):
        try:
            return kept(services, run_id, "training")
        except NotFound:
            pause(1.0)
    raise NotFound(
        f"run {run_id} began no training on several hosts within {wait:.0f} s",
        why="its chief has not come to it, or NEUROLOOP_DISTRIBUTION is not multi_worker there",
        fix="check the run's id and its building_model task, or give a longer --wait",
    )
