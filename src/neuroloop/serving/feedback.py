"""What readers say of predictions, and the corrected images that follow from it.

A prediction has at most one corrected image in the store, under the class of the latest standing correction: several
readers may have corrected it to different classes, the last word counts. A reader who takes a correction back moves the
image to what another reader's correction says, or removes it where there is none.
"""

import contextlib
import logging
from collections.abc import Sequence

from neuroloop.core import keys
from neuroloop.core.errors import NeuroLoopError
from neuroloop.core.ports import ObjectStore, PredictionLog
from neuroloop.core.schemas import LABELS, Feedback, Label, Prediction, Verdict

_LOG = logging.getLogger(__name__)
_ROUNDS = 5  # of putting the store in order while other readers of the same image keep answering


class InvalidFeedback(NeuroLoopError):
    """A verdict and a class that do not go together."""


def normalise(prediction: Prediction, verdict: Verdict, label: Label | None) -> tuple[Verdict, Label | None]:
    """The verdict as it is recorded.

    Correcting to the class that was predicted means `agree`, and so does `not_brain_mri` of an image that the gate
    refused. Correcting a refused image says that it is a brain MRI of that class. Raises `InvalidFeedback` unless a
    class comes with `correct`, always and only.
    """
    if verdict is Verdict.CORRECT and label is None:
        raise InvalidFeedback("A correction names no class", fix=f"send label, one of {', '.join(LABELS)}")
    if verdict is not Verdict.CORRECT and label is not None:
        raise InvalidFeedback(
            f"The verdict {verdict} comes with a class", why="only correct does", fix="leave label out, or send correct"
        )
    if verdict is Verdict.CORRECT and label == prediction.label:
        return Verdict.AGREE, None
    if verdict is Verdict.NOT_BRAIN_MRI and not prediction.gate.accepted:
        return Verdict.AGREE, None
    return verdict, label


def standing(verdicts: Sequence[Feedback]) -> Label | None:
    """The class of the latest correction, None where no reader corrects."""
    corrections = [one for one in verdicts if one.verdict is Verdict.CORRECT]
    return max(corrections, key=lambda one: (one.created_at, one.reader)).label if corrections else None


def record(log: PredictionLog, store: ObjectStore, prediction: Prediction, feedback: Feedback) -> None:
    """Record a normalised verdict: a correction's object first, then the row, then what it outdated is removed.

    The same verdict of the same reader again changes nothing. Raises `Unavailable` where store or database is away;
    then no verdict has been recorded. Raises `NotFound` where the prediction's image has been removed from the store.
    """
    before = log.feedback(prediction.id)
    repeated = any((one.reader, one.verdict, one.label) == _said(feedback) for one in before)
    if not repeated:
        added = None
        if feedback.label is not None:
            key = keys.correction(feedback.label, prediction.id)
            added = None if store.exists(key) else key
            _put(store, prediction, key)
        try:
            log.record_feedback(feedback)
        except Exception:
            if added:
                _discard(store, added)
            raise
    _settle(log, store, prediction)


def _settle(log: PredictionLog, store: ObjectStore, prediction: Prediction) -> None:
    """Make the store say what the rows say.

    The rows are read again afterwards: had another server recorded a verdict meanwhile, both would put things in order
    from different rows, and the slower one would win with the older.
    """
    verdicts = log.feedback(prediction.id)
    for _ in range(_ROUNDS):
        label = standing(verdicts)
        if label is not None:
            key = keys.correction(label, prediction.id)
            if not store.exists(key):
                _put(store, prediction, key)
        for other in LABELS:
            if other != label:
                store.delete(keys.correction(other, prediction.id))
        again = log.feedback(prediction.id)
        if again == verdicts:
            return
        verdicts = again
    _LOG.warning("the corrections of prediction %s kept changing; the next verdict puts them in order", prediction.id)


def _put(store: ObjectStore, prediction: Prediction, key: str) -> None:
    store.put(key, store.get(prediction.object_key), content_type="image/png")


def _discard(store: ObjectStore, key: str) -> None:
    """Remove an object whose row could not be written; where that fails too, a leftover remains and is logged."""
    with contextlib.suppress(Exception):
        store.delete(key)
        return
    _LOG.warning("%s could not be removed after its row failed", key)


def _said(feedback: Feedback) -> tuple[str, Verdict, Label | None]:
    return feedback.reader, feedback.verdict, feedback.label
