"""What crashes leave behind, and what housekeeping does about it."""

import json
import os
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg2
import pytest

from neuroloop.adapters.folder import FolderStore
from neuroloop.adapters.postgres import PostgresLog
from neuroloop.core import keys
from neuroloop.core.errors import Erased, NeuroLoopError, NotFound, Unavailable
from neuroloop.core.schemas import Erasure, Feedback, GateResult, Prediction, Verdict, now
from neuroloop.records import corrections, erasure, orphans

LATER = timedelta(hours=2)


@pytest.fixture
def log(postgres_url: str) -> PostgresLog:
    return PostgresLog(postgres_url)


def recorded(log: PostgresLog, store: FolderStore, *, consent: str = "training", at: datetime | None = None):
    """A prediction with its object and its row."""
    name = str(uuid.uuid4())
    row = Prediction(
        id=name,
        created_at=at or now(),
        sha256="ab" * 32,
        object_key=keys.prediction("glioma", name),
        label="glioma",
        probabilities={"glioma": 1.0},
        gate=GateResult(accepted=True, score=0.9, threshold=0.5, reason=""),
        model_version="1",
        data_version="d1",
        simulated_model=True,
        seconds=0.1,
        width=64,
        height=64,
        consent=consent,
    )
    store.put(row.object_key, name.encode())
    log.record_prediction(row)
    return row


def correct(log: PostgresLog, row: Prediction, label: str, reader: str = "ann") -> None:
    log.record_feedback(Feedback(prediction_id=row.id, reader=reader, verdict=Verdict.CORRECT, label=label))


# --- objects without a row ----------------------------------------------------------------------


def test_objects_without_a_row_are_removed_once_they_are_old_and_no_others(log: PostgresLog, store: FolderStore):
    row = recorded(log, store)
    left = keys.prediction("pituitary", str(uuid.uuid4()))
    moved = keys.prediction("meningioma", row.id)  # an object beside the recorded one
    refused = keys.invalid(str(uuid.uuid4()))
    foreign = f"{keys.PREDICTIONS}glioma/notes.txt"
    for key in (left, moved, refused, foreign):
        store.put(key, b"x")
    assert orphans.sweep(log, store, now() - timedelta(hours=1)) == []
    assert set(orphans.sweep(log, store, now() + LATER)) == {left, moved, refused}
    assert store.list("InferenceLogs/") == sorted([row.object_key, foreign])


def test_so_many_leftovers_that_the_database_must_be_another_one_are_not_removed(log: PostgresLog, store: FolderStore):
    found = [keys.prediction("glioma", str(uuid.uuid4())) for _ in range(60)]
    for key in found:
        store.put(key, b"x")
    with pytest.raises(NeuroLoopError, match="NEUROLOOP_DATABASE_URL"):
        orphans.sweep(log, store, now() + LATER)
    assert len(store.list(keys.PREDICTIONS)) == 60
    assert len(orphans.sweep(log, store, now() + LATER, force=True)) == 60


def test_pieces_of_writes_that_were_killed_are_removed_once_they_are_old(log: PostgresLog, store, tmp_path: Path):
    row = recorded(log, store)
    piece = tmp_path / "store" / ".neuroloop-tmp" / "tmp123"
    piece.write_bytes(b"half an ima")
    orphans.sweep(log, store, now() - timedelta(hours=1))
    assert piece.exists()
    old = (now() - timedelta(hours=3)).timestamp()
    os.utime(piece, (old, old))
    orphans.sweep(log, store, now() - timedelta(hours=1))
    assert not piece.exists()
    assert store.get(row.object_key) == row.id.encode()


# --- corrected copies ---------------------------------------------------------------------------


def test_copies_are_put_in_order_with_the_rows(log: PostgresLog, store: FolderStore):
    both, none, missing, elsewhere = (recorded(log, store) for _ in range(4))
    correct(log, both, "pituitary")
    correct(log, missing, "notumor")
    for key in (
        keys.correction("pituitary", both.id),
        keys.correction("meningioma", both.id),  # killed before it removed what was outdated
        keys.correction("pituitary", none.id),  # killed before it wrote the row
        keys.correction("meningioma", missing.id),
    ):
        store.put(key, b"copy")
    stranger = keys.correction("glioma", str(uuid.uuid4()))  # of another database: not ours to judge
    store.put(stranger, b"copy")
    correct(log, elsewhere, "pituitary")
    store.put(keys.correction("pituitary", elsewhere.id), b"as it should be")
    assert orphans.settle_corrections(log, store) == 3
    assert store.list(keys.CORRECTIONS) == sorted(
        [
            keys.correction("pituitary", both.id),
            keys.correction("notumor", missing.id),
            keys.correction("pituitary", elsewhere.id),
            stranger,
        ]
    )
    assert orphans.settle_corrections(log, store) == 0


