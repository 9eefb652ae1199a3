"""MLflow behind its login, as `make up` and compose start it, and the registry in front of it."""

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator

import httpx
import pytest

from conftest import stop, wait_until
from neuroloop.bootstrap import Services
from neuroloop.core.errors import NeuroLoopError
from neuroloop.core.settings import Settings
from neuroloop.embedded import mlflow_users
from neuroloop.embedded.roles import MLFLOW_API_USER, driver
from serving.running import write_bundle

pytestmark = pytest.mark.e2e  # a whole MLflow on an empty PostgreSQL takes a minute
WHO = ("admin", "a password of this test")
API = "another password of it"


@pytest.fixture
def locked(postgres_url: str, free_port, tmp_path) -> Iterator[Settings]:
    """The role `mlflow` in a process of its own, with a login."""
    port = free_port()
    settings = Settings(
        home=tmp_path / "home",
        mlflow_port=port,
        mlflow_tracking_uri=f"http://127.0.0.1:{port}",
        mlflow_database_url=postgres_url,
        mlflow_password=WHO[1],
        mlflow_api_password=API,
    )
    given = {
        "NEUROLOOP_HOME": str(settings.home),
        "NEUROLOOP_ENV_FILE": str(tmp_path / "none"),
        "NEUROLOOP_MLFLOW_PORT": str(port),
        "NEUROLOOP_MLFLOW_TRACKING_URI": settings.mlflow_tracking_uri,
        "NEUROLOOP_MLFLOW_DATABASE_URL": postgres_url,
        "NEUROLOOP_MLFLOW_PASSWORD": WHO[1],
        "NEUROLOOP_MLFLOW_API_PASSWORD": API,
    }
    settings.home.mkdir()
    log = tmp_path / "mlflow.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "neuroloop.cli", "role", "mlflow"],
            env=os.environ | given,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )

    def healthy() -> bool:
        try:
            return httpx.get(f"{settings.mlflow_tracking_uri}/health", trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    wait_until(healthy, process, log, seconds=240)
    yield settings
    stop(process)


@pytest.fixture(autouse=True)
def own_variables(monkeypatch):
    """Put back afterwards what a registry sets."""
    for name in ("USERNAME", "PASSWORD"):
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", "")
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}")


def test_nothing_but_health_is_open_and_the_registry_works_with_the_logins(locked: Settings, tmp_path):
    with httpx.Client(base_url=locked.mlflow_tracking_uri, trust_env=False) as stranger:
        for path in (
            "/",
            "/api/2.0/mlflow/experiments/search?max_results=1",
            "/ajax-api/2.0/mlflow/experiments/search?max_results=1",
            "/api/2.0/mlflow-artifacts/artifacts",
            "/graphql",
            "/signup",
            "/version",
        ):
            assert stranger.get(path).status_code == 401, path
            assert stranger.get(path, auth=(WHO[0], "wrong")).status_code == 401, path
    registry = Services(locked).registry
    run = registry.open_run(str(uuid.uuid4()), experiment="locked")
    version = registry.register(run, write_bundle(tmp_path / "bundle"), tags={})
    registry.set_alias("champion", version.version)
    assert registry.by_alias("champion") == registry.versions()[0]
    assert (registry.download_bundle(version.version, tmp_path / "down") / "bundle.json").is_file()
    said = (tmp_path / "mlflow.log").read_text()
    assert WHO[1] not in said
    assert API not in said
    assert (locked.home / "mlflow-login.ini").stat().st_mode & 0o777 == 0o600

    os.environ.pop("MLFLOW_TRACKING_USERNAME"), os.environ.pop("MLFLOW_TRACKING_PASSWORD")
    as_api = {"mlflow_user": MLFLOW_API_USER, "mlflow_password": API}
    server = Services(locked.model_copy(update=as_api)).registry
    assert server.by_alias("champion") == server.versions()[0]
    assert (server.download_bundle(version.version, tmp_path / "again") / "bundle.json").is_file()
    server.set_alias("previous", version.version)  # as a rollback does
    assert registry.by_alias("previous") is not None
    with pytest.raises(NeuroLoopError, match=r"[Pp]ermission"):
        server.log_bytes(run, "bundle/bundle.json", b"{}")
    where = f"{locked.mlflow_tracking_uri}/api/2.0/mlflow"
    name = {"name": "brain-tumor-classifier"}
    for method, path, asked in (
        ("POST", "runs/delete", {"run_id": run}),
        ("POST", "runs/log-metric", {"run_id": run, "key": "test_macro_f1", "value": 1, "timestamp": 1}),
        ("DELETE", "registered-models/delete", name),
        ("DELETE", "model-versions/delete", name | {"version": version.version}),
        ("POST", "users/create", {"username": "a friend", "password": "a friend's password"}),
    ):
        refused = httpx.request(method, f"{where}/{path}", json=asked, auth=(MLFLOW_API_USER, API), trust_env=False)
        assert refused.status_code == 403, (path, refused.text)
    upload = f"{locked.mlflow_tracking_uri}/api/2.0/mlflow-artifacts/artifacts/1/{run}/artifacts/bundle/bundle.json"
    assert httpx.put(upload, content=b"{}", auth=(MLFLOW_API_USER, API), trust_env=False).status_code == 403


def test_both_users_have_the_passwords_of_the_settings_from_the_next_start_on(postgres_url: str, monkeypatch, tmp_path):
    from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore

    store = SqlAlchemyStore()
    store.init_db(driver(postgres_url))
    store.create_user(WHO[0], "the one of the first start", is_admin=True)
    monkeypatch.setenv("NEUROLOOP_ENV_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("NEUROLOOP_HOME", str(tmp_path))
    monkeypatch.setenv("NEUROLOOP_MLFLOW_DATABASE_URL", postgres_url)
    for admins, apis in ((WHO[1], ""), (WHO[1], API), ("a third password of it", "a fourth password of it")):
        monkeypatch.setenv("NEUROLOOP_MLFLOW_PASSWORD", admins)
        monkeypatch.setenv("NEUROLOOP_MLFLOW_API_PASSWORD", apis)
        mlflow_users.main()
        assert store.authenticate_user(WHO[0], admins)
        assert store.has_user(MLFLOW_API_USER) == bool(apis)
        assert not apis or store.authenticate_user(MLFLOW_API_USER, apis)
    assert not store.authenticate_user(WHO[0], "the one of the first start")
