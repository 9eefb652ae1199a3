"""Leftovers: objects that no row speaks of, because a process died between the object and its row.

Such an upload was never answered, so nobody misses it, and nobody could erase it. Only objects older than any request
can last are looked at.
"""

import logging
import uuid
from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime

from neuroloop.core import keys
from neuroloop.core.errors import Erased, NeuroLoopError, NotFound
from neuroloop.core.ports import ObjectStore, PredictionLog
from neuroloop.core.schemas import Prediction
from neuroloop.records import corrections

AT_MOST, SHARE = 50, 0.1
"""More leftovers than both this number and this share of all objects are no leftovers but a wrong or restored database:
then nothing is removed."""
_CHUNK = 1000
_LOG = logging.getLogger(__name__)


def sweep(log: PredictionLog, store: ObjectStore, before: datetime, *, force: bool = False) -> list[str]:
    """Remove the images without a row that were written before this time; their keys.

    Raises `NeuroLoopError` where they are too many to be leftovers, unless `force`.
    """
    objects = [key for prefix in (keys.PREDICTIONS, keys.INVALID) for key in store.list(prefix)]
    orphans = []
    for some in _chunks(objects):
        rows = log.known([name for key in some if (name := prediction_id(key))])
        for key in some:
            name = prediction_id(key)
            row = rows.get(name or "")
            if name and (row is None or row.object_key != key) and _older(store, key, before):
                orphans.append(key)
    if len(orphans) > max(AT_MOST, SHARE * len(objects)) and not force:
        raise NeuroLoopError(
            f"{len(orphans)} of {len(objects)} images have no row in the database, so none is removed",
            why="crashes leave single ones; so many mean another database, or one restored from before they came",
            fix="check NEUROLOOP_DATABASE_URL; neuroloop sweep --force removes them all the same",
        )
    for key in orphans:
        store.delete(key)
        _LOG.info("removed %s, which no row speaks of", key)
    store.discard_unfinished(before)
    return orphans


def settle_corrections(log: PredictionLog, store: ObjectStore) -> int:
    """Put the corrected copies in order with the rows, and remove those of erased images; how many were not.

    A copy that no row explains and no mark forbids stays: it came from elsewhere.
    """
    copies: dict[str, list[str]] = defaultdict(list)
    for key in store.list(keys.CORRECTIONS):
        if name := prediction_id(key):
            copies[name].append(key)
    mended = 0
    for some in _chunks(list(copies)):
        rows, erased = log.known(some), log.erased(some)
        for name in some:
            try:
                if name in erased:
                    for key in copies[name]:
                        store.delete(key)
                elif name in rows and copies[name] != _explained(log, rows[name]):
                    corrections.settle(log, store, rows[name])
                else:
                    continue
                mended += 1
            except (Erased, NotFound) as error:
                _LOG.info("the corrected copy of prediction %s was not put in order: %s", name, error)
    return mended


def bring_back_corrections(log: PredictionLog, store: ObjectStore) -> int:
    """Make the corrected copies that standing corrections lack; how many were made.

    A copy is missing where a server was killed, or lost its store, between a verdict's row and the copy. Those whose
    image is gone stay away.
    """
    there = {prediction_id(key) for key in store.list(keys.CORRECTIONS)}
    made, after = 0, ""
    while ids := log.corrected(after):
        after = ids[-1]
        for row in log.known([name for name in ids if name not in there]).values():
            try:
                if _explained(log, row):
                    corrections.settle(log, store, row)
                    made += 1
            except (Erased, NotFound) as error:
                _LOG.info("the corrected copy of prediction %s was not brought back: %s", row.id, error)
    return made


def _explained(log: PredictionLog, prediction: Prediction) -> list[str]:
    """The keys of the corrected copies there should be."""
    label = corrections.standing(log.feedback(prediction.id)) if corrections.may_train(prediction) else None
    return [keys.correction(label, prediction.id)] if label else []


def prediction_id(key: str) -> str | None:
    """The id in an image's key, None where the object is not one of a server's."""
    name = key.rsplit("/", 1)[-1].removesuffix(".png")
    try:
        return name if str(uuid.UUID(name)) == name else None
    except ValueError:
        return None


def _older(store: ObjectStore, key: str, before: datetime) -> bool:
    try:
        return store.modified(key) < before
    except NotFound:
        return False


def _chunks(found: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(found), _CHUNK):
        yield found[start : start + _CHUNK]