def test_copies_of_erased_images_and_of_images_for_the_record_only_go(log: PostgresLog, store: FolderStore):
    erased, kept_only = recorded(log, store), recorded(log, store, consent="record")
    correct(log, kept_only, "pituitary")
    erasure.erase(log, store, erased.id, reason="mistake", by="ann")
    for row in (erased, kept_only):
        store.put(keys.correction("pituitary", row.id), b"copy")
    orphans.settle_corrections(log, store)
    assert store.list(keys.CORRECTIONS) == []
    assert not corrections.may_train(kept_only)


def test_a_correction_that_meets_an_erasure_leaves_no_copy(log: PostgresLog, store: FolderStore):
    row = recorded(log, store)
    correct(log, row, "pituitary")
    log.mark_erased(Erasure(prediction_id=row.id, reason="mistake", by="ann"))
    store.put(keys.correction("pituitary", row.id), b"put just after the erasure had removed it")
    with pytest.raises(Erased):
        corrections.settle(log, store, row)
    assert store.list(keys.CORRECTIONS) == []


def test_of_two_readers_both_verdicts_are_kept_and_the_latest_correction_decides(log: PostgresLog, store: FolderStore):
    row = recorded(log, store)
    correct(log, row, "pituitary", "ann")
    correct(log, row, "notumor", "ben")
    corrections.settle(log, store, row)
    assert [(one.reader, one.label) for one in log.feedback(row.id)] == [("ann", "pituitary"), ("ben", "notumor")]
    assert store.list(keys.CORRECTIONS) == [keys.correction("notumor", row.id)]


def test_a_reader_who_says_later_that_it_is_no_brain_mri_takes_the_copy_away(log: PostgresLog, store: FolderStore):
    row = recorded(log, store)
    correct(log, row, "glioma", "ann")
    corrections.settle(log, store, row)
    log.record_feedback(Feedback(prediction_id=row.id, reader="ben", verdict=Verdict.NOT_BRAIN_MRI))
    corrections.settle(log, store, row)
    assert store.list(keys.CORRECTIONS) == []
    log.record_feedback(Feedback(prediction_id=row.id, reader="ben", verdict=Verdict.NOT_SURE))
    corrections.settle(log, store, row)
    assert store.list(keys.CORRECTIONS) == [keys.correction("glioma", row.id)]


def test_a_standing_correction_whose_copy_is_missing_gets_it_back_and_counts_as_used_if_it_was(
    log: PostgresLog, store: FolderStore
):
    from neuroloop.loop import feedback

    used, waiting, placed, fresh = (recorded(log, store) for _ in range(4))

    def doubted(row: Prediction) -> None:
        """Another reader says that it is no brain MRI, and takes it back while the store is away."""
        log.record_feedback(Feedback(prediction_id=row.id, reader="ben", verdict=Verdict.NOT_BRAIN_MRI))
        corrections.settle(log, store, row)
        log.record_feedback(Feedback(prediction_id=row.id, reader="ben", verdict=Verdict.NOT_SURE))

    for row in (used, waiting, placed):
        correct(log, row, "pituitary")
        corrections.settle(log, store, row)
        if row is used:
            assert feedback.claim(store, "run-1", 0)
    doubted(used)
    doubted(waiting)
    correct(log, fresh, "notumor")  # and the server was killed before the copy
    assert orphans.settle_corrections(log, store) == 0
    assert orphans.bring_back_corrections(log, store) == 3
    kept = [keys.correction("pituitary", row.id) for row in (used, waiting, placed)]
    assert store.list(keys.CORRECTIONS) == sorted([*kept, keys.correction("notumor", fresh.id)])
    assert store.get(keys.correction("notumor", fresh.id)) == fresh.id.encode()
    assert corrections.waiting(store) == sorted([*kept[1:], keys.correction("notumor", fresh.id)])
    assert orphans.bring_back_corrections(log, store) == 0


def test_no_copy_comes_back_of_what_is_erased_for_the_record_only_no_brain_mri_or_gone(
    log: PostgresLog, store: FolderStore
):
    erased, kept_only, knee, gone, last = (
        recorded(log, store, consent=consent) for consent in ("training", "record", "training", "training", "training")
    )
    for row in (erased, kept_only, knee, gone, last):
        correct(log, row, "pituitary")
    log.mark_erased(Erasure(prediction_id=erased.id, reason="mistake", by="ann"))
    log.record_feedback(Feedback(prediction_id=knee.id, reader="ben", verdict=Verdict.NOT_BRAIN_MRI))
    store.delete(gone.object_key)
    assert orphans.bring_back_corrections(log, store) == 1
    assert store.list(keys.CORRECTIONS) == [keys.correction("pituitary", last.id)]


