"""The contract of `ports.PredictionLog`, on a real PostgreSQL."""

import json
import math
import os
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg2
import pytest
import yoyo

from neuroloop.adapters import postgres
from neuroloop.adapters.postgres import PostgresLog
from neuroloop.core.errors import (
    AlreadyExists,
    Erased,
    InvalidSetting,
    KeyReused,
    NeuroLoopError,
    NotFound,
    OutOfSpace,
    Unavailable,
    Uncertain,
)
from neuroloop.core.schemas import (
    Check,
    Erasure,
    Feedback,
    GateResult,
    PipelineEnd,
    Prediction,
    Promotion,
    Verdict,
    now,
)
from servers.relay import Relay

# The morning of two days ago, within what monitoring looks at.
START = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=2)


@pytest.fixture
def log(postgres_url: str) -> PostgresLog:
    return PostgresLog(postgres_url)


def prediction(
    label: str | None = "glioma",
    *,
    probability: float = 0.7,
    seconds: float = 0.1,
    minute: int = 0,
    refer: bool = False,
):
    rest = (1 - probability) / 3
    probabilities = dict.fromkeys(("glioma", "meningioma", "notumor", "pituitary"), rest) | {label: probability}
    return Prediction(
        id=str(uuid.uuid4()),
        created_at=START + timedelta(minutes=minute, microseconds=123),
        sha256="ab" * 32,
        object_key="InferenceLogs/ImageLogs/x.png",
        label=label,
        probabilities=probabilities if label else {},
        gate=GateResult(accepted=label is not None, score=0.9 if label else 0.1, threshold=0.5, reason=""),
        model_version="3",
        data_version="0123",
        simulated_model=True,
        seconds=seconds,
        width=512,
        height=400,
        prediction_sets={"0.90": (label,), "0.95": (label, "notumor")} if label else {},
        refer=refer,
        refer_reason="The largest probability is too small." if refer else "",
    )


def promotion(run_id: str, *, minute: int = 0, **metrics) -> Promotion:
    return Promotion(
        run_id=run_id,
        created_at=START + timedelta(minutes=minute),
        version="2",
        previous=None,
        promoted=True,
        checks=(Check(name="baseline", passed=True, reason="Beats 1-NN by 3 points, “clearly”."),),
        metrics=metrics,
    )


def test_a_prediction_comes_back_as_it_was_recorded(log: PostgresLog):
    rows = prediction(), prediction(refer=True), prediction(None)
    for row in rows:
        log.record_prediction(row)
    assert [log.prediction(row.id) for row in rows] == list(rows)


