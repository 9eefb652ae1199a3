"""The contract of `ports.PredictionLog`, on a real PostgreSQL."""

import json
import math
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg2
import pytest
import yoyo

from neuroloop.adapters import postgres
from neuroloop.adapters.postgres import PostgresLog
from neuroloop.core.errors import AlreadyExists, NeuroLoopError, NotFound, Unavailable
from neuroloop.core.schemas import Check, Feedback, GateResult, Prediction, Promotion, Verdict

START = datetime(2026, 1, 1, 12, tzinfo=UTC)


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


def test_the_ledger_is_newest_first_and_keeps_the_first_row_of_a_run(log: PostgresLog):
    first, second = promotion("one", accuracy=0.9), promotion("two", minute=5)
    log.record_promotion(first)
    log.record_promotion(second)
    log.record_promotion(promotion("one", minute=9, accuracy=0.1))
    assert log.promotions() == [second, first]
    assert log.promotions(limit=1) == [second]


def test_a_promotion_with_an_undefined_metric_is_recorded(log: PostgresLog):
    log.record_promotion(promotion("nan", feedback_accuracy=math.nan))
    assert log.promotions()[0].metrics == {"feedback_accuracy": None}


def test_monitoring_of_an_empty_log_is_all_zero(log: PostgresLog):
    figures = log.monitoring()
    assert (figures.predictions, figures.accepted, figures.rejected) == (0, 0, 0)
    assert figures.per_class == {}
    assert figures.gate_scores == ()
    assert figures.feedback == {"agree": 0, "correct": 0, "not_sure": 0, "not_brain_mri": 0}


def test_monitoring_counts_classes_probabilities_latency_and_verdicts(log: PostgresLog):
    rows = [prediction(probability=0.6 + 0.1 * n, seconds=0.1 * (n + 1), minute=n) for n in range(3)]
    rows += [prediction("pituitary", probability=0.9, seconds=1.0, minute=3, refer=True), prediction(None, minute=4)]
    for row in reversed(rows):
        log.record_prediction(row)
    for row, verdict in zip(rows, (Verdict.AGREE, Verdict.AGREE, Verdict.NOT_SURE), strict=False):
        log.record_feedback(Feedback(prediction_id=row.id, reader="ann", verdict=verdict))
    figures = log.monitoring()
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
    assert figures.feedback == {"agree": 2, "correct": 0, "not_sure": 1, "not_brain_mri": 0}


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
    assert applied == ["0001-predictions-feedback-promotions", "0002-prediction-sets-and-referrals"]


def test_rows_of_before_prediction_sets_were_kept_can_still_be_read(postgres_url: str):
    row = prediction().model_copy(update={"prediction_sets": {}})
    migrations = yoyo.read_migrations(str(Path(postgres.__file__).parent / "migrations"))
    with yoyo.get_backend(postgres_url) as backend:
        backend.apply_migrations(migrations.filter(lambda migration: migration.id.startswith("0001")))
    with psycopg2.connect(postgres_url) as connection, connection.cursor() as cursor:
        old = row.model_dump(exclude={"gate", "prediction_sets", "refer", "refer_reason"})
        old |= {"probabilities": json.dumps(row.probabilities)}
        old |= {f"gate_{name}": value for name, value in row.gate.model_dump().items()}
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