# --- erasure and retention ----------------------------------------------------------------------


def test_erasures_that_broke_off_are_finished(log: PostgresLog, store: FolderStore):
    row, other = recorded(log, store), recorded(log, store)
    log.mark_erased(Erasure(prediction_id=row.id, reason="requested", by="ann"))
    assert erasure.finish_all(log, store) == 1
    assert store.list("InferenceLogs/") == [other.object_key]
    assert log.erasures(unfinished=True) == []
    assert erasure.finish_all(log, store) == 0


class Refusing(FolderStore):
    """The same folder; it deletes nothing of what is kept."""

    kept: tuple[str, ...] = ("",)

    def delete(self, key: str) -> None:
        if any(name in key for name in self.kept):
            raise Unavailable("the store is away")
        super().delete(key)


def test_erasures_that_broke_off_are_finished_however_many_and_one_that_cannot_be_holds_up_no_other(
    log: PostgresLog, tmp_path: Path, postgres_url: str
):
    store = Refusing(str(tmp_path / "store"))
    stuck, last = recorded(log, store), recorded(log, store)
    store.kept = (stuck.id,)
    for number, row in enumerate((stuck, last)):
        at = now() + timedelta(hours=2 * number)
        log.mark_erased(Erasure(prediction_id=row.id, requested_at=at, reason="requested", by="ann"))
    with psycopg2.connect(postgres_url) as connection, connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO erasures SELECT gen_random_uuid()::text, now() + interval '1 hour', 'retention', 'retention'"
            " FROM generate_series(1, 1100)"
        )
    assert erasure.finish_all(log, store) == 1101
    assert [mark.prediction_id for mark in log.erasures(unfinished=True)] == [stuck.id]
    assert store.list("InferenceLogs/") == [stuck.object_key]


def test_while_the_store_is_away_the_retention_marks_one_image_counts_none_and_goes_on_later(
    log: PostgresLog, tmp_path: Path
):
    away, back = Refusing(str(tmp_path / "store")), FolderStore(str(tmp_path / "store"))
    oldest, *_ = (recorded(log, away, at=now() - timedelta(days=40 - n)) for n in range(3))
    assert erasure.expire(log, away, now() - timedelta(days=30)) == 0
    assert [mark.prediction_id for mark in log.erasures(unfinished=True)] == [oldest.id]
    assert erasure.finish_all(log, back) == 1
    assert erasure.expire(log, back, now() - timedelta(days=30)) == 2
    assert back.list("InferenceLogs/") == []


def test_what_is_older_than_the_retention_is_erased_with_its_reason(log: PostgresLog, store: FolderStore):
    old, young = recorded(log, store, at=now() - timedelta(days=31)), recorded(log, store)
    assert erasure.expire(log, store, now() - timedelta(days=30)) == 1
    assert store.list("InferenceLogs/") == [young.object_key]
    (mark,) = log.erasures()
    assert (mark.prediction_id, mark.reason, mark.by) == (old.id, "retention", "retention")
    with pytest.raises(Erased):
        log.prediction(old.id)


def test_an_erased_correction_is_in_no_later_batch(log: PostgresLog, store: FolderStore):
    from neuroloop.loop import feedback

    rows = [recorded(log, store) for _ in range(3)]
    for row in rows:
        correct(log, row, "pituitary")
        corrections.settle(log, store, row)
    assert feedback.claim(store, "run-1", 2)
    erasure.erase(log, store, rows[0].id, reason="consent_withdrawn", by="ann")
    store.put(keys.correction("pituitary", rows[1].id), b"lingering")
    log.mark_erased(Erasure(prediction_id=rows[1].id, reason="consent_withdrawn", by="ann"))
    assert len(feedback.used(store)) == 2
    assert [each.key for each in feedback.allowed(log, feedback.used(store))] == [
        keys.correction("pituitary", rows[2].id)
    ]


def test_times_of_objects_are_those_of_their_last_write(store: FolderStore):
    store.put("a", b"x")
    assert abs(store.modified("a") - datetime.now(UTC)) < timedelta(minutes=1)
    with pytest.raises(NotFound):
        store.modified("b")
    assert json.dumps(store.list("")) == '["a"]'
