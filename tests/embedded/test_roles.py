"""Addresses in containers: what a browser uses and what the parts use among themselves differ."""

from fnmatch import fnmatch
from pathlib import Path

import pytest
from mlflow.utils.file_utils import local_file_uri_to_path

from adapters.test_data_versions import with_the_extra_aws
from conftest import mlflow_server
from neuroloop.adapters.mlflow_registry import MlflowRegistry
from neuroloop.bootstrap import open_store
from neuroloop.core.errors import InvalidSetting
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


def test_no_proxy_stands_between_two_parts_and_what_the_user_named_stays():
    environ = {"http_proxy": "http://proxy:3128", "no_proxy": "corp.example, other"}
    CONTAINER.past_proxies(environ)
    assert environ["NO_PROXY"] == environ["no_proxy"]
    assert set(environ["no_proxy"].split(",")) == {
        *("corp.example", "other", "localhost", "127.0.0.1", "::1", "airflow-api", "mlflow")
    }
    before = dict(environ)
    CONTAINER.past_proxies(environ)
    assert environ == before
    hosted: dict[str, str] = {}
    Settings(mlflow_tracking_uri="https://mlflow.example").past_proxies(hosted)
    assert "mlflow.example" not in hosted["NO_PROXY"]
    never = {"no_proxy": "*"}
    CONTAINER.past_proxies(never)
    assert never == {"no_proxy": "*", "NO_PROXY": "*"}


def test_mlflow_may_be_called_by_its_own_names_and_from_this_machine_only():
    hosts = mlflow_hosts(CONTAINER)
    for good in ("mlflow:5000", "mlflow.example", "127.0.0.1:25000", "localhost:5000"):
        assert any(fnmatch(good, host) for host in hosts), good
    for bad in ("evil.example", "evil.example:5000", "127.0.0.1.evil.example"):
        assert not any(fnmatch(bad, host) for host in hosts), bad


def test_the_api_and_the_frontend_start_without_waiting_for_what_may_be_down():
    assert ROLES["api"].needs == ()
    assert ROLES["ui"].needs == ()


def artifacts(**settings: str) -> str:
    argv = ROLES["mlflow"].argv(Settings(home=Path("/state"), **settings))
    return argv[argv.index("--artifacts-destination") + 1]


def test_mlflow_keeps_its_files_in_the_object_store_or_where_a_setting_says(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    assert artifacts() == "file:///state/store/mlflow"
    assert local_file_uri_to_path(artifacts(store_url="file:///a #1/100%?")) == "/a #1/100%?/mlflow"
    assert artifacts(store_url="gs://bucket/prefix") == "gs://bucket/prefix/mlflow"
    assert artifacts(store_url="s3://bucket") == "s3://bucket/mlflow"
    assert artifacts(store_url="az://box/prefix") == "wasbs://box@account.blob.core.windows.net/prefix/mlflow"
    assert artifacts(store_url="s3://bucket", mlflow_artifacts_url="s3://models/") == "s3://models"
    assert artifacts(mlflow_artifacts_url="az://models") == "wasbs://models@account.blob.core.windows.net"


def test_mlflow_in_an_azure_container_asks_for_the_account(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(InvalidSetting, match="AZURE_STORAGE_ACCOUNT_NAME is not set"):
        artifacts(store_url="az://container")


@pytest.mark.parametrize("cloud", ["s3", "azure"])
def test_what_mlflow_keeps_lies_in_the_clouds_store(cloud: str, request, monkeypatch, tmp_path: Path, free_port):
    if cloud == "s3":
        url = f"s3://{request.getfixturevalue('s3_bucket')}/below"
        with_the_extra_aws(monkeypatch)
    else:
        url = f"az://{request.getfixturevalue('azure_container')}/below"
    with mlflow_server(tmp_path, free_port(), artifacts(store_url=url)) as uri:
        registry = MlflowRegistry(uri)
        run = registry.open_run("run-1", experiment="clouds")
        registry.log_bytes(run, "data/corrections.json", b"[]")
        (key,) = open_store(url).list("mlflow/")
        assert key.endswith("artifacts/data/corrections.json")
        assert open_store(url).get(key) == b"[]"


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
