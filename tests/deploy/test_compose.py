"""The compose file and what stands around it, as far as one can judge them without starting a container."""

import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml
from cryptography.fernet import Fernet

from neuroloop.core.credentials import new_key, parted
from neuroloop.core.settings import PREFIX, Settings
from neuroloop.embedded.roles import ROLES

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docker-compose.yaml").read_text()
COMPOSE = yaml.safe_load(TEXT)
SERVICES = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if name != "postgres"}
MAKE_ENV = ROOT / "deploy" / "make-env"
STANDINS = {"NEUROLOOP_UI_API_KEY": new_key()}
"""For secrets of a form of their own."""
SETTINGS = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}


def test_every_service_runs_a_role_of_the_platform_and_no_role_is_missing():
    assert {service["command"][0] for service in OURS.values()} == set(ROLES) - {"postgres"}
    assert all(service["command"] == [name] for name, service in OURS.items())


def test_every_neuroloop_variable_of_a_service_is_a_setting():
    named = {key for service in OURS.values() for key in service["environment"] if key.startswith(PREFIX)}
    assert named
    assert named <= SETTINGS


def test_every_neuroloop_variable_that_compose_reads_is_a_setting():
    read = set(re.findall(rf"\$\{{({PREFIX}\w+)", TEXT))
    assert read
    assert read <= SETTINGS


def test_settings_load_from_the_environment_of_every_service(tmp_path: Path):
    for service in OURS.values():
        given = {key: _filled(value) for key, value in service["environment"].items() if value is not None}
        outside = {"NEUROLOOP_HOME": "/state", "NEUROLOOP_ENV_FILE": str(tmp_path / "none")}
        assert Settings.load(given | outside).bind == "0.0.0.0"


def test_ports_are_published_on_loopback_only():
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(ports) == 4
    assert all(isinstance(port, str) and port.startswith("127.0.0.1:") for port in ports)
    assert not any("network_mode" in service for service in SERVICES.values())


def test_no_secret_stands_in_the_file_and_each_one_says_how_to_make_it():
    secret = re.compile(r"PASSWORD|SECRET|FERNET|DATABASE_URL|KAGGLE_KEY|API_KEY")
    checked = 0
    for service in SERVICES.values():
        for key, value in service["environment"].items():
            if secret.search(key) and value is not None:
                password = value.split(":", 2)[2].rsplit("@", 1)[0] if "://" in value else value
                assert re.fullmatch(r"\$\{\w+:\?run deploy/make-env\}", password), key
                checked += 1
    assert checked > 10


def test_every_service_is_watched_and_started_again():
    for name, service in SERVICES.items():
        assert service["healthcheck"]["test"], name
        assert service["restart"] == "unless-stopped", name


def test_what_a_service_waits_for_is_healthy_first():
    for service in SERVICES.values():
        for other, how in service.get("depends_on", {}).items():
            assert other in SERVICES
            assert how == {"condition": "service_healthy"}


def test_who_reads_the_object_store_shares_its_volume():
    sharing = {name for name, service in OURS.items() if "store:/state/store" in service.get("volumes", [])}
    assert sharing == {"mail", "mlflow", "scheduler", "api"}


def test_the_api_server_sees_the_logs_that_the_scheduler_writes():
    for name in ("airflow-api", "scheduler"):
        assert "airflow:/state/airflow" in SERVICES[name]["volumes"]


def test_the_environment_maker_writes_all_that_compose_demands(tmp_path: Path):
    file = tmp_path / ".env"
    subprocess.run([sys.executable, MAKE_ENV, file], check=True)
    made = dict(line.split("=", 1) for line in file.read_text().splitlines())
    assert set(made) == set(re.findall(r"\$\{(\w+):\?", TEXT))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len(set(made.values())) == len(made)
    assert all(len(value) >= 16 for value in made.values())
    assert all(quote(value, safe="") == value for key, value in made.items() if key.startswith("POSTGRES"))
    Fernet(made["NEUROLOOP_AIRFLOW_FERNET_KEY"])
    assert parted(made["NEUROLOOP_UI_API_KEY"])
    Settings.load({"NEUROLOOP_ENV_FILE": str(file), "NEUROLOOP_HOME": str(tmp_path)})


def test_the_environment_maker_never_replaces_passwords(tmp_path: Path):
    file = tmp_path / ".env"
    file.write_text("POSTGRES_PASSWORD=kept\n")
    done = subprocess.run([sys.executable, MAKE_ENV, file], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "exists and stays as it is" in done.stderr
    assert file.read_text() == "POSTGRES_PASSWORD=kept\n"


def test_no_secret_and_no_state_can_reach_the_image():
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    let_in = {line[1:] for line in lines if line[0] == "!"}
    assert not let_in & {".env", ".venv", ".neuroloop", ".git", "data", "tests", "deploy"}


def test_all_that_the_image_copies_is_let_in_and_exists():
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = set()
    for line in (ROOT / "deploy" / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY "):
            copied |= set(line.split()[1:-1])
    assert copied == let_in
    assert all((ROOT / path).exists() for path in copied)


def test_the_scripts_can_be_run():
    for script in (MAKE_ENV, ROOT / "deploy" / "postgres" / "databases.sh", ROOT / "entrypoint.sh"):
        assert os.access(script, os.X_OK), script


@pytest.mark.parametrize("role", ["mail", "mlflow", "airflow-api", "api", "ui"])
def test_the_health_of_a_server_is_asked_at_the_port_it_listens_on(role: str):
    name = {"airflow-api": "airflow"}.get(role, role)
    port = Settings.model_fields[f"{name}_port"].default
    assert f"127.0.0.1:{port}" in SERVICES[role]["healthcheck"]["test"][3]
    for published in SERVICES[role].get("ports", []):
        assert published.endswith(f":{port}")


def name(reference: str) -> str:
    return reference[2:].partition(":")[0]


def _filled(value: str) -> str:
    """A value as compose fills it in: the default where there is one, else a stand-in for a secret."""
    while found := re.search(r"\$\{\w+:([-?])([^${}]*)\}", value):
        value = value.replace(found[0], found[2] if found[1] == "-" else STANDINS.get(name(found[0]), "s3cret"))
    return value
