"""What the steps of a run leave for one another in the store and in MLflow, and how they find it.

Everything of a run lies under `runs/<run>/`: a step's result as `<step>.json`, arrays, shards, the candidate's bundle.
"""

import contextlib
import io
import itertools
import json
import logging
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from neuroloop.bootstrap import Services
from neuroloop.core import keys
from neuroloop.core.errors import AlreadyExists, NeuroLoopError, NotFound
from neuroloop.core.schemas import ImageEntry, Opening, Split, SplitEntry, SplitName, now
from neuroloop.data.dataset import Arrays
from neuroloop.data.packed import unpack
from neuroloop.model.bundle import Bundle

log = logging.getLogger("neuroloop.pipeline")

Result = dict[str, Any]
BUILD, RETRAINING = "data_and_model_build", "model_retraining"
SHARDS = 24
"""Epochs' worth of augmented training images; a longer training goes round them again."""
MOST_BLOCKS = 64
"""Blocks of training images in memory at a time: some 30,000 images, 500 MB at 128 pixels."""


def keep(services: Services, run_id: str, step: str, result: Result) -> Result:
    """Store a step's result for later steps, and return it."""
    data = json.dumps(result, indent=1, sort_keys=True).encode()
    services.store.put(keys.run(run_id, f"{step}.json"), data, content_type="application/json")
    log.info("%s: %s", step, json.dumps(result)[:2000])
    return result


def begin(services: Services, run_id: str, dag: str) -> None:
    """The first step of every run: two DAGs must not share a run id, for all that a run keeps lies under it."""
    first = settled(services, run_id, "dag", lambda: {"dag": dag})["dag"]
    if first != dag:
        raise NeuroLoopError(
            f"there was a run {run_id} of {first} before",
            why=f"what it left would be taken for that of this run of {dag}",
            fix="trigger it with another run id",
        )


def epoch_metrics(split: SplitName, metrics: Mapping[str, float]) -> dict[str, float]:
    """An epoch's metrics, as `training.train` names them, under names that say the split and the part."""
    return {
        f"{split}_validation_{name.removeprefix('val_')}" if name.startswith("val_") else f"{split}_train_{name}": value
        for name, value in metrics.items()
    }


def kept(services: Services, run_id: str, step: str) -> Result:
    """What an earlier step of this run returned."""
    try:
        found: Result = json.loads(services.store.get(keys.run(run_id, f"{step}.json")))
    except NotFound:
        raise NotFound(
            f"run {run_id} has no result of {step}", why="that step has not run", fix=f"clear {step} in Airflow"
        ) from None
    return found


def settled(services: Services, run_id: str, name: str, make: Callable[[], Result]) -> Result:
    """What a step decided at its first try, by `make`; every later try of the run gets the same."""
    key = keys.run(run_id, f"{name}.json")
    if not services.store.exists(key):
        data = json.dumps(make(), indent=1, sort_keys=True).encode()
        with contextlib.suppress(AlreadyExists):
            services.store.create(key, data, content_type="application/json")
    return kept(services, run_id, name)


def tracked(services: Services, run_id: str, experiment: str = BUILD) -> str:
    """The MLflow run of a pipeline run."""
    return services.registry.open_run(run_id, experiment=experiment, tags={"neuroloop.pipeline": experiment})


def read_split(services: Services, version: str, name: SplitName = "grouped") -> Split:
    """A split of a data version. Raises `NotFound`, for the legacy one where the source declares no test part."""
    key = keys.split(version) if name == "grouped" else keys.legacy_split(version)
    try:
        return Split.model_validate_json(services.store.get(key))
    except NotFound as error:
        why = "the source has no part of its own whose name starts with test, or one that lacks a class"
        raise NotFound(
            f"data version {version} has no {name} split",
            why=why if name == "legacy" else str(error),
            fix="choose the grouped split" if name == "legacy" else "clear audit_data in Airflow",
        ) from None


def run_split(services: Services, run_id: str) -> Split:
    """The split that a build works on, of the data version it downloaded."""
    version = kept(services, run_id, "download_data")["version"]
    return read_split(services, version, kept(services, run_id, "check_source").get("split", "grouped"))


def image_reader(services: Services) -> Callable[[ImageEntry | SplitEntry], bytes]:
    """Reads a snapshot's image from the store, by its content hash."""
    return lambda entry: services.store.get(keys.image(entry.md5))


def load_arrays(services: Services, run_id: str, part: str) -> Arrays:
    """A part's canonical arrays as this run wrote them. Raises `NeuroLoopError` for the test part: see `open_test`."""
    if part == "test":
        raise NeuroLoopError(
            "the test part is not loaded like the others",
            why="each look at it is logged, so that nobody can choose a model by it unseen",
            fix="call open_test(services, run_id, why)",
        )
    try:
        return Arrays.from_bytes(services.store.get(keys.run(run_id, f"{part}.npz")))
    except NotFound as error:
        raise NotFound(
            f"run {run_id} has no {part} part any more",
            why="a retraining's own is removed when it ends, or when the next one begins",
            fix="clear the task that trains and all after it; where it has registered a model, trigger a new run",
        ) from error


def open_test(services: Services, run_id: str, why: str, experiment: str = BUILD, *, subject: str = "") -> Arrays:
    """The test part's canonical arrays as this run wrote them; the only way to them, and every call is logged.

    `subject` is the sha256 of what is scored: a repeat with the same one, as after a kill, is the same look.
    """
    held_out = kept(services, run_id, "held_out")
    about = {"version": held_out["version"], "split": held_out["split"], "subject": subject}
    log_opening(services, run_id, why, experiment=experiment, **about)
    return Arrays.from_bytes(services.store.get(keys.run(run_id, "test.npz")))


