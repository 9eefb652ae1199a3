"""What readers say of predictions; the corrected copies that follow from it are in `records.corrections`."""

import contextlib
from collections.abc import Callable, Sequence

from neuroloop.core import keys
from neuroloop.core.errors import NeuroLoopError
from neuroloop.core.ports import ObjectStore, PredictionLog
from neuroloop.core.schemas import LABELS, Feedback, Label, Prediction, Verdict
from neuroloop.records.corrections import may_train, put_copy, settle


class InvalidFeedback(NeuroLoopError):
    """A verdict and a class that do not go together."""


def normalise(prediction: Prediction, verdict: Verdict, label: Label | None) -> tuple[Verdict, Label | None]:
    """The verdict as it is recorded.

    Correcting to the class that was predicted means `agree`, and so does `not_brain_mri` of an image that the gate
    refused. Correcting a refused image says that it is a brain MRI of that class, `brain_mri` that it is one of
    another class or an unknown one. Raises `InvalidFeedback` unless a class comes with `correct`, always and only, and
    for `brain_mri` of an image that was taken for one.
    """
    if verdict is Verdict.CORRECT and label is None:
        raise InvalidFeedback("A correction names no class", fix=f"send label, one of {', '.join(LABELS)}")
    if verdict is not Verdict.CORRECT and label is not None:
        raise InvalidFeedback(
            f"The verdict {verdict} comes with a class", why="only correct does", fix="leave label out, or send correct"
        )
    if verdict is Verdict.BRAIN_MRI and prediction.gate.accepted:
        raise InvalidFeedback(
            "The image was taken for a brain MRI", why="brain_mri contests a rejection", fix="send agree or correct"
        )
    if verdict is Verdict.CORRECT and label == prediction.label:
        return Verdict.AGREE, None
    if verdict is Verdict.NOT_BRAIN_MRI and not prediction.gate.accepted:
        return Verdict.AGREE, None
    return verdict, label


def record(
    log: PredictionLog, store: ObjectStore, prediction: Prediction, feedback: Feedback, *, news: Callable[[], None]
) -> None:
    """Record a normalised verdict: a correction's object first, then the row, then what it outdated is removed.

    Calls `news` as soon as the row is there, if it was news: the same verdict of the same reader again, even at the
    same moment, changes nothing, unless it denies a correction that has come since. Raises `Unavailable` where store or
    database is away; the verdict may be recorded by then, and to give it again puts the copy in order, as housekeeping
    does. Raises `NotFound` where the prediction's image has been removed from the store, `Erased` where it was erased
    meanwhile.
    """
    before = log.feedback(prediction.id)
    if not _said(before, feedback):
        if feedback.label is not None and may_train(prediction):
            put_copy(store, prediction, keys.correction(feedback.label, prediction.id))
        try:
            recorded = log.record_feedback(feedback)
        except Exception:
            # Another request may have recorded the same verdict, and then the copy is its: the rows decide. Where they
            # cannot be read either, housekeeping and the next retraining ask them.
            with contextlib.suppress(NeuroLoopError):
                settle(log, store, prediction)
            raise
        if recorded:
            news()
    settle(log, store, prediction)


def _said(before: Sequence[Feedback], again: Feedback) -> bool:
    """Whether this reader's word is among these, and no correction has come since that it would deny."""
    own = next((one for one in before if one.reader == again.reader), None)
    if own is None or (own.verdict, own.label) != (again.verdict, again.label):
        return False
    denies = again.verdict in (Verdict.AGREE, Verdict.NOT_BRAIN_MRI)
    return not (denies and any(one.verdict is Verdict.CORRECT and one.created_at > own.created_at for one in before))
