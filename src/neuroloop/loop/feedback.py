"""From piled-up corrections to one batch that is used once."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from neuroloop.core import keys
from neuroloop.core.errors import AlreadyExists
from neuroloop.core.ports import ObjectStore, PredictionLog
from neuroloop.core.schemas import Record
from neuroloop.records.corrections import waiting as waiting

HELD_OUT_OF = 5
"""One correction in five, by hash, is never trained on: the feedback test set."""
SHARE = 0.25
"""Corrections are repeated until they make up about this share of the training images."""
MOST_REPEATS = 8


class Batch(Record):
    """The corrections that one retraining used, by store key at the time of the claim."""

    number: int
    run_id: str
    corrections: tuple[str, ...]


class Correction(Record):
    """One corrected image as it stands in the store now."""

    key: str
    label: str
    sha256: str
    held_out: bool
    batch: int = 0
    """Which batch took it, counted from 1."""

    @property
    def name(self) -> str:
        """What stays of its key when a reader changes the class."""
        return self.key.rsplit("/", 1)[-1]

    @property
    def prediction(self) -> str:
        """The id of the prediction that it corrects."""
        return self.name.removesuffix(".png")


def by_name(found: Iterable[str]) -> dict[str, str]:
    """What stays of a correction's key when a reader changes the class -> the key, the last of those that share it."""
    return {key.rsplit("/", 1)[-1]: key for key in found}


def batches(store: ObjectStore) -> list[Batch]:
    """All batches so far, oldest first."""
    return [Batch.model_validate_json(store.get(key)) for key in store.list(keys.BATCHES)]


def claim(store: ObjectStore, run_id: str, threshold: int) -> Batch | None:
    """Make the batch of a run, exactly once; None where no more than `threshold` corrections are unused.

    The manifest's number follows the last one and is created only if it is free, so of several claimants one wins and
    the others count anew without its images. A run that already has a batch gets the same one again.
    """
    while True:
        taken = batches(store)
        for batch in taken:
            if batch.run_id == run_id:
                return batch
        unused = waiting(store)
        if len(unused) <= threshold:
            return None
        number = max((batch.number for batch in taken), default=0) + 1
        batch = Batch(number=number, run_id=run_id, corrections=tuple(unused))
        try:
            store.create(keys.batch(number), batch.model_dump_json().encode(), content_type="application/json")
        except AlreadyExists:
            continue
        return batch


def used(store: ObjectStore) -> list[Correction]:
    """All corrections of all batches, with the class a reader gives them now; erased ones are left out."""
    now = by_name(store.list(keys.CORRECTIONS))
    names = {name: batch.number for batch in batches(store) for name in by_name(batch.corrections)}
    found = []
    for name, batch in names.items():
        if name in now:
            sha256 = hashlib.sha256(store.get(now[name])).hexdigest()
            label, held_out = now[name].split("/")[-2], is_held_out(sha256)
            found.append(Correction(key=now[name], label=label, sha256=sha256, held_out=held_out, batch=batch))
    return found


def allowed(log: PredictionLog, found: list[Correction]) -> list[Correction]:
    """Those of the corrections that are not erased: where an object still lingers, the mark is what counts."""
    erased = log.erased([correction.prediction for correction in found])
    return [correction for correction in found if correction.prediction not in erased]


def repeated(found: list[Correction]) -> dict[str, str]:
    """The keys of corrections that repeat a picture, or contradict another correction of it, and why they do not count.

    One picture may have been uploaded many times, each time as a prediction of its own.
    """
    same: dict[str, list[Correction]] = defaultdict(list)
    for correction in found:
        same[correction.sha256].append(correction)
    reasons: dict[str, str] = {}
    for first, *others in same.values():
        if any(other.label != first.label for other in others):
            reasons |= dict.fromkeys((each.key for each in (first, *others)), "corrected to several classes")
        else:
            reasons |= {other.key: f"the same picture as {first.key}" for other in others}
    return reasons


def simulated(log: PredictionLog, found: list[Correction]) -> set[str]:
    """The keys of those corrections whose uploader said that they are simulated scans."""
    rows = log.known([correction.prediction for correction in found])
    return {
        correction.key
        for correction in found
        if correction.prediction in rows and rows[correction.prediction].consent == "simulated"
    }


def is_held_out(sha256: str) -> bool:
    """Whether a correction belongs to the feedback test set: decided by its content, so for ever."""
    return int(sha256[:8], 16) % HELD_OUT_OF == 0


def repeats(corrections: int, training_images: int) -> int:
    """How often each correction enters an epoch, so that few of them are heard among many old images."""
    if not corrections:
        return 0
    return int(np.clip(round(SHARE * training_images / corrections), 1, MOST_REPEATS))
