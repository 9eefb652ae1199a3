"""The frozen split: which part an image has is decided once, by its content, and holds for ever.

The decisions are numbered objects under `keys.SPLIT_REGISTRY`, each created once and never changed. Of two runs that
decide at the same time one is first, and the other decides again with the first one's decisions before it.
"""

import json
import logging
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from neuroloop.core import keys
from neuroloop.core.errors import AlreadyExists, InvalidImage, NotFound
from neuroloop.core.ports import ObjectStore
from neuroloop.core.schemas import ImageEntry, Part, Record, Snapshot, Split, now
from neuroloop.data import dataset
from neuroloop.data.audit import Audit
from neuroloop.data.similarity import thumbnail, twins
from neuroloop.imaging.decode import decode
from neuroloop.loop import feedback

log = logging.getLogger("neuroloop.splitting")


class Decisions(Record):
    """The images whose part one split decided, all for the first time."""

    version: str = Field(description="data version of that split")
    simulated: bool
    at: datetime = Field(default_factory=now)
    parts: dict[str, Part] = Field(description="sha256 -> part")
    md5: dict[str, str] = Field(description="sha256 -> the hash that the store keeps the image under")


def decisions(store: ObjectStore) -> list[Decisions]:
    """All decisions so far, oldest first."""
    taken = [Decisions.model_validate_json(store.get(key)) for key in store.list(keys.SPLIT_REGISTRY)]
    if store.exists(keys.FIRST_REGISTRY):
        parts = json.loads(store.get(keys.FIRST_REGISTRY))
        taken.insert(0, Decisions(version="", simulated=False, parts=parts, md5={}))
    return taken


def frozen_parts(taken: Sequence[Decisions]) -> dict[str, Part]:
    """Which part each image has, sha256 -> part; where two decisions differ, the earlier one holds."""
    return {sha256: part for each in reversed(taken) for sha256, part in each.parts.items()}


def closed(taken: Sequence[Decisions], *, simulated: bool) -> dict[str, str]:
    """The images that are frozen in a part which is not trained on, of any data version: store key -> in words."""
    frozen = frozen_parts(taken)
    return {
        keys.image(md5): f"an image of data version {each.version} ({frozen[sha256]})"
        for each in taken
        if each.simulated == simulated
        for sha256, md5 in each.md5.items()
        if frozen[sha256] != "train"
    }


def freeze(store: ObjectStore, snapshot: Snapshot, audit: Audit) -> Split:
    """The grouped split of a snapshot, with its new decisions in the registry.

    A new image that is similar to a frozen one follows it, even where that one is no longer in the snapshot or is
    quarantined: a test image that was removed, or replaced by a smaller copy, is not trained on in disguise. Repeated,
    it gives the same split. Raises `InvalidSource` as `dataset.make_split` does.
    """
    while True:
        # The number before the decisions: one that is added in between must make the creation fail.
        key = keys.split_decisions(keys.next_number(store.list(keys.SPLIT_REGISTRY)))
        taken = decisions(store)
        frozen = frozen_parts(taken)
        bound = _bound(store, snapshot, audit, taken, frozen)
        # Always the same seed: which part an image stands in must not depend on a run's choice.
        split = dataset.make_split(
            snapshot, audit, frozen=frozen, bound=bound, similar=lambda some: _similar(store, some)
        )
        new = [entry for entry in split.entries if entry.sha256 not in frozen]
        if not new:
            return split
        added = Decisions(
            version=split.version,
            simulated=split.simulated,
            parts={entry.sha256: entry.part for entry in new},
            md5={entry.sha256: entry.md5 for entry in new},
        )
        try:
            store.create(key, added.model_dump_json().encode(), content_type="application/json")
        except AlreadyExists:
            continue
        return split


def _bound(
    store: ObjectStore, snapshot: Snapshot, audit: Audit, taken: Sequence[Decisions], frozen: Mapping[str, Part]
) -> Mapping[str, Collection[Part]]:
    """The parts that new images are bound to by frozen ones which are not there: sha256 -> parts."""
    there = [entry for entry in snapshot.images if entry.path in audit.groups]
    present = {entry.sha256 for entry in there}
    new = list({entry.sha256: entry for entry in there if entry.sha256 not in frozen}.values())
    away = {
        sha256: md5
        for each in taken
        if each.simulated == snapshot.simulated  # a simulated scan is no twin of a real one
        for sha256, md5 in each.md5.items()
        if sha256 not in present
    }
    # Corrections that retrainings have learned from: as new images of a source they may be in no other part.
    learned = [] if snapshot.simulated or not new else _learned(store, taken)
    if not new or not (away or learned):
        return {}
    theirs, ours = _by_md5(store, away.values()), _by_md5(store, [entry.md5 for entry in new])
    old: list[tuple[Part, NDArray[np.float32]]] = [
        (frozen[sha256], theirs[md5]) for sha256, md5 in away.items() if md5 in theirs
    ]
    old += [("train", seen) for seen in learned]
    if not old:
        return {}
    bound: dict[str, set[Part]] = defaultdict(set)
    for i, j in twins(np.stack([ours[entry.md5] for entry in new]), np.stack([seen for _, seen in old])):
        bound[new[i].sha256].add(old[j][0])
    return dict(bound)


def _learned(store: ObjectStore, taken: Sequence[Decisions]) -> list[NDArray[np.float32]]:
    """The thumbnails of the corrections that were trained on: not those held out, nor twins of what is."""
    keyed = [correction.key for correction in feedback.used(store) if not correction.held_out]
    if not keyed:
        return []
    learned = list(thumbnails(store, keyed).values())
    others = thumbnails(store, closed(taken, simulated=False))
    if not learned or not others:
        return learned
    left_out = {i for i, _ in twins(np.stack(learned), np.stack(list(others.values())))}
    return [seen for i, seen in enumerate(learned) if i not in left_out]


def _similar(store: ObjectStore, images: Sequence[ImageEntry]) -> list[tuple[int, int]]:
    seen = _by_md5(store, [image.md5 for image in images])
    vectors = np.stack([seen[image.md5] for image in images])
    return twins(vectors, vectors)


def _by_md5(store: ObjectStore, md5s: Iterable[str]) -> dict[str, NDArray[np.float32]]:
    named = {keys.image(md5): md5 for md5 in md5s}
    return {named[key]: seen for key, seen in thumbnails(store, named).items()}


def thumbnails(store: ObjectStore, of: Iterable[str]) -> dict[str, NDArray[np.float32]]:
    """The thumbnails of stored images by their key; without those that are no longer there or cannot be read."""

    def one(key: str) -> tuple[str, NDArray[np.float32]] | None:
        try:
            return key, thumbnail(decode(store.get(key)))
        except NotFound:
            return None
        except InvalidImage as error:  # one picture must not keep all others from being learned
            log.warning("%s is left out: %s", key, error)
            return None

    with ThreadPoolExecutor(4) as pool:
        return dict(found for found in pool.map(one, of) if found)
