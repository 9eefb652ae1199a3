"""Real servers for the tests: each is started once, on a free port of 127.0.0.1, and stopped at the end."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg2
import pytest

from neuroloop.adapters.folder import FolderStore
from neuroloop.core.keys import MAIL
from neuroloop.core.schemas import Mail
from servers.clouds import AzureServer, Identities, S3Server, azure, identities, s3
from servers.gcs_server import GcsServer

# --- processes and ports ------------------------------------------------------------------------


def free() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def free_port():
    """A function that gives a port nobody listens on."""
    return free


def stop(process: subprocess.Popen, how: int = signal.SIGTERM) -> None:
    """End a server and everything it started (it leads a session of its own)."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, how)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until(ready, process: subprocess.Popen, log: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"{process.args[0]} did not come up:\n{log.read_text()[-3000:]}")
        time.sleep(0.05)


# --- object store -------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(str(tmp_path / "store"))


@pytest.fixture(scope="session")
def gcs_server() -> Iterator[GcsServer]:
    """A Google Cloud Storage on this machine; small pages, so that every listing of a few objects has several."""
    with GcsServer(page=3).serve() as server:
        yield server


@pytest.fixture
def gcs_bucket(gcs_server: GcsServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new bucket, and the environment variable that leads clients to it."""
    name = f"bucket-{secrets.token_hex(6)}"
    gcs_server.buckets[name] = {}
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_server.url)
    return name


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An Amazon S3 on this machine (moto), open to everybody."""
    with s3(tmp_path_factory.mktemp("s3"), free()) as server:
        yield server


@pytest.fixture
def s3_bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new bucket, and the environment variables that lead clients to it."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return s3_server.new_bucket()


@pytest.fixture(scope="module")
def s3_identities(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Identities]:
    """Another Amazon S3, which enforces the policies of deploy/identities; it remembers who did what."""
    with identities(tmp_path_factory.mktemp("s3-identities"), free()) as found:
        yield found


@pytest.fixture(scope="session")
def azure_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AzureServer]:
    """An Azure Blob storage on this machine (Azurite)."""
    with azure(tmp_path_factory.mktemp("azure"), free()) as server:
        yield server


@pytest.fixture
def azure_container(azure_server: AzureServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new container, and the environment variables that lead clients to it."""
    for name, value in azure_server.environment().items():
        monkeypatch.setenv(name, value)
    return azure_server.new_container()


# --- PostgreSQL ---------------------------------------------------------------------------------


@dataclass
class PostgresServer:
    """A PostgreSQL with password authentication that a test can stop and start again."""

    data: Path
    port: int
    password: str
    process: subprocess.Popen | None = None
    durable: bool = False  # flushed to disk at every commit: slow, and only a power cut tells the difference

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://postgres:{self.password}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        from neuroloop.embedded.postgres import command

        log = self.data.with_suffix(".log")
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [*command(self.data, self.port, self.password), *([] if self.durable else ["-c", "fsync=off"])],
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        wait_until(self._answers, self.process, log)

    def stop(self) -> None:
        stop(self.process, signal.SIGINT)  # "fast shutdown": does not wait for clients

    def kill(self) -> None:
        """End the server and each of its processes at once, as a crash does."""
        head = self.process.pid
        parents = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        family = {head}
        for _ in range(3):
            family |= {pid for pid, parent in parents.items() if parent in family}
        for pid in sorted(family):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        wait_gone = time.monotonic() + 20
        while any(Path(f"/proc/{pid}").exists() for pid in family - {head}) and time.monotonic() < wait_gone:
            time.sleep(0.02)

    def new_database(self) -> str:
        name = f"test_{secrets.token_hex(6)}"
        with contextlib.closing(psycopg2.connect(self.url())) as connection:
            connection.autocommit = True
            connection.cursor().execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def _answers(self) -> bool:
        try:
            psycopg2.connect(self.url(), connect_timeout=2).close()
        except psycopg2.OperationalError:
            return False
        return True


@pytest.fixture(scope="session")
def postgres_server(free_port) -> Iterator[PostgresServer]:
    folder = Path(tempfile.mkdtemp(prefix="neuroloop-test-"))
    server = PostgresServer(folder / "postgres", free_port(), secrets.token_urlsafe(16))
    server.start()
    yield server
    server.stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> str:
    """A fresh, empty database."""
    return postgres_server.new_database()


# --- MLflow -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def mlflow_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real tracking server and registry on SQLite, which serves its artifacts."""
    with mlflow_server(tmp_path_factory.mktemp("mlflow"), free()) as uri:
        yield uri


@contextlib.contextmanager
def mlflow_server(folder: Path, port: int, artifacts: str = "", *, database: str = "") -> Iterator[str]:
    """The same in `folder` on `port`; the artifacts there or elsewhere, with `database` on a PostgreSQL."""
    backend = database.replace("postgresql://", "postgresql+psycopg2://") or f"sqlite:///{folder}/mlflow.db"
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)),
                *("--workers", "1", "--backend-store-uri", backend),
                *("--serve-artifacts", "--artifacts-destination", artifacts or str(folder / "artifacts")),
            ],
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
            cwd=folder,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )

    def healthy() -> bool:
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).status == 200
        except OSError:
            return False

    wait_until(healthy, process, log)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        stop(process, signal.SIGKILL)  # there is nothing to save, and a polite end takes seconds


