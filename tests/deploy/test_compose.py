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
OURS = {name: service for name, service in SERVICES.items() if "build" in service}
CORE = {name: service for name, service in SERVICES.items() if "profiles" not in service}
OTHERS_IMAGES = {"postgres", "redis", "gcs", "mail"}
"""Of the core. Mail and the store have roles of this repository as stand-ins: docker-compose.local.yaml."""
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
MAKE_ENV = ROOT / "deploy" / "make-env"
STANDINS = {"NEUROLOOP_UI_API_KEY": new_key(), "NEUROLOOP_METRICS_KEY": new_key()}
"""For secrets of a form of their own."""
SETTINGS = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}


def test_every_service_runs_a_role_of_the_platform_and_no_role_is_missing():
    assert all(service["command"] == [name] for name, service in OURS.items())
    assert set(OURS) == set(ROLES) - {"postgres", "mail"}
    assert set(CORE) == set(OURS) | OTHERS_IMAGES


def test_each_role_runs_the_image_that_is_made_for_it():
    made = set(re.findall(r"^FROM base AS (\w+)$", DOCKERFILE, re.M))
    assert made == {"airflow", "api", "ui", "mlflow"}
    for name, service in OURS.items():
        target = name if name in made else "airflow"
        assert service["build"]["target"] == target, name
        called = {"ui": "frontend"}.get(target, target)
        assert service["image"].startswith(f"${{IMAGE_PREFIX:-neuroloop}}-{called}:"), name


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


def test_only_frontend_api_and_airflow_are_published_and_on_loopback_unless_told_otherwise():
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(published) == {"ui", "api", "airflow-api"}
    for ports in published.values():
        assert len(ports) == 1
        assert ports[0].startswith("${PUBLISH_ON:-127.0.0.1}:")
    assert not any("network_mode" in service for service in SERVICES.values())


def test_the_operators_pages_are_published_on_loopback_only():
    extra = yaml.safe_load((ROOT / "docker-compose.operator.yaml").read_text())["services"]
    assert set(extra) <= set(SERVICES)
    for name, service in extra.items():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name


def test_what_keeps_state_is_reached_by_internal_networks_only():
    internal = {name for name, network in COMPOSE["networks"].items() if (network or {}).get("internal")}
    assert internal == {"inside", "watch"}
    for name in ("postgres", "redis", "gcs", "mail", "prometheus", "elasticsearch"):
        assert set(SERVICES[name]["networks"]) <= internal, name
    assert SERVICES["ui"]["networks"] == ["front"]  # the frontend reaches the API, and no database


def test_every_service_has_a_limit_of_memory_with_a_unit_and_of_cores():
    for name, service in SERVICES.items():
        limits = service["deploy"]["resources"]["limits"]
        assert re.fullmatch(r"(\$\{WORKER_MEMORY:-)?\d+[MG]\}?", limits["memory"]), name
        assert float(_filled(limits["cpus"])) > 0, name


def test_the_readme_says_what_the_limits_of_the_core_add_up_to():
    limits = [service["deploy"]["resources"]["limits"] for service in CORE.values()]
    cores = sum(float(_filled(each["cpus"])) for each in limits)
    sizes = [re.fullmatch(r"(\d+)([MG])", _filled(each["memory"])) for each in limits]
    memory = sum(int(size[1]) / (1024 if size[2] == "M" else 1) for size in sizes)
    text = " ".join((ROOT / "deploy" / "README.md").read_text().split())
    assert f"the limits of the core add up to {cores:.0f} cores and {memory:.1f} GiB" in text


def test_the_runbooks_backup_reads_one_password_of_a_file_that_is_no_script(tmp_path: Path):
    (tmp_path / ".env").write_text(
        "NEUROLOOP_HOUSEKEEPING_SCHEDULE=17 * * * *\nPOSTGRES_MLFLOW_PASSWORD=s3cret-x\nREDIS_PASSWORD=$(touch made)\n"
    )
    text = (ROOT / "docs" / "operations.md").read_text()
    (command,) = re.findall(r"```\n(install .*?docker compose run .*?)```", text, re.DOTALL)
    stubs = 'install() { :; }; docker() { printenv NEUROLOOP_MLFLOW_DATABASE_URL; printf "%s\\n" "$@"; }; '
    done = subprocess.run(["bash", "-c", stubs + command], cwd=tmp_path, capture_output=True, text=True, check=True)
    url, *argv = done.stdout.splitlines()
    assert url == "postgresql://mlflow:s3cret-x@postgres:5432/mlflow"  # pragma: allowlist secret
    assert argv[argv.index("-e") + 1] == "NEUROLOOP_MLFLOW_DATABASE_URL"
    assert "s3cret-x" not in " ".join(argv)
    assert not (tmp_path / "made").exists()


def test_every_secret_that_the_environment_maker_makes_has_its_rotation(tmp_path: Path):
    subprocess.run([sys.executable, MAKE_ENV, tmp_path / ".env"], check=True)
    text = (ROOT / "docs" / "operations.md").read_text()
    section = text.split("## Rotate secrets")[1].split("\n## ")[0]
    for line in (tmp_path / ".env").read_text().splitlines():
        assert f"`{line.partition('=')[0]}`" in section


def test_no_container_of_ours_runs_as_root_or_gains_rights():
    for name, service in SERVICES.items():
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert service.get("user") != "root" or name == "filebeat", name
        assert not service.get("privileged"), name
    assert not any({"user", "cap_add"} & set(service) for service in OURS.values())
    for stage in re.split(r"^FROM ", DOCKERFILE, flags=re.M)[1:]:
        if stage.startswith("base AS"):
            assert "\nUSER 10001\n" in stage


