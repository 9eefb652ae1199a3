"""Addresses in containers: what a browser uses and what the parts use among themselves differ."""

from fnmatch import fnmatch
from pathlib import Path

from neuroloop.core.settings import Settings
from neuroloop.embedded.roles import ROLES, environment

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


def test_the_api_and_the_frontend_start_without_waiting_for_what_may_be_down():
    assert ROLES["api"].needs == ()
    assert ROLES["ui"].needs == ()