# --- mail ---------------------------------------------------------------------------------------


@dataclass
class SmtpSink:
    """The platform's own mail sink on a folder store."""

    url: str
    store: FolderStore

    def mails(self) -> list[Mail]:
        from neuroloop.core.mail import parse_mail

        return [parse_mail(self.store.get(key)) for key in self.store.list(MAIL)]


@pytest.fixture
def smtp_sink(store: FolderStore, free_port) -> Iterator[SmtpSink]:
    from neuroloop.adapters.smtp import start_sink

    port = free_port()
    sink = start_sink(store, "127.0.0.1", port)
    yield SmtpSink(f"smtp://127.0.0.1:{port}", store)
    sink.stop()


# --- the inference API, for the frontend and browser tests --------------------------------------


@pytest.fixture(scope="module")
def live_api(tmp_path_factory: pytest.TempPathFactory, postgres_server: PostgresServer, mlflow_uri: str, free_port):
    """The API on a real uvicorn with store, PostgreSQL, MLflow, mail sink; its champion looks for bright quarters."""
    from model.cards import FACTS
    from neuroloop.adapters.mlflow_registry import MlflowRegistry
    from neuroloop.adapters.smtp import start_sink
    from neuroloop.bootstrap import Services
    from neuroloop.core.settings import Settings
    from neuroloop.model.bundle import with_card
    from neuroloop.model.card import compose
    from serving.running import serving, write_bundle

    folder = tmp_path_factory.mktemp("live-api")
    registry = MlflowRegistry(mlflow_uri)
    run = registry.open_run(f"live-{secrets.token_hex(6)}", experiment="frontend")
    registry.log_metrics(
        run,
        {
            "grouped_test_accuracy": 0.91,
            "grouped_test_accuracy_low": 0.88,
            "grouped_test_log_loss": float("nan"),  # could not be computed
            "grouped_test_accuracy_high": 0.94,
            "grouped_test_macro_f1": 0.9,
            "grouped_test_baseline_nearest_macro_f1": 0.6,
        },
    )
    bundle = with_card(write_bundle(folder / "bundle", roughest=0.16, refer_below=0.55), compose(**FACTS))
    version = registry.register(run, bundle, tags={"data_version": "d1", "simulated": "true"})
    registry.set_alias("champion", version.version)
    mail_port = free_port()
    services = Services(
        Settings(
            home=folder,
            database_url=postgres_server.new_database(),
            mlflow_tracking_uri=mlflow_uri,
            notify_url=f"smtp://127.0.0.1:{mail_port}",
            refresh_seconds=0.2,
            decode_seconds=10,
        )
    )
    sink = start_sink(services.store, "127.0.0.1", mail_port)
    with serving(services) as running:
        yield running
    sink.stop()