def test_a_database_that_takes_no_writes_is_away_until_it_does(log: PostgresLog, postgres_url: str):
    log.check()
    name = postgres_url.rsplit("/", 1)[1].partition("?")[0]
    with log._transaction() as cursor:
        cursor.execute(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
    try:
        later = PostgresLog(postgres_url)
        with pytest.raises(Unavailable, match="takes no writes"):
            later.check()
        with pytest.raises(Unavailable, match="read-only transaction"):
            later.record_prediction(prediction())
        later.close()
    finally:
        with log._transaction() as cursor:
            cursor.execute(f'ALTER DATABASE "{name}" RESET default_transaction_read_only')
    log.close()
    PostgresLog(postgres_url).check()


def test_a_repeated_prediction_id_is_refused_and_the_first_row_stays(log: PostgresLog):
    first = prediction()
    log.record_prediction(first)
    with pytest.raises(AlreadyExists):
        log.record_prediction(first.model_copy(update={"label": "pituitary"}))
    assert log.prediction(first.id).label == "glioma"


@pytest.mark.parametrize("unknown", ["no-such-id", "'; DROP TABLE predictions; --", "nul\0byte", "\ud800"])
def test_an_unknown_prediction_is_not_found_whatever_its_id(log: PostgresLog, unknown: str):
    with pytest.raises(NotFound):
        log.prediction(unknown)
    with pytest.raises(NotFound):
        log.record_feedback(Feedback.model_construct(prediction_id=unknown, reader="a", verdict=Verdict.AGREE))
    assert log.monitoring().predictions == 0


def test_a_later_verdict_of_the_same_reader_replaces_the_earlier_one(log: PostgresLog):
    row = prediction()
    log.record_prediction(row)
    ann = Feedback(prediction_id=row.id, reader="ann", verdict=Verdict.AGREE, created_at=START)
    bob = Feedback(prediction_id=row.id, reader="bob", verdict=Verdict.NOT_SURE, created_at=START + timedelta(hours=1))
    changed = Feedback(
        prediction_id=row.id,
        reader="ann",
        verdict=Verdict.CORRECT,
        label="pituitary",
        created_at=START + timedelta(hours=2),
    )
    for verdict in (ann, bob, changed):
        log.record_feedback(verdict)
    assert log.feedback(row.id) == [bob, changed]
    assert not log.record_feedback(ann.model_copy(update={"verdict": Verdict.NOT_SURE}))  # one that hung for a while
    assert log.feedback(row.id) == [bob, changed]


def test_the_predictions_that_readers_correct_come_page_by_page_each_once_and_without_the_erased(log: PostgresLog):
    rows = [prediction() for _ in range(7)]
    for row in rows:
        log.record_prediction(row)
    for row in rows[:5]:
        for reader, label in (("ann", "pituitary"), ("bob", "notumor")):
            log.record_feedback(Feedback(prediction_id=row.id, reader=reader, verdict=Verdict.CORRECT, label=label))
    log.record_feedback(Feedback(prediction_id=rows[0].id, reader="eve", verdict=Verdict.NOT_BRAIN_MRI))
    log.record_feedback(Feedback(prediction_id=rows[5].id, reader="ann", verdict=Verdict.AGREE))
    log.mark_erased(Erasure(prediction_id=rows[4].id, reason="mistake", by="ann"))
    pages = [log.corrected(limit=3)]
    while pages[-1]:
        pages.append(log.corrected(pages[-1][-1], limit=3))
    assert [len(page) for page in pages] == [3, 1, 0]
    assert sorted(pages[0] + pages[1]) == sorted(row.id for row in rows[:4])


def test_a_class_goes_only_with_the_verdict_correct(log: PostgresLog):
    row = prediction()
    log.record_prediction(row)
    with pytest.raises(NeuroLoopError, match="verdict"):
        log.record_feedback(Feedback(prediction_id=row.id, reader="ann", verdict=Verdict.AGREE, label="glioma"))
    with pytest.raises(NeuroLoopError, match="verdict"):
        log.record_feedback(Feedback(prediction_id=row.id, reader="ann", verdict=Verdict.CORRECT))
    assert log.feedback(row.id) == []


def test_a_reader_whose_name_cannot_be_stored_is_told_so(log: PostgresLog):
    row = prediction()
    log.record_prediction(row)
    with pytest.raises(NeuroLoopError, match="reader"):
        log.record_feedback(Feedback(prediction_id=row.id, reader="a\0b", verdict=Verdict.AGREE))


# --- idempotency keys ---------------------------------------------------------------------------


def test_of_many_claims_of_one_key_at_once_all_get_one_prediction(postgres_url: str):
    logs = [PostgresLog(postgres_url) for _ in range(2)]  # as two servers
    with ThreadPoolExecutor(16) as pool:
        claims = list(pool.map(lambda n: logs[n % 2].claim("key", f"id-{n}", "asked"), range(40)))
    assert len({claim.prediction_id for claim in claims}) == 1
    assert not any(claim.answered for claim in claims)


def test_a_key_with_another_request_is_refused_and_keeps_its_claim(log: PostgresLog):
    log.claim("key", "first", "asked")
    with pytest.raises(KeyReused, match="new key"):
        log.claim("key", "second", "asked otherwise")
    assert log.claim("key", "third", "asked").prediction_id == "first"


def test_of_two_rows_for_one_claim_the_first_stays_and_is_the_answer(log: PostgresLog):
    row = prediction()
    log.claim("key", row.id, "asked")
    log.record_prediction(row, request="key", explanation={"cam": "x"})
    with pytest.raises(AlreadyExists):
        log.record_prediction(row.model_copy(update={"label": "pituitary"}), request="key")
    again = log.claim("key", "another", "asked")
    assert (again.prediction_id, again.answered, again.explanation) == (row.id, True, {"cam": "x"})
    assert log.claimed(row.id) == again
    assert log.prediction(row.id).label == "glioma"


def test_a_claim_that_was_given_up_gets_a_new_id_and_the_old_request_can_no_longer_answer_it(
    log: PostgresLog, postgres_url: str
):
    slow, fresh = prediction(), prediction()
    log.claim("key", slow.id, "asked")
    with psycopg2.connect(postgres_url) as connection, connection.cursor() as cursor:
        cursor.execute("UPDATE requests SET claimed_at = now() - interval '11 minutes'")
    assert log.claim("key", fresh.id, "asked").prediction_id == fresh.id
    with pytest.raises(AlreadyExists):
        log.record_prediction(slow, request="key")
    log.record_prediction(fresh, request="key")
    with pytest.raises(NotFound):
        log.prediction(slow.id)
    with psycopg2.connect(postgres_url) as connection, connection.cursor() as cursor:
        cursor.execute("UPDATE requests SET claimed_at = now() - interval '11 minutes'")
    assert log.claim("key", "yet another", "asked").prediction_id == fresh.id  # answered: for ever


def test_claims_that_were_never_answered_can_be_forgotten_and_no_others(log: PostgresLog):
    row = prediction()
    log.claim("answered", row.id, "asked")
    log.record_prediction(row, request="answered")
    log.claim("never", "never", "asked")
    assert log.forget_claims(log.clock() - timedelta(hours=1)) == 0
    assert log.forget_claims(log.clock() + timedelta(hours=1)) == 1
    assert log.claimed(row.id).answered
    with pytest.raises(NotFound):
        log.claimed("never")
    assert log.claim("never", "anew", "asked otherwise").prediction_id == "anew"


# --- erasure ------------------------------------------------------------------------------------


def test_an_erased_prediction_leaves_a_mark_without_content_in_the_database(log: PostgresLog, postgres_url: str):
    row, other = prediction(), prediction()
    log.claim("key", row.id, "asked-for-secret")
    log.record_prediction(row, request="key", explanation={"cam": "secret"})
    log.record_prediction(other)
    log.record_feedback(Feedback(prediction_id=row.id, reader="secret", verdict=Verdict.AGREE))
    mark = log.mark_erased(Erasure(prediction_id=row.id, reason="mistake", by="ann"))
    assert mark.finished_at is None
    assert log.erasures(unfinished=True) == [mark]
    for ask in (log.prediction, log.feedback):
        with pytest.raises(Erased, match="another Idempotency-Key") as error:
            ask(row.id)
        assert "ann" not in str(error.value)
    with pytest.raises(Erased):
        log.record_feedback(Feedback(prediction_id=row.id, reader="bob", verdict=Verdict.AGREE))
    assert set(log.known([row.id, other.id])) == {other.id}
    assert log.older(START + timedelta(days=1)) == [other.id]
    finished = log.finish_erasure(row.id)
    assert finished.finished_at is not None
    assert finished == log.finish_erasure(row.id) == log.erasures()[0]
    assert log.mark_erased(Erasure(prediction_id=row.id, reason="requested", by="bob")) == finished
    assert log.erasures(unfinished=True) == []
    assert log.erased([row.id, other.id]) == {row.id}
    claim = log.claim("key", "new", "asked anew")
    assert (claim.prediction_id, claim.answered, claim.explanation) == (row.id, True, None)
    dumped = ""
    with psycopg2.connect(postgres_url) as connection, connection.cursor() as cursor:
        for table in ("predictions", "feedback", "requests", "erasures"):
            cursor.execute(f"SELECT coalesce(json_agg({table}), '[]')::text FROM {table}")
            dumped += cursor.fetchone()[0]
    assert "secret" not in dumped
    assert row.id in dumped


def test_marks_come_newest_first_and_the_unfinished_ones_oldest_first(log: PostgresLog):
    marks = []
    for minute in (1, 2, 3):
        row = prediction()
        log.record_prediction(row)
        at = START + timedelta(minutes=minute)
        marks.append(log.mark_erased(Erasure(prediction_id=row.id, requested_at=at, reason="mistake", by="ann")))
    assert log.erasures() == marks[::-1]
    assert log.erasures(unfinished=True) == marks
    assert log.erasures(unfinished=True, limit=2) == marks[:2]
    log.finish_erasure(marks[0].prediction_id)
    assert log.erasures(unfinished=True, limit=2) == marks[1:]


def test_what_was_never_recorded_cannot_be_erased(log: PostgresLog):
    with pytest.raises(NotFound):
        log.mark_erased(Erasure(prediction_id="none", reason="mistake", by="ann"))
    with pytest.raises(NotFound):
        log.finish_erasure("none")


def test_a_verdict_that_arrives_while_its_prediction_is_erased_goes_with_it(log: PostgresLog, postgres_url: str):
    row = prediction()
    log.record_prediction(row)
    with psycopg2.connect(postgres_url) as slow, slow.cursor() as cursor, ThreadPoolExecutor(1) as pool:
        cursor.execute(
            "INSERT INTO feedback (prediction_id, reader, verdict, created_at) VALUES (%s, 'ann', 'agree', now())",
            (row.id,),
        )
        log.mark_erased(Erasure(prediction_id=row.id, reason="mistake", by="ann"))
        finishing = pool.submit(log.finish_erasure, row.id)
        wait_for_a_lock(postgres_url)
        slow.commit()
        assert finishing.result(timeout=30).finished_at
    with psycopg2.connect(postgres_url) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT (SELECT count(*) FROM feedback), (SELECT count(*) FROM predictions)")
        assert cursor.fetchone() == (0, 0)


def wait_for_a_lock(url: str) -> None:
    """Until some transaction of this database waits for another one's lock."""
    with psycopg2.connect(url) as connection:
        connection.autocommit = True
        deadline = time.monotonic() + 30
        with connection.cursor() as cursor:
            while time.monotonic() < deadline:
                cursor.execute("SELECT count(*) FROM pg_locks WHERE NOT granted")
                if cursor.fetchone()[0]:
                    return
                time.sleep(0.02)
    pytest.fail("nobody waits")


# --- ledger and monitoring ----------------------------------------------------------------------


def test_the_same_verdict_again_is_no_news(log: PostgresLog):
    row = prediction()
    log.record_prediction(row)
    said = [Feedback(prediction_id=row.id, reader="ann", verdict=Verdict.CORRECT, label="pituitary") for _ in range(20)]
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(log.record_feedback, said)) == 1
    assert len(log.feedback(row.id)) == 1
    # Of the twenty any may have come first, and an older verdict replaces none.
    assert log.record_feedback(said[-1].model_copy(update={"label": "glioma"}))


