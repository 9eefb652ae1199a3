"""The corrected copy of an image, which retrainings learn from: the store says what the rows say.

A prediction has at most one corrected copy, under the class of the latest standing correction: several readers may have
corrected it to different classes, all their verdicts are kept, the last word counts. A reader who takes a correction
back by "not sure" moves the copy to what another reader's correction says, or removes it where there is none. A later
"agree" or "not a brain MRI" of any reader removes it too: what one calls right is in doubt, and a knee is no glioma.
An image whose uploader agreed to its record only gets no copy, whatever readers say, nor does a simulated scan that a
model of real ones has answered.
"""

import logging
from collections.abc import Sequence

from neuroloop.core import keys
from neuroloop.core.errors import Erased, NotFound
from neuroloop.core.ports import ObjectStore, PredictionLog
from neuroloop.core.schemas import LABELS, Feedback, Label, Prediction, Verdict
from neuroloop.data.corrections import unused

_LOG = logging.getLogger(__name__)
_ROUNDS = 5  # of putting the store in order while other readers of the same image keep answering


def waiting(store: ObjectStore, known: dict[str, bytes] | None = None) -> list[str]:
    """Keys of the corrected images that no batch has used.

    Who asks again and again keeps the batches that were read in `known`: they are made once and never change.
    """
    read = {} if known is None else known
    batches = store.list(keys.BATCHES)
    for key in batches:
        if key not in read:
            read[key] = store.get(key)
    return unused(store.list(keys.CORRECTIONS), [read[key] for key in batches])


def may_train(prediction: Prediction) -> bool:
    """Whether the uploader's consent lets a corrected copy be trained on; of a simulated scan, by a model of such."""
    return prediction.consent != "record" and (prediction.consent != "simulated" or prediction.simulated_model)


def standing(verdicts: Sequence[Feedback]) -> Label | None:
    """The class of the latest correction; None where there is none, or a reader agrees with the answer later, or says
    that it is no brain MRI (of a refused image that is to agree)."""
    said = [one for one in verdicts if one.verdict in (Verdict.CORRECT, Verdict.AGREE, Verdict.NOT_BRAIN_MRI)]
    return max(said, key=lambda one: (one.created_at, one.reader)).label if said else None


def settle(log: PredictionLog, store: ObjectStore, prediction: Prediction) -> None:
    """Make the store say what the rows say. Raises `Erased`, then no copy is left.

    The rows are read again afterwards: had another server recorded a verdict meanwhile, both would put things in order
    from different rows, and the slower one would win with the older.
    """
    try:
        verdicts = log.feedback(prediction.id)
        for _ in range(_ROUNDS):
            label = standing(verdicts) if may_train(prediction) else None
            if label is not None:
                key = keys.correction(label, prediction.id)
                if not store.exists(key):
                    put_copy(store, prediction, key)
            for other in LABELS:
                if other != label:
                    store.delete(keys.correction(other, prediction.id))
            again = log.feedback(prediction.id)
            if again == verdicts:
                return
            verdicts = again
    except Erased:
        # The erasure may have removed the copies before the last one was put here.
        for other in LABELS:
            store.delete(keys.correction(other, prediction.id))
        raise
    _LOG.warning("the corrections of prediction %s kept changing; the next verdict puts them in order", prediction.id)


def put_copy(store: ObjectStore, prediction: Prediction, key: str) -> None:
    """Copy the image of a prediction to `key`. Raises `NotFound` where it has been removed from the store."""
    try:
        image = store.get(prediction.object_key)
    except NotFound as error:
        _LOG.warning("%s", error)
        raise NotFound(f"The image of {prediction.id} is not there any more") from None
    store.put(key, image, content_type="image/png")
