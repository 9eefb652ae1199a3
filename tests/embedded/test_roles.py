"""Addresses in containers: what a browser uses and what the parts use among themselves differ."""

from fnmatch import fnmatch
from pathlib import Path

from neuroloop.core.settings import Settings
from neuroloop.embedded.roles import EMBEDDED, ROLES, environment

CONTAINER = Settings(
    home=Path("/state"),
    bind="0.0.0.0",
    airflow_url="https://airflow.example",
    airflow_internal_url="http://airflow-api:8080",
    mlflow_tracking_uri="http://mlflow:5000",
    mlflow_url="https://mlflow.example",
)
LAPTOP = Settings(airflow_url="http://127.0.0.1:8123", mlflow_tracking_uri="http://127.0.0.1:5123")


def mlflow_hosts(settings: Settings) -> list[str]:
    argv = ROLES["mlflow"].argv(settings)
    return argv[argv.index("--allowed-hosts") + 1].split(",")


def test_airflow_links_for_a_browser_and_talks_by_its_internal_address():
    made = environment(CONTAINER)
    assert made["AIRFLOW__API__BASE_URL"] == "https://airflow.example"
    assert made["AIRFLOW__CORE__EXECUTION_API_SERVER_URL"] == "http://airflow-api:8080/execution/"
    waited_for = [need(CONTAINER) for need in ROLES["scheduler"].needs]
    assert "http://airflow-api:8080/api/v2/version" in waited_for


def test_without_an_internal_address_the_public_one_serves_for_both():
    made = environment(LAPTOP)
    assert made["AIRFLOW__API__BASE_URL"] == "http://127.0.0.1:8123"
    assert made["AIRFLOW__CORE__EXECUTION_API_SERVER_URL"] == "http://127.0.0.1:8123/execution/"
    assert LAPTOP.mlflow_page == "http://127.0.0.1:5123"


def test_mlflow_may_be_called_by_its_own_names_and_from_this_machine_only():
    hosts = mlflow_hosts(CONTAINER)
    for good in ("mlflow:5000", "mlflow.example", "127.0.0.1:25000", "localhost:5000"):
        assert any(fnmatch(good, host) for host in hosts), good
    for bad in ("evil.example", "evil.example:5000", "127.0.0.1.evil.example"):
        assert not any(fnmatch(bad, host) for host in hosts), bad


def test_the_api_starts_without_waiting_for_a_database_that_may_be_down():
    assert ROLES["api"].needs == ()


def test_with_a_queue_workers_run_the_tasks_and_their_logs_outlive_them():
    made = environment(
        Settings(
            airflow_broker_url="redis://:secret@redis:6379/0",
            airflow_database_url="postgresql://airflow@postgres:5432/airflow",
        )
    )
    assert made["AIRFLOW__CORE__EXECUTOR"] == "CeleryExecutor"
    assert made["AIRFLOW__CELERY__BROKER_URL"] == "redis://:secret@redis:6379/0"
    assert made["AIRFLOW__CELERY__RESULT_BACKEND"].startswith("db+postgresql+psycopg2://airflow@")
    assert made["AIRFLOW__LOGGING__LOGGING_CONFIG_CLASS"].startswith("neuroloop.embedded.task_logs.")


def test_without_a_queue_the_scheduler_runs_them_and_no_worker_is_started():
    made = environment(LAPTOP)
    assert made["AIRFLOW__CORE__EXECUTOR"] == "LocalExecutor"
    assert not any("CELERY" in name or "LOGGING_CONFIG" in name for name in made)
    assert set(ROLES) - set(EMBEDDED) == {"worker"}


def test_a_worker_waits_for_its_queue():
    settings = Settings(airflow_broker_url="rediss://:secret@queue.example:6380/0")
    assert "tcp://queue.example:6380" in [need(settings) for need in ROLES["worker"].needs]


def test_mlflow_is_told_of_an_emulator_and_never_of_one_that_is_not_there():
    emulated = Settings(store_url="gs://bucket?endpoint=http://gcs:4443")
    argv = ROLES["mlflow"].argv(emulated)
    assert argv[argv.index("--artifacts-destination") + 1] == "gs://bucket/mlflow"
    assert environment(emulated)["STORAGE_EMULATOR_HOST"] == "http://gcs:4443"
    assert "STORAGE_EMULATOR_HOST" not in environment(Settings(store_url="gs://bucket"))