def test_the_ledger_is_newest_first_and_keeps_the_first_row_of_a_run(log: PostgresLog):
    first, second = promotion("one", accuracy=0.9), promotion("two", minute=5)
    log.record_promotion(first)
    log.record_promotion(second)
    log.record_promotion(promotion("one", minute=9, accuracy=0.1))
    assert log.promotions() == [second, first]
    assert log.promotions(limit=1) == [second]


def test_the_ledger_since_a_run_holds_its_row_and_those_after_it(log: PostgresLog):
    for minute, run in enumerate(("first", "second", "third")):
        log.record_promotion(promotion(run, minute=minute))
    assert [row.run_id for row in log.promotions_since("second")] == ["third", "second"]
    assert [row.run_id for row in log.promotions_since("third")] == ["third"]
    assert log.promotions_since("unknown") == []


def test_a_promotion_with_an_undefined_metric_is_recorded(log: PostgresLog):
    log.record_promotion(promotion("nan", feedback_accuracy=math.nan))
    assert log.promotions()[0].metrics == {"feedback_accuracy": None}


def test_monitoring_of_an_empty_log_is_all_zero(log: PostgresLog):
    figures = log.monitoring()
    assert (figures.predictions, figures.accepted, figures.rejected) == (0, 0, 0)
    assert figures.per_class == {}
    assert figures.gate_scores == ()
    assert figures.feedback == {"agree": 0, "correct": 0, "not_sure": 0, "not_brain_mri": 0, "brain_mri": 0}


