"""Task logs in the object store, as Airflow hands them over and asks for them."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from neuroloop.adapters.folder import FolderStore
from neuroloop.bootstrap import open_store
from neuroloop.core.settings import Settings
from neuroloop.embedded.roles import environment
from neuroloop.embedded.task_logs import StoreTaskLogs
from servers.gcs_server import GcsServer

PATH = "dag_id=build/run_id=manual__2026-01-01T00:00:00+00:00/task_id=building_model/attempt=1.log"


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A worker's folder of logs, with one log in it."""
    file = tmp_path / "worker" / PATH
    file.parent.mkdir(parents=True)
    file.write_text('{"event": "epoch 1"}\n{"event": "schön"}\n')
    return tmp_path / "worker"


def test_a_log_written_on_one_worker_is_read_where_its_disk_is_not(written: Path, tmp_path: Path):
    store = FolderStore(str(tmp_path / "store"))
    StoreTaskLogs(written, store).upload(PATH)
    where, lines = StoreTaskLogs(tmp_path / "elsewhere", store).read(PATH)
    assert lines == ['{"event": "epoch 1"}\n{"event": "schön"}\n']
    assert PATH in where[0]


def test_a_log_named_by_its_full_path_is_the_same_log(written: Path, tmp_path: Path):
    store = FolderStore(str(tmp_path / "store"))
    StoreTaskLogs(written, store).upload(written / PATH)
    assert StoreTaskLogs(written, store).read(PATH)[1]


def test_a_log_that_was_never_handed_over_is_none(tmp_path: Path):
    assert StoreTaskLogs(tmp_path, FolderStore(str(tmp_path / "store"))).read(PATH) == ([], None)


def test_a_store_that_is_away_fails_no_task_and_says_where_the_log_is_left(
    written: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    blocked = tmp_path / "store"
    blocked.write_text("no folder")
    with caplog.at_level(logging.WARNING):
        StoreTaskLogs(written, FolderStore(str(blocked))).upload(PATH)
    assert "stays on this worker only" in caplog.text


def test_a_log_that_cannot_be_read_says_so_instead_of_failing(tmp_path: Path):
    with GcsServer("bucket").serve() as server:
        logs = StoreTaskLogs(tmp_path, open_store(f"gs://bucket?endpoint={server.url}"))
        assert logs.read(PATH) == ([], None)
        server.faults.extend([("GET", 400, False)] * 10)
        where, lines = logs.read(PATH)
    assert lines is None
    assert "cannot be asked" in where[0]


def test_airflow_finds_what_it_asks_for_by_the_settings_of_a_role_with_workers(tmp_path: Path):
    urls = {"airflow_broker_url": "redis://:secret@redis:6379/0", "airflow_database_url": "postgresql://a:b@c/d"}
    made = environment(Settings(home=tmp_path, **urls))
    done = subprocess.run(
        [sys.executable, "-c", "from airflow.sdk import log; print(log.load_remote_log_handler())"],
        env=os.environ | made,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "neuroloop.embedded.task_logs.StoreTaskLogs" in done.stdout
