"""The steps of the build that many workers share: each runs as a dynamically mapped task over shards of the images.

A shard is named "2/8": the second of eight. Workers share no disk: they read images by their hash and leave what they
made under `runs/<run>/` in the store, where the step that follows joins it. What comes out is the same, bit for bit,
for any number of shards, because nothing is computed over a shard: looks are at single images, and the training part
is cut into blocks (`dataset.blocks`) by its content alone, of which a shard is only a handful. A worker holds one
block at a time, some 10 MB at 128 pixels, beside the list of all images.
"""

import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from neuroloop.bootstrap import Services
from neuroloop.core import keys
from neuroloop.core.errors import InvalidSetting, NotFound
from neuroloop.core.schemas import LABELS, ImageEntry, Snapshot, Split, SplitEntry
from neuroloop.data import dataset, statistics
from neuroloop.data.audit import Looks, look
from neuroloop.data.dataset import Arrays
from neuroloop.data.packed import pack
from neuroloop.data.statistics import Measure
from neuroloop.imaging.augment import AugmentParams, augment_batch
from neuroloop.imaging.canonical import canonicalize
from neuroloop.imaging.decode import decode
from neuroloop.loop.handoff import SHARDS, Result, image_reader, in_use, kept, log, run_split, shard_key
from neuroloop.loop.params import Params

_IMAGES, _MOST = 4000, 64  # of a shard, where nobody says how many; and shards of a build then

MOST_KEPT = 40
"""Blocks of the training part that later steps get as one array: some 20,000 images, for the gate, for baselines and
for the preview. Of a larger part they are a sample."""


def names(count: int, images: int) -> list[str]:
    """The shards of a build, "1/n" to "n/n": n is `count`, or else what suits the number of images."""
    of = count or min(max(1, round(images / _IMAGES)), _MOST)
    return [f"{number}/{of}" for number in range(1, of + 1)]


def list_shards(services: Services, run_id: str) -> list[str]:
    """The shards of a run, as `download_data` chose them by the number of images."""
    shards: list[str] = kept(services, run_id, "download_data")["shards"]
    return shards


def audit_shard(services: Services, run_id: str, shard: str) -> Result:
    """Look at the images of one shard: what `audit_data` judges by."""
    number, of = _parsed(shard)
    version = kept(services, run_id, "download_data")["version"]
    snapshot = Snapshot.model_validate_json(services.store.get(keys.snapshot(version)))
    mine = _slice(snapshot, number, of)

    def progress(done: int, total: int) -> None:
        if done % 1000 == 0 or done == total:
            log.info("%d of %d images looked at", done, total)

    looks = look(mine, image_reader(services), progress=progress)
    in_use(services, run_id)
    services.store.put(_looks_key(run_id, number, of), looks.to_bytes())
    return {"images": len(mine), "unusable": len(looks.faults)}


def looks_of(services: Services, run_id: str, snapshot: Snapshot) -> Looks[ImageEntry]:
    """What all the shards of the audit saw. Raises `NotFound` where one is missing."""
    found = []
    for shard in list_shards(services, run_id):
        number, of = _parsed(shard)
        data = _made(services, _looks_key(run_id, number, of), "audit_shard")
        found.append(Looks.from_bytes(data, _slice(snapshot, number, of)))
    return Looks.joined(found)


def prepare_shard(services: Services, run_id: str, params: Params, shard: str) -> Result:
    """Decode the training images of one shard once: measure them, and make the augmented epochs that training reads."""
    number, of = _parsed(shard)
    in_use(services, run_id)
    train = run_split(services, run_id).of("train")
    read, settings = image_reader(services), AugmentParams()
    labels = np.array([LABELS.index(entry.label) for entry in train], np.int64)
    groups = np.array([entry.group for entry in train], np.int64)
    epochs = [dataset.choose(labels, groups, np.random.default_rng([params.seed, epoch])) for epoch in range(SHARDS)]
    mine = list(enumerate(dataset.blocks(train)))[number - 1 :: of]
    done = 0
    for block, indices in mine:
        entries = [train[index] for index in indices]

        def one(entry: SplitEntry) -> tuple[Measure, NDArray[np.uint8]]:
            pixels = decode(read(entry))
            return statistics.measure(pixels), canonicalize(pixels, params.image_size)

        with ThreadPoolExecutor(4) as pool:
            made = list(pool.map(one, entries))
        side = params.image_size
        images = np.array([image for _, image in made], np.uint8).reshape(len(entries), side, side)
        arrays = Arrays(images, labels[indices], groups[indices], tuple(entry.path for entry in entries))
        measures = {entry.path: measure for entry, (measure, _) in zip(entries, made, strict=True)}
        services.store.put(_measures_key(run_id, block), statistics.pack_measures(measures))
        services.store.put(_train_key(run_id, block), arrays.to_bytes())
        for epoch, chosen in enumerate(epochs):
            shown = np.searchsorted(indices, chosen[np.isin(chosen, indices)])
            generator = np.random.default_rng([params.seed, epoch, block])
            copies = augment_batch(images[shown], generator, settings)
            data = pack(images=copies, labels=arrays.labels[shown])
            services.store.put(shard_key(run_id, epoch, block), data)
        done += len(entries)
        log.info("block %d of this shard's %d: %d images so far", block // of + 1, len(mine), done)
    return {"images": done, "blocks": len(mine)}


def measures_of(services: Services, run_id: str, split: Split) -> dict[str, Measure]:
    """What all the shards measured, by path. Raises `NotFound` where one is missing."""
    found: dict[str, Measure] = {}
    for block in range(len(dataset.blocks(split.of("train")))):
        data = _made(services, _measures_key(run_id, block), "prepare_shard")
        found |= statistics.unpack_measures(data)
    return found


def training_part(services: Services, run_id: str, split: Split) -> Arrays:
    """The canonical training images; of many blocks the first `MOST_KEPT`. Raises `NotFound` where one is missing."""
    count = min(len(dataset.blocks(split.of("train"))), MOST_KEPT)
    found = [_made(services, _train_key(run_id, block), "prepare_shard") for block in range(count)]
    return Arrays.joined([Arrays.from_bytes(data) for data in found])


def _parsed(shard: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise InvalidSetting(f"{shard!r} names no shard", why="it is a number of a number", fix="give one such as 2/8")
    return int(found[1]), int(found[2])


def _slice(snapshot: Snapshot, number: int, of: int) -> tuple[ImageEntry, ...]:
    count = len(snapshot.images)
    return snapshot.images[count * (number - 1) // of : count * number // of]


def _made(services: Services, key: str, step: str) -> bytes:
    try:
        return services.store.get(key)
    except NotFound as error:
        raise NotFound(
            "a shard of this run is missing", why=str(error), fix=f"clear {step} in Airflow, with what follows it"
        ) from None


def _looks_key(run_id: str, number: int, of: int) -> str:
    return keys.run(run_id, f"looks/{number:04d}-of-{of:04d}.npz")


def _measures_key(run_id: str, block: int) -> str:
    return keys.run(run_id, f"measures/{block:06d}.npz")


def _train_key(run_id: str, block: int) -> str:
    return keys.run(run_id, f"train/{block:06d}.npz")