def test_monitoring_counts_classes_probabilities_latency_and_verdicts(log: PostgresLog):
    rows = [prediction(probability=0.6 + 0.1 * n, seconds=0.1 * (n + 1), minute=n) for n in range(3)]
    rows += [prediction("pituitary", probability=0.9, seconds=1.0, minute=3, refer=True), prediction(None, minute=4)]
    for row in reversed(rows):
        log.record_prediction(row)
    for row, verdict in zip(rows, (Verdict.AGREE, Verdict.AGREE, Verdict.NOT_SURE), strict=False):
        log.record_feedback(Feedback(prediction_id=row.id, reader="ann", verdict=verdict))
    assert log.monitoring().contested == 0
    for reader in ("ann", "bob"):
        log.record_feedback(Feedback(prediction_id=rows[-1].id, reader=reader, verdict=Verdict.BRAIN_MRI))
    figures = log.monitoring()
    assert figures.contested == 1
    assert (figures.predictions, figures.accepted, figures.rejected, figures.referred) == (5, 4, 1, 1)
    assert {label: of.referred for label, of in figures.per_class.items()} == {"glioma": 0, "pituitary": 1}
    assert set(figures.per_class) == {"glioma", "pituitary"}
    glioma = figures.per_class["glioma"]
    assert glioma.predictions == 3
    assert glioma.mean_probability == pytest.approx(0.7)
    assert glioma.mean_seconds == pytest.approx(0.2)
    assert glioma.p95_seconds == pytest.approx(0.29)  # linear interpolation between 0.2 and 0.3
    assert [point.at for point in figures.gate_scores] == [row.created_at for row in rows]
    assert [point.accepted for point in figures.gate_scores] == [True] * 4 + [False]
    assert figures.feedback == {"agree": 2, "correct": 0, "not_sure": 1, "not_brain_mri": 0, "brain_mri": 2}


