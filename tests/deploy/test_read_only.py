"""The roles as the manifests of Kubernetes run them: as user 10001, who may write to /tmp and their home only."""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import stop, wait_until
from neuroloop.adapters.mlflow_registry import MlflowRegistry
from neuroloop.core.credentials import new_key
from neuroloop.records.backup import Manifest
from serving.running import write_bundle

ROOT = Path(__file__).parents[2]
CONFINED = """
mount --make-rprivate / && mount --bind / / && cd / && mount -o remount,ro,bind / &&
mount -t tmpfs tmpfs /tmp && install -d -o 10001 -g 10001 /tmp/state &&
exec setpriv --reuid 10001 --regid 10001 --clear-groups --no-new-privs --bounding-set -all "$@"
"""
"""A mount namespace of its own in which all but /tmp is read-only, then the user and no capabilities."""


def confined(*argv: str | Path) -> list[str]:
    return ["unshare", "--mount", "bash", "-c", CONFINED, "confined", *map(str, argv)]


def _possible() -> bool:
    if os.geteuid() or not (shutil.which("unshare") and shutil.which("setpriv")):
        return False
    readable = confined(sys.executable, "-c", f"open({str(ROOT / 'entrypoint.sh')!r}); import yaml")
    return subprocess.run(readable, capture_output=True, check=False).returncode == 0


pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not _possible(), reason="takes root, mount namespaces and sources that user 10001 can read"),
]


@pytest.fixture
def role(tmp_path: Path, free_port) -> Callable[..., contextlib.AbstractContextManager[str]]:
    """Run a role confined, with these settings, until a path of it answers 200; gives its address."""

    @contextlib.contextmanager
    def run(name: str, port_setting: str, path: str, **settings: str) -> Iterator[str]:
        port = free_port()
        environ = {name: os.environ[name] for name in ("PATH",) if name in os.environ}
        environ |= {"HOME": "/tmp", "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"}
        environ |= {"NEUROLOOP_HOME": "/tmp/state", "NEUROLOOP_ENV_FILE": "/none", port_setting: str(port)} | settings
        log = tmp_path / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                confined(ROOT / "entrypoint.sh", name),
                env=environ,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

        def answers() -> bool:
            with contextlib.suppress(OSError, urllib.error.URLError):
                return urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5).status == 200
            return False

        try:
            wait_until(answers, process, log, seconds=300)
            yield f"http://127.0.0.1:{port}"
        finally:
            stop(process, signal.SIGTERM)
        assert "Read-only file system" not in log.read_text()
        assert "Permission denied" not in log.read_text()

    return run


def test_the_api_loads_the_champion_and_becomes_ready(role, tmp_path: Path, postgres_url: str, mlflow_uri: str):
    registry = MlflowRegistry(mlflow_uri)
    run = registry.open_run("read-only", experiment="serving")
    registry.set_alias("champion", registry.register(run, write_bundle(tmp_path / "bundle"), tags={}).version)
    settings = {"NEUROLOOP_DATABASE_URL": postgres_url, "NEUROLOOP_MLFLOW_TRACKING_URI": mlflow_uri}
    with role("api", "NEUROLOOP_API_PORT", "/health/ready", **settings) as address:
        assert urllib.request.urlopen(f"{address}/health/live", timeout=10).status == 200


def test_the_frontend_serves_its_page_while_the_api_is_away(role):
    settings = {
        "NEUROLOOP_UI_API_KEY": new_key(),
        "NEUROLOOP_UI_PASSWORD": secrets.token_urlsafe(12),
        "NEUROLOOP_API_URL": "http://127.0.0.1:9",
    }
    with role("ui", "NEUROLOOP_UI_PORT", "/_stcore/health", **settings) as address:
        assert b"streamlit" in urllib.request.urlopen(address, timeout=30).read().lower()


def test_mlflow_makes_its_tables_and_answers(role, postgres_url: str):
    settings = {"NEUROLOOP_MLFLOW_DATABASE_URL": postgres_url, "NEUROLOOP_MLFLOW_PASSWORD": secrets.token_urlsafe(12)}
    serving = role("mlflow", "NEUROLOOP_MLFLOW_PORT", "/health", **settings)
    with serving as address, pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{address}/api/2.0/mlflow/experiments/search?max_results=1", timeout=30)


def test_the_nightly_backup_writes_to_its_target_alone(postgres_url: str):
    """As the CronJob's container: settings of one role, the store read-only, no /state, then what a restore reads."""
    environ = {name: os.environ[name] for name in ("PATH",) if name in os.environ}
    environ |= {"HOME": "/tmp", "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"}
    environ |= {"NEUROLOOP_HOME": "/state", "NEUROLOOP_ENV_FILE": "/none", "NEUROLOOP_DATABASE_URL": postgres_url}
    environ |= {"NEUROLOOP_STORE_URL": "file:///tmp/store", "NEUROLOOP_MLFLOW_DATABASE_URL": postgres_url}
    steps = """
        mkdir -p /tmp/store/data/images /tmp/backups && echo image > /tmp/store/data/images/one
        chmod -R a-w /tmp/store
        python3 -m neuroloop.cli migrate
        python3 -m neuroloop.cli backup /tmp/backups
        cat /tmp/backups/*/manifest.json
    """
    argv = confined(ROOT / "entrypoint.sh", "bash", "-ec", steps)
    done = subprocess.run(argv, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    manifest = Manifest.model_validate_json(done.stdout[done.stdout.index("{\n") :])
    assert (list(manifest.objects), manifest.missing) == (["data/images/one"], ())
    assert set(manifest.databases) == {"neuroloop", "mlflow"}
    assert manifest.rows > 0