def log_opening(
    services: Services,
    run_id: str,
    why: str,
    *,
    version: str,
    split: SplitName = "grouped",
    experiment: str = BUILD,
    subject: str = "",
) -> Opening:
    """Write down, in the store and in MLflow, that test images of a data version are looked at, before they are."""
    number = 1
    while True:
        opening = Opening(run_id=run_id, number=number, version=version, split=split, why=why, subject=subject)
        key = keys.opening(run_id, number)
        try:
            services.store.create(key, opening.model_dump_json().encode(), content_type="application/json")
            break
        except AlreadyExists:
            there = Opening.model_validate_json(services.store.get(key))
            if subject and opening.model_copy(update={"at": there.at}) == there:
                opening = there
                break
            number += 1
    tags = {"test_openings": str(number), "test_opened_for": why}
    services.registry.set_tags(tracked(services, run_id, experiment), tags)
    log.info("opened the %s test part of data version %s, time %d of this run: %s", split, version, number, why)
    return opening


def openings(services: Services, version: str = "") -> list[Opening]:
    """Every opening of a test part so far, of one data version or of all, oldest first."""
    found = [Opening.model_validate_json(services.store.get(key)) for key in services.store.list(keys.TEST_OPENINGS)]
    return sorted((each for each in found if version in ("", each.version)), key=lambda each: each.at)


def occasion(services: Services, run_id: str, step: str) -> str:
    """What a step's mail is about, as no other mail of any platform: where its result stands."""
    return f"{services.settings.store}/{keys.run(run_id, f'{step}.json')}"


@contextlib.contextmanager
def open_bundle(services: Services, run_id: str) -> Iterator[Bundle]:
    """The candidate of this run, verified."""
    with unzipped(services.store.get(keys.run(run_id, "bundle.zip"))) as folder:
        yield Bundle.load(folder, threads=2)


@contextlib.contextmanager
def unzipped(data: bytes) -> Iterator[Path]:
    """The files of a zip archive of ours in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(io.BytesIO(data)) as archive:
        archive.extractall(folder)
        yield Path(folder)


def zipped(folder: Path) -> bytes:
    """The inverse of `unzipped`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, file.name)
    return buffer.getvalue()


def shard_key(run_id: str, epoch: int, block: int = 0) -> str:
    """Where a run keeps the augmented images of one block in one epoch."""
    return keys.run(run_id, f"shards/{epoch:03d}-{block:06d}.npz")


def training_shards(services: Services, run_id: str) -> list[Callable[[], tuple[Any, Any]]]:
    """What training reads, one epoch after the other: each call gives images uint8 (n, s, s) and labels (n,).

    An epoch of more than `MOST_BLOCKS` blocks comes in several of these, so that memory is bounded however large it is.
    """
    found = services.store.list(keys.run(run_id, "shards") + "/")
    if not found:
        raise NotFound(
            f"The run {run_id} has no training images any more",
            why="they go when a run has ended, or when the next one begins",
            fix="clear the task that prepares them and all after it, or trigger a new run",
        )

    def load(some: list[str]) -> tuple[Any, Any]:
        blocks = [unpack(services.store.get(key)) for key in some]
        return np.concatenate([each["images"] for each in blocks]), np.concatenate([each["labels"] for each in blocks])

    epochs = [list(own) for _, own in itertools.groupby(found, key=lambda key: key.rpartition("-")[0])]
    return [partial(load, own[at : at + MOST_BLOCKS]) for own in epochs for at in range(0, len(own), MOST_BLOCKS)]


_BULKY = ("shards", "train", "looks", "measures")
_STALE, _IN_USE = timedelta(days=7), "in-use"


def in_use(services: Services, run_id: str) -> None:
    """Note that a task of this run makes or reads bulky things now."""
    services.store.put(keys.run(run_id, _IN_USE), b"")


def drop_stale(services: Services) -> None:
    """Remove that of runs which never came to their end: where nobody has made or read such things for a week."""
    bulky: dict[str, list[str]] = defaultdict(list)
    for key in services.store.list(keys.RUNS):
        folder, _, rest = key.removeprefix(keys.RUNS).partition("/")
        if rest.partition("/")[0] in _BULKY:
            bulky[folder].append(key)
    for folder, found in bulky.items():
        with contextlib.suppress(NotFound):  # removed by another at this moment
            marker = f"{keys.RUNS}{folder}/{_IN_USE}"
            used = marker if services.store.exists(marker) else found[-1]
            if services.store.modified(used) > now() - _STALE:
                continue
            log.info("%d files of the run %s, which did not end, are removed", len(found), folder)
            # First what may be of uploads: by the others this is found again where it is cut off.
            for key in (keys.run(folder, "train.npz"), *found):
                services.store.delete(key)


def drop_shards(services: Services, run_id: str) -> None:
    """Remove what only this run's tasks read, of which there is much."""
    for kind in _BULKY:
        for key in services.store.list(keys.run(run_id, kind) + "/"):
            services.store.delete(key)


def drop_training_part(services: Services, run_id: str) -> None:
    """Remove what a retraining has learned from: copies of uploads, which nobody would find to erase them."""
    services.store.delete(keys.run(run_id, "train.npz"))