def test_monitoring_leaves_out_what_is_older_than_30_days(log: PostgresLog):
    for label in ("glioma", None):
        for days in (29, 31):
            row = prediction(label).model_copy(update={"created_at": now() - timedelta(days=days)})
            log.record_prediction(row)
            verdict = Verdict.AGREE if label else Verdict.BRAIN_MRI
            said = {"prediction_id": row.id, "reader": "ann", "verdict": verdict}
            log.record_feedback(Feedback(**said, created_at=row.created_at))
    figures = log.monitoring()
    assert (figures.predictions, figures.accepted, figures.rejected, figures.contested) == (2, 1, 1, 1)
    assert figures.per_class["glioma"].predictions == 1
    assert len(figures.gate_scores) == 2
    assert (figures.feedback["agree"], figures.feedback["brain_mri"]) == (1, 1)


def test_monitoring_finds_the_days_it_looks_at_by_the_indices_on_created_at(log: PostgresLog):
    with log._transaction() as cursor:
        cursor.execute("SET LOCAL enable_seqscan = off")  # with a handful of rows the planner would read them all
        cursor.execute(f"EXPLAIN {postgres._MONITORING}", {"points": 500, "days": 30})
        plan = "\n".join(row["QUERY PLAN"] for row in cursor.fetchall())
    assert "predictions_created_at" in plan
    assert "feedback_created_at" in plan
    assert "Seq Scan on predictions" not in plan


def test_the_gate_time_line_holds_the_latest_500_only(log: PostgresLog):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(log.record_prediction, [prediction(minute=n) for n in range(503)]))
    points = log.monitoring().gate_scores
    assert len(points) == 500
    assert points[0].at == prediction(minute=3).created_at
    assert points[-1].at == prediction(minute=502).created_at


def test_many_threads_share_a_few_connections(postgres_url: str):
    log = PostgresLog(postgres_url, connections=2)
    rows = [prediction(minute=n) for n in range(40)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(log.record_prediction, rows))
    assert log.monitoring().predictions == 40
    with psycopg2.connect(postgres_url) as connection, connection.cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'neuroloop'"
            " AND datname = current_database()"
        )
        assert cursor.fetchone()[0] <= 2


