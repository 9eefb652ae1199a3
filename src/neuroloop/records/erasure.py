"""Erasure: what was kept of an upload is removed for good, but for the mark that says so.

The mark comes first, in one transaction; from then on no reader, server or retraining gets the image or its row. Then
the objects go, then the row's content. Whatever breaks off half-way is finished by a repeat of the request or by the
next `finish_all`, which housekeeping calls.
"""

import logging
from datetime import datetime

from neuroloop.core import keys
from neuroloop.core.errors import NeuroLoopError, NotFound, Unavailable
from neuroloop.core.ports import ObjectStore, PredictionLog
from neuroloop.core.schemas import Erasure, ErasureReason

RETENTION = "retention"
_LOG = logging.getLogger(__name__)


def erase(log: PredictionLog, store: ObjectStore, prediction_id: str, *, reason: ErasureReason, by: str) -> Erasure:
    """Erase one prediction; again, it returns the first mark. Unfinished where the store is away after the mark.

    Raises `NotFound` for an id that was never recorded, `Unavailable` where not even the mark could be made.
    """
    mark = log.mark_erased(Erasure(prediction_id=prediction_id, reason=reason, by=by))
    try:
        return finish(log, store, prediction_id)
    except Unavailable as error:
        _LOG.warning("the erasure of prediction %s is marked and will be finished later: %s", prediction_id, error)
        return mark


def finish(log: PredictionLog, store: ObjectStore, prediction_id: str) -> Erasure:
    """Remove objects and content of a marked prediction; a repeat changes nothing."""
    for key in keys.images_of(prediction_id):
        store.delete(key)
    return log.finish_erasure(prediction_id)


def finish_all(log: PredictionLog, store: ObjectStore) -> int:
    """Finish what broke off half-way, oldest first, however much it is; how many were finished."""
    done, failed = 0, set[str]()
    while marks := [
        mark for mark in log.erasures(unfinished=True, limit=1000 + len(failed)) if mark.prediction_id not in failed
    ]:
        for mark in marks:
            try:
                finish(log, store, mark.prediction_id)
                done += 1
            except NeuroLoopError:
                failed.add(mark.prediction_id)
                _LOG.exception("the erasure of prediction %s is still not finished", mark.prediction_id)
    return done


def expire(log: PredictionLog, store: ObjectStore, before: datetime) -> int:
    """Erase every prediction made before this time; how many are gone.

    Ends at the first one that cannot be finished: while the store is away, each would only be marked.
    """
    count = 0
    while ids := log.older(before):
        for prediction_id in ids:
            try:
                mark = erase(log, store, prediction_id, reason="retention", by=RETENTION)
            except NotFound:  # another process was first
                continue
            if mark.finished_at is None:
                return count
            count += 1
    return count
