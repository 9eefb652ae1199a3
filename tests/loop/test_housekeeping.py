"""Housekeeping by its command, on a real store and PostgreSQL."""

import ast
import os
import subprocess
import sys
import time
import uuid
from datetime import timedelta
from pathlib import Path

import psycopg2
import pytest

from neuroloop.adapters.folder import FolderStore
from neuroloop.bootstrap import Services
from neuroloop.core import keys
from neuroloop.core.errors import Forbidden, NeuroLoopError
from neuroloop.core.schemas import Erasure, Feedback, GateResult, Prediction, Verdict, now
from neuroloop.core.settings import Settings
from neuroloop.loop import retraining
from neuroloop.loop.housekeeping import tidy
from neuroloop.records import corrections


@pytest.fixture
def services(tmp_path: Path, postgres_url: str) -> Services:
    return Services(Settings(home=tmp_path, database_url=postgres_url, retention_days=30))


def recorded(services: Services, *, days: float = 0) -> Prediction:
    name = str(uuid.uuid4())
    row = Prediction(
        id=name,
        created_at=now() - timedelta(days=days),
        sha256="ab" * 32,
        object_key=keys.invalid(name),
        label=None,
        probabilities={},
        gate=GateResult(accepted=False, score=0.1, threshold=0.5, reason="no"),
        model_version="1",
        data_version="d1",
        simulated_model=True,
        seconds=0.1,
        width=64,
        height=64,
    )
    services.store.put(row.object_key, b"x")
    services.log.record_prediction(row)
    return row


def aged(services: Services, key: str) -> str:
    services.store.put(key, b"x")
    old = (now() - timedelta(hours=2)).timestamp()
    os.utime(services.settings.home / "store" / key, (old, old))
    return key


def test_the_command_finishes_erasures_keeps_the_retention_and_removes_leftovers(services: Services):
    kept, old, marked = recorded(services), recorded(services, days=40), recorded(services)
    services.log.mark_erased(Erasure(prediction_id=marked.id, reason="mistake", by="ann"))
    aged(services, keys.prediction("glioma", str(uuid.uuid4())))
    fresh = keys.prediction("glioma", str(uuid.uuid4()))
    services.store.put(fresh, b"being written just now")
    broken_off = [f"runs/broken/{name}" for name in ("train.npz", "shards/000-000000.npz")]
    for key in broken_off:
        services.store.put(key, b"pixels of uploads")
        week_ago = time.time() - 8 * 86_400
        os.utime(services.settings.home / "store" / key, (week_ago, week_ago))
    environment = {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "NEUROLOOP_HOME": str(services.settings.home),
        "NEUROLOOP_DATABASE_URL": services.settings.database_url,
        "NEUROLOOP_RETENTION_DAYS": "30",
    }
    command = [sys.executable, "-m", "neuroloop.cli", "sweep"]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert ast.literal_eval(done.stdout) == {
        "erasures_finished": 1,
        "expired": 1,
        "claims_forgotten": 0,
        "corrections_mended": 0,
        "leftovers_removed": 1,
    }
    assert services.store.list("runs/") == []
    assert services.store.list("InferenceLogs/") == sorted([kept.object_key, fresh])
    assert {mark.prediction_id: mark.reason for mark in services.log.erasures()} == {
        old.id: "retention",
        marked.id: "mistake",
    }


def test_of_a_file_that_was_never_answered_nothing_stays_for_longer_than_a_day(services: Services):
    services.log.claim("old", "first", "secret-hash 1")
    services.log.claim("late", "second", "other-hash 1")
    with psycopg2.connect(services.settings.database_url) as connection, connection.cursor() as cursor:
        for key, hours in (("old", 25), ("late", 23)):
            cursor.execute(
                "UPDATE requests SET claimed_at = now() - make_interval(hours => %s) WHERE key = %s", (hours, key)
            )
    assert tidy(services)["claims_forgotten"] == 1
    with psycopg2.connect(services.settings.database_url) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT key, fingerprint FROM requests")
        assert cursor.fetchall() == [("late", "other-hash 1")]
    assert services.log.claim("late", "third", "other-hash 1").prediction_id == "third"  # a retry goes on
    assert tidy(services)["claims_forgotten"] == 0


def test_what_a_broken_off_run_left_goes_even_where_the_leftovers_are_too_many_to_remove(services: Services):
    for _ in range(60):
        aged(services, keys.prediction("glioma", str(uuid.uuid4())))
    for key in ("runs/broken/train.npz", "runs/broken/shards/000-000000.npz"):
        services.store.put(key, b"pixels of uploads")
        week_ago = time.time() - 8 * 86_400
        os.utime(services.settings.home / "store" / key, (week_ago, week_ago))
    with pytest.raises(NeuroLoopError, match="have no row in the database"):
        tidy(services)
    assert services.store.list("runs/") == []
    assert len(services.store.list("InferenceLogs/")) == 60


def test_without_a_retention_nothing_expires(services: Services):
    row = recorded(services, days=4000)
    forever = Services(services.settings.model_copy(update={"retention_days": 0.0}))
    assert tidy(forever)["expired"] == 0
    assert services.log.prediction(row.id) == row


def test_the_command_and_a_retraining_bring_back_the_copy_that_a_correction_lacks(services: Services):
    for check in (lambda: tidy(services), lambda: retraining.check_source_flag(services, "run-1")):
        row = recorded(services)
        services.log.record_feedback(
            Feedback(prediction_id=row.id, reader="ann", verdict=Verdict.CORRECT, label="glioma")
        )
        check()
        assert services.store.exists(keys.correction("glioma", row.id))


def test_a_retraining_that_may_not_bring_copies_back_goes_on_with_those_there_are(services: Services):
    class AsTrainer(FolderStore):
        """The same folder, for an identity that reads no upload."""

        def get(self, key: str) -> bytes:
            if key.startswith((keys.PREDICTIONS, keys.INVALID)):
                raise Forbidden(f"cannot read {key}")
            return super().get(key)

    *whole, lacking = (recorded(services) for _ in range(3))
    for row in (*whole, lacking):
        services.log.record_feedback(
            Feedback(prediction_id=row.id, reader="ann", verdict=Verdict.CORRECT, label="glioma")
        )
    for row in whole:
        corrections.settle(services.log, services.store, row)
    trainer = Services(services.settings.model_copy(update={"feedback_threshold": 1}))
    trainer.__dict__["store"] = AsTrainer(str(services.settings.home / "store"))
    found = retraining.check_source_flag(trainer, "run-1")
    assert (found["go"], found["waiting"]) == (True, 2)
    assert not services.store.exists(keys.correction("glioma", lacking.id))