def test_a_process_killed_at_any_commit_of_the_migrations_is_followed_by_one_that_finishes_them(
    postgres_server, free_port
):
    program = "import sys; from neuroloop.adapters.postgres import PostgresLog; PostgresLog(sys.argv[1]).promotions()"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    commits = last = 0

    def committed() -> None:
        nonlocal commits
        commits += 1
        if commits == last:
            child.kill()  # it has not had the answer yet

    with Relay(postgres_server.port, free_port()) as relay:
        relay.tell_of(b"COMMIT", committed)
        for last in range(1, 50):  # noqa: B007 (`committed` reads it)
            commits, url = 0, postgres_server.new_database()
            child = subprocess.Popen(
                [sys.executable, "-c", program, url.replace(str(postgres_server.port), str(relay.port))],
                env=environment,
            )
            if child.wait(120) == 0:
                break
            assert PostgresLog(url).promotions() == []
    assert last > len(list((Path(postgres.__file__).parent / "migrations").glob("*.sql")))


def test_processes_that_start_at_once_migrate_an_empty_database_once(postgres_url: str):
    code = "import sys; from neuroloop.adapters.postgres import PostgresLog; PostgresLog(sys.argv[1]).check()"
    path = ":".join(entry for entry in sys.path if entry)
    processes = [
        subprocess.Popen([sys.executable, "-c", code, postgres_url], env={"PYTHONPATH": path}, stderr=subprocess.PIPE)
        for _ in range(4)
    ]
    errors = [process.communicate(timeout=60)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, errors
    with psycopg2.connect(postgres_url) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT migration_id FROM _yoyo_migration ORDER BY 1")
        applied = [row[0] for row in cursor.fetchall()]
    assert applied == sorted(file.stem for file in (Path(postgres.__file__).parent / "migrations").glob("*.sql"))
    assert len(applied) >= 3


def test_rows_of_before_prediction_sets_were_kept_can_still_be_read(postgres_url: str):
    row = prediction().model_copy(update={"prediction_sets": {}})
    migrations = yoyo.read_migrations(str(Path(postgres.__file__).parent / "migrations"))
    with yoyo.get_backend(postgres_url) as backend:
        backend.apply_migrations(migrations.filter(lambda migration: migration.id.startswith("0001")))
    with psycopg2.connect(postgres_url) as connection, connection.cursor() as cursor:
        old = row.model_dump(exclude={"gate", "prediction_sets", "refer", "refer_reason", "consent", "owner"})
        old |= {"probabilities": json.dumps(row.probabilities)}
        old |= {f"gate_{name}": value for name, value in row.gate.model_dump(exclude={"novelty"}).items()}
        cursor.execute(
            f"INSERT INTO predictions ({', '.join(old)}) VALUES ({', '.join(f'%({name})s' for name in old)})", old
        )
    assert PostgresLog(postgres_url).prediction(row.id) == row
    assert PostgresLog(postgres_url).monitoring().referred == 0


def test_a_new_process_finds_the_rows_of_an_earlier_one(postgres_url: str):
    row = prediction()
    PostgresLog(postgres_url).record_prediction(row)
    assert PostgresLog(postgres_url).prediction(row.id) == row


def test_a_statement_that_waits_too_long_is_unavailable(postgres_url: str):
    log = PostgresLog(postgres_url, timeout=0.5)
    log.check()
    with psycopg2.connect(postgres_url) as other, other.cursor() as cursor:
        cursor.execute("LOCK TABLE predictions")
        with pytest.raises(Unavailable, match="timeout"):
            log.record_prediction(prediction())
    log.record_prediction(prediction())


def test_a_server_restart_costs_no_later_call(postgres_server, log: PostgresLog):
    row = prediction()
    log.record_prediction(row)
    postgres_server.stop()
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1"):
        log.check()
    postgres_server.start()
    assert log.prediction(row.id) == row


def test_an_unreachable_database_is_unavailable_and_its_password_stays_secret(free_port):
    log = PostgresLog(f"postgresql://user:hunter2@127.0.0.1:{free_port()}/name")
    with pytest.raises(Unavailable, match="NEUROLOOP_DATABASE_URL") as caught:
        log.check()
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("rest", ["S3cr%et@host/name", "S3c/ret@host/name", "S3cret@[]/name", "S3cret@host/name?x=1"])
def test_a_url_that_the_client_cannot_read_is_refused_and_its_password_stays_secret(rest):
    with pytest.raises(InvalidSetting, match="percent-encoded") as caught:
        PostgresLog(f"postgresql://user:{rest}")
    assert "S3c" not in str(caught.value)


def test_a_server_that_falls_silent_costs_no_thread(postgres_server, postgres_url: str, free_port):
    with Relay(postgres_server.port, free_port()) as relay:
        through = postgres_url.replace(f":{postgres_server.port}/", f":{relay.port}/")
        log = PostgresLog(through, timeout=1.0)
        row = prediction()
        log.record_prediction(row)
        relay.stall()
        started = time.monotonic()
        with pytest.raises(Unavailable):
            log.prediction(row.id)
        assert time.monotonic() - started < 30  # it would wait for ever
        relay.flow()
        assert log.prediction(row.id) == row
        assert log.monitoring().predictions == 1


def test_a_row_whose_commit_broke_off_is_reported_as_uncertain_not_as_missing(
    postgres_server, postgres_url: str, free_port
):
    with Relay(postgres_server.port, free_port()) as relay:
        through = postgres_url.replace(f":{postgres_server.port}/", f":{relay.port}/")
        log = PostgresLog(through, timeout=1.0)
        log.check()
        row = prediction()
        relay.swallow_answer_to(b"COMMIT")
        with pytest.raises(Uncertain):
            log.record_prediction(row)
        assert PostgresLog(postgres_url).prediction(row.id) == row


def test_a_database_without_room_says_so(log: PostgresLog, postgres_url: str):
    with psycopg2.connect(postgres_url) as connection, connection.cursor() as cursor:
        log.check()
        cursor.execute(
            "CREATE FUNCTION no_room() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE disk_full USING MESSAGE = 'could not extend file'; END $$;"
            " CREATE TRIGGER no_room BEFORE INSERT ON predictions EXECUTE FUNCTION no_room()"
        )
        connection.commit()
    with pytest.raises(OutOfSpace, match="could not extend"):
        log.record_prediction(prediction())


# --- figures of the loop ------------------------------------------------------------------------


def test_of_each_way_that_a_dag_ended_the_latest_run_is_kept(log: PostgresLog):
    def end(dag: str, outcome: str, minute: int) -> PipelineEnd:
        at = START + timedelta(minutes=minute)
        return PipelineEnd(dag=dag, outcome=outcome, run_id=f"run-{minute}", task="t", ended_at=at)

    for each in (end("a", "failed", 2), end("a", "failed", 5), end("a", "failed", 3), end("a", "done", 1)):
        log.record_end(each)
    log.record_end(end("b", "failed", 1))
    assert log.loop_figures().ends == (end("a", "done", 1), end("a", "failed", 5), end("b", "failed", 1))


def test_live_accuracy_counts_the_last_word_on_each_accepted_answer(log: PostgresLog):
    rows = [prediction(), prediction(), prediction(), prediction(None), prediction(refer=True)]
    for row in rows:
        log.record_prediction(row)

    def say(row: Prediction, reader: str, verdict: Verdict, days: float, label: str | None = None) -> None:
        at = datetime.now(UTC) - timedelta(days=days)
        log.record_feedback(Feedback(prediction_id=row.id, reader=reader, verdict=verdict, label=label, created_at=at))

    say(rows[0], "ann", Verdict.CORRECT, 3, "pituitary")
    say(rows[0], "bob", Verdict.AGREE, 2)
    say(rows[0], "eve", Verdict.NOT_SURE, 1)
    say(rows[1], "ann", Verdict.NOT_BRAIN_MRI, 1)
    say(rows[2], "ann", Verdict.CORRECT, 31, "notumor")  # too long ago
    say(rows[3], "ann", Verdict.AGREE, 1)  # the gate's refusal is no answer of the model
    say(rows[4], "ann", Verdict.AGREE, 1)  # nor is what is left to a reader
    (accuracy,) = log.loop_figures().accuracy
    assert (accuracy.model_version, accuracy.reviewed, accuracy.right) == ("3", 2, 1)


def test_drift_compares_the_first_and_the_latest_answers_of_the_model_that_answers_now(
    log: PostgresLog, postgres_url: str
):
    log.check()
    with psycopg2.connect(postgres_url) as connection, connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO predictions SELECT n::text, now() + n * interval '1 second', 's', 'k', 'glioma',"
            " '{\"glioma\": 0.7, \"notumor\": 0.3}', true, n / 10000.0, 0.5, '',"
            " CASE WHEN n <= 10 THEN '1' ELSE '2' END, 'd', true, 0.1, 9, 9 FROM generate_series(1, 1300) n"
        )
    figures = log.loop_figures()
    assert len(figures.first_answers) == 1000
    assert len(figures.latest_answers) == 290
    assert min(each.gate_score for each in figures.first_answers) == pytest.approx(0.0011)
    assert max(each.gate_score for each in figures.latest_answers) == pytest.approx(0.13)
    assert {each.largest_probability for each in figures.latest_answers} == {0.7}