def test_every_image_is_pinned_and_the_profiles_hold_what_a_small_machine_can_do_without():
    for name, service in SERVICES.items():
        assert name in OURS or re.fullmatch(r"[\w./-]+:v?\d[\w.]*", service["image"]), name
    profiles = {name: service["profiles"] for name, service in SERVICES.items() if "profiles" in service}
    watching, logs = ("statsd-exporter", "prometheus", "grafana"), ("elasticsearch", "kibana", "filebeat")
    assert profiles == {service: ["monitoring"] for service in watching} | {service: ["logs"] for service in logs}


def test_every_named_volume_is_used_and_every_used_one_is_named():
    used = {
        _filled(volume).split(":")[0]
        for service in SERVICES.values()
        for volume in service.get("volumes", [])
        if not _filled(volume).startswith((".", "/"))
    }
    assert used == set(COMPOSE["volumes"])


def test_no_secret_stands_in_the_file_and_each_one_says_how_to_make_it():
    secret = re.compile(r"PASSWORD|SECRET|FERNET|DATABASE_URL|BROKER_URL|KAGGLE_KEY|API_KEY|METRICS_KEY")
    checked = 0
    for service in SERVICES.values():
        for key, value in service.get("environment", {}).items():
            if secret.search(key) and value is not None:
                password = value.split(":", 2)[2].rsplit("@", 1)[0] if "://" in value else value
                assert re.fullmatch(r"\$\{\w+:\?run deploy/make-env\}", password), key
                checked += 1
    assert checked > 10


def test_every_service_is_watched_and_started_again():
    watched = {role for role in OURS if f'\nCMD ["{role}"]' in DOCKERFILE}  # the image's own role, by its HEALTHCHECK
    assert DOCKERFILE.count("HEALTHCHECK") == len(watched) == 4
    for name, service in SERVICES.items():
        assert ("healthcheck" in service) is (name not in watched), name
        assert service["restart"] == "unless-stopped", name


def test_what_a_service_waits_for_is_healthy_first():
    for service in SERVICES.values():
        for other, how in service.get("depends_on", {}).items():
            assert other in SERVICES
            assert how["condition"] == "service_healthy"


def test_the_roles_share_no_disk():
    volumes = {name: service["volumes"] for name, service in OURS.items() if service.get("volumes")}
    assert volumes == {"worker": ["${DATA_FOLDER:-data}:/data:ro"]}


def test_what_the_watching_services_mount_is_there():
    mounted = {
        volume.split(":")[0]
        for service in SERVICES.values()
        for volume in service.get("volumes", [])
        if volume.startswith("./")
    }
    assert len(mounted) > 5
    assert [path for path in mounted if not (ROOT / path).exists()] == []


def test_one_setting_puts_a_bucket_in_the_emulators_place():
    store = SERVICES["worker"]["environment"]["NEUROLOOP_STORE_URL"]
    emulated = Settings(store_url=_filled(store))
    assert (emulated.store, emulated.store_endpoint) == ("gs://neuroloop", "http://gcs:4443")
    assert store.startswith("${NEUROLOOP_STORE_URL:-")
    assert Settings(store_url="gs://my-bucket").store_endpoint == ""
    assert not any("STORAGE_EMULATOR_HOST" in service.get("environment", {}) for service in SERVICES.values())


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


def test_all_that_the_images_copy_is_let_in_and_exists():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    let_in = {str(path.relative_to(ROOT)) for line in lines if line[:1] == "!" for path in ROOT.glob(line[1:])}
    copied = set()
    for line in DOCKERFILE.splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            copied |= set(line.split()[1:-1])
    assert copied == let_in
    assert all((ROOT / path).exists() for path in copied)


@pytest.mark.parametrize("file", ["docker-compose.yaml", "docker-compose.operator.yaml"])
def test_the_compose_files_follow_the_specification(file: str):
    schema = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*schema, ROOT / file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_scripts_can_be_run():
    for script in (MAKE_ENV, ROOT / "deploy" / "postgres" / "databases.sh", ROOT / "entrypoint.sh"):
        assert os.access(script, os.X_OK), script


@pytest.mark.parametrize("role", ["mlflow", "airflow-api", "api", "ui"])
def test_the_health_of_a_server_is_asked_at_the_port_it_listens_on(role: str):
    name = {"airflow-api": "airflow"}.get(role, role)
    port = Settings.model_fields[f"{name}_port"].default
    asked = re.search(rf'"http://127.0.0.1:(\d+)/\S*"\]\nCMD \["{role}"\]', DOCKERFILE)
    assert asked
    assert asked[1] == str(port)
    for published in SERVICES[role].get("ports", []):
        assert published.endswith(f":{port}")


def name(reference: str) -> str:
    return reference[2:].partition(":")[0]


def _filled(value: str) -> str:
    """A value as compose fills it in: the default where there is one, else a stand-in for a secret."""
    while found := re.search(r"\$\{\w+:([-?])([^${}]*)\}", value):
        value = value.replace(found[0], found[2] if found[1] == "-" else STANDINS.get(name(found[0]), "s3cret"))
    return value


def test_every_setting_that_means_something_in_a_container_can_be_given():
    # One machine's own: ports and passwords of what runs in its place here, the first build of `make up`, other clouds.
    elsewhere = "HOME POSTGRES_PORT MAIL_PORT SUPERVISOR_PORT POSTGRES_PASSWORD API_KEY SUPERVISOR_PASSWORD SAGEMAKER"
    elsewhere += " FIRST_BUILD_MINUTES POD_TEMPLATES"
    text = (ROOT / "docker-compose.yaml").read_text()
    missing = {name.upper() for name in Settings.model_fields if f"{PREFIX}{name.upper()}" not in text}
    assert missing == set(elsewhere.split())