# --- upgrades -----------------------------------------------------------------------------------

MIGRATIONS = sorted((Path(postgres.__file__).parent / "migrations").glob("*.sql"))


def schema_of(url: str) -> list[tuple]:
    """Columns, constraints and indexes, as the catalogue has them."""
    with psycopg2.connect(url) as connection, connection.cursor() as cursor:
        cursor.execute(
            "SELECT table_name, column_name, data_type, is_nullable, column_default FROM information_schema.columns"
            " WHERE table_schema = 'public'"
            " UNION ALL SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid), '', '' FROM pg_constraint"
            " WHERE connamespace = 'public'::regnamespace"
            " UNION ALL SELECT tablename, indexname, indexdef, '', '' FROM pg_indexes WHERE schemaname = 'public'"
            " ORDER BY 1, 2, 3"
        )
        return cursor.fetchall()


@pytest.mark.parametrize("applied", range(1, len(MIGRATIONS)))
def test_from_every_earlier_schema_on_an_upgrade_keeps_the_rows_and_ends_at_the_same_schema(
    postgres_server, postgres_url: str, applied: int
):
    row, names = prediction(), {file.stem for file in MIGRATIONS[:applied]}
    migrations = yoyo.read_migrations(str(MIGRATIONS[0].parent))
    with yoyo.get_backend(postgres_url) as backend:
        backend.apply_migrations(migrations.filter(lambda migration: migration.id in names))
    with psycopg2.connect(postgres_url) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT column_name FROM information_schema.columns WHERE table_name = 'predictions'")
        there = {name for (name,) in cursor.fetchall()}
        old = row.model_dump(exclude={"gate"})
        old |= {name: json.dumps(old[name]) for name in ("probabilities", "prediction_sets")}
        old |= {f"gate_{name}": value for name, value in row.gate.model_dump().items()}
        old = {name: value for name, value in old.items() if name in there}
        cursor.execute(
            f"INSERT INTO predictions ({', '.join(old)}) VALUES ({', '.join(f'%({name})s' for name in old)})", old
        )
        cursor.execute("INSERT INTO feedback VALUES (%s, 'ann', 'correct', 'pituitary', now())", (row.id,))
        cursor.execute("INSERT INTO promotions VALUES ('r', now(), '1', NULL, true, '[]', '{}')")
    log = PostgresLog(postgres_url)
    assert log.prediction(row.id).probabilities == row.probabilities
    assert [each.label for each in log.feedback(row.id)] == ["pituitary"]
    assert len(log.promotions()) == 1
    fresh = postgres_server.new_database()
    PostgresLog(fresh).check()
    assert schema_of(postgres_url) == schema_of(fresh)


def test_migrations_go_forward_only_in_an_order_that_their_names_fix():
    numbers = [int(file.name.split("-")[0]) for file in MIGRATIONS]
    assert numbers == sorted(set(numbers))
    assert not list(MIGRATIONS[0].parent.glob("*.rollback.sql"))
    assert not list(MIGRATIONS[0].parent.glob("*.py"))


def test_a_database_of_a_later_program_is_left_as_it_is(postgres_url: str, tmp_path: Path):
    PostgresLog(postgres_url).check()
    (tmp_path / "9999-later.sql").write_text("CREATE TABLE later (n integer);")
    with yoyo.get_backend(postgres_url) as backend:
        backend.apply_migrations(yoyo.read_migrations(str(tmp_path)))
    log, row = PostgresLog(postgres_url), prediction()
    log.record_prediction(row)
    assert log.prediction(row.id) == row
    assert any(each[0] == "later" for each in schema_of(postgres_url))
