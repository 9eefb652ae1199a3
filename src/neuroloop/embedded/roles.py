"""One process of the platform: what it needs before it starts, its environment, and the program it becomes.

`entrypoint.sh ROLE` ends here; the laptop's supervisor, docker-compose and Kubernetes all start the same roles.
"""

import configparser
import json
import os
import secrets
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

from neuroloop.core.errors import InvalidSetting, Unavailable
from neuroloop.core.settings import MLFLOW_API_USER, Settings, folder_of

ROOT = Path(__file__).resolve().parents[3]
"""The repository: `dags/` and `frontend/` stand there."""

WAIT_SECONDS = 300.0


@dataclass(frozen=True)
class Role:
    """`needs` are waited for in turn; `argv` is what the process becomes."""

    argv: Callable[[Settings], list[str]]
    needs: tuple[Callable[[Settings], str], ...] = ()
    first: Callable[[Settings], list[str]] | None = None
    """A program that must end well before the role starts: a schema migration, a user."""


def _python(*args: str) -> list[str]:
    return [sys.executable, "-m", *args]


def _airflow_database(settings: Settings) -> str:
    return _tcp(settings.airflow_database_url)


def _mlflow_database(settings: Settings) -> str:
    return _tcp(settings.mlflow_database_url)


def log_database(settings: Settings) -> str:
    """Where the database of the prediction log listens, as `wait_for` takes it."""
    return _tcp(settings.database_url)


def _broker(settings: Settings) -> str:
    return _tcp(settings.airflow_broker_url, 6379)


def _tcp(url: str, port: int = 5432) -> str:
    parts = urlsplit(url)
    return f"tcp://{parts.hostname}:{parts.port or port}"


def _mlflow(settings: Settings) -> str:
    return f"{settings.mlflow_tracking_uri}/health"


def _airflow(settings: Settings) -> str:
    return f"{settings.airflow_internal}/api/v2/version"


def _mlflow_argv(settings: Settings) -> list[str]:
    return [
        *_python("mlflow", "server", "--workers", "1"),
        *("--host", settings.bind, "--port", str(settings.mlflow_port)),
        *("--artifacts-destination", _mlflow_artifacts(settings), "--serve-artifacts"),
        *("--allowed-hosts", ",".join(_mlflow_hosts(settings))),
        *(("--app-name", "basic-auth") if settings.mlflow_password else ()),
    ]


def _mlflow_artifacts(settings: Settings) -> str:
    """Where MLflow keeps its files, in its own words: it names a container with its account, and unquotes a folder."""
    parts = urlsplit(settings.mlflow_artifacts)
    if parts.scheme == "file":
        return f"file://{quote(folder_of(settings.mlflow_artifacts))}"
    if parts.scheme != "az":
        return settings.mlflow_artifacts
    account = os.environ.get("AZURE_STORAGE_ACCOUNT_NAME")
    if not account:
        raise InvalidSetting(
            "AZURE_STORAGE_ACCOUNT_NAME is not set",
            why=f"MLflow keeps its files in {settings.mlflow_artifacts}, and the account is not known",
            fix="set it to the name of the storage account",
        )
    return f"wasbs://{parts.netloc}@{account}.blob.core.windows.net{parts.path}"


def _mlflow_hosts(settings: Settings) -> list[str]:
    """The names under which MLflow may be called; any other Host header is a web page's attempt to reach it."""
    named = [urlsplit(url).netloc.rpartition("@")[2] for url in (settings.mlflow_tracking_uri, settings.mlflow_page)]
    return sorted({"localhost", "localhost:*", "127.0.0.1", "127.0.0.1:*", *named})


def _ui_argv(settings: Settings) -> list[str]:
    server = _python("streamlit", "run", str(ROOT / "frontend" / "server.py"), "--server.headless", "true")
    address = ["--server.address", settings.bind, "--server.port", str(settings.ui_port)]
    return [*server, *address, "--server.maxUploadSize", str(max(1, round(settings.max_upload_mb)))]


def _airflow_role(*args: str) -> Role:
    return Role(lambda _: _python("airflow", *args), needs=(_airflow_database, _airflow))


ROLES: dict[str, Role] = {
    "postgres": Role(lambda _: _python("neuroloop.embedded.postgres")),
    "mail": Role(lambda _: _python("neuroloop.cli", "mail-sink")),
    "mlflow": Role(_mlflow_argv, needs=(_mlflow_database,), first=lambda _: _python("neuroloop.embedded.mlflow_users")),
    "airflow-api": Role(
        lambda settings: _python(
            "airflow", "api-server", "--host", settings.bind, "--port", str(settings.airflow_port)
        ),
        needs=(_airflow_database,),
        first=lambda _: _python("airflow", "db", "migrate"),
    ),
    "scheduler": _airflow_role("scheduler", "--skip-serve-logs"),
    "dag-processor": _airflow_role("dag-processor"),
    "triggerer": _airflow_role("triggerer", "--skip-serve-logs"),
    # As many of them, on as many machines, as there is work: they share the queue and the store, and no disk.
    "worker": Role(
        lambda _: _python("airflow", "celery", "worker", "--without-mingle", "--without-gossip"),
        needs=(_airflow_database, _broker, _airflow),
    ),
    # Waits for nothing: without database or store it is live, not ready, and recovers by itself.
    "api": Role(lambda _: _python("neuroloop.serving.server")),
    # Nor does the frontend: while the API is away, its pages say so.
    "ui": Role(_ui_argv),
}

EMBEDDED = tuple(name for name in ROLES if name != "worker")
"""What `make up` starts: there the scheduler itself runs the tasks."""


def environment(settings: Settings) -> dict[str, str]:
    """The variables every role gets: Airflow's and MLflow's own settings, derived from NeuroLoop's."""
    home = settings.home / "airflow"
    airflow = {
        **(_celery(settings) if settings.airflow_broker_url else {"CORE__EXECUTOR": "LocalExecutor"}),
        "CORE__DAGS_FOLDER": str(ROOT / "dags"),
        "CORE__LOAD_EXAMPLES": "False",
        "CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
        # Two cores: the default of 32 forked workers costs gigabytes and gains nothing.
        "CORE__PARALLELISM": "4",
        "CORE__FERNET_KEY": settings.airflow_fernet_key,
        "CORE__SIMPLE_AUTH_MANAGER_USERS": f"{settings.airflow_user}:admin",
        "CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(home / "passwords.json"),
        "CORE__EXECUTION_API_SERVER_URL": f"{settings.airflow_internal}/execution/",
        "DATABASE__SQL_ALCHEMY_CONN": driver(settings.airflow_database_url),
        "API__BASE_URL": settings.airflow_url,
        "API__WORKERS": "1",
        "API__SECRET_KEY": settings.airflow_jwt_secret,
        "API_AUTH__JWT_SECRET": settings.airflow_jwt_secret,
        "SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.1",
        # A task beats every 5 s; one whose worker died is given up, and retried, after this many.
        "SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "60",
        "DAG_PROCESSOR__REFRESH_INTERVAL": "60",
        "DAG_PROCESSOR__PARSING_PROCESSES": "1",
        "LOGGING__BASE_LOG_FOLDER": str(home / "logs"),
        "USAGE_DATA_COLLECTION__ENABLED": "False",
    }
    if settings.log_format == "ecs":
        # A line of JSON each, those of the tasks too: their run and step stand in it. Filebeat renames the fields.
        airflow |= {"LOGGING__JSON_LOGS": "True", "LOGGING__TASK_LOGS_TO_STDOUT": "True"}
    if settings.statsd_url:
        statsd = urlsplit(settings.statsd_url)
        airflow |= {
            "METRICS__STATSD_ON": "True",
            "METRICS__STATSD_HOST": str(statsd.hostname),
            "METRICS__STATSD_PORT": str(statsd.port or 9125),
            # Tags, which become labels, in place of names that have DAG and task in them.
            "METRICS__STATSD_INFLUXDB_ENABLED": "True",
            "METRICS__LEGACY_NAMES_ON": "False",
        }
    return {
        "NEUROLOOP_HOME": str(settings.home),
        "AIRFLOW_HOME": str(home),
        **{f"AIRFLOW__{key}": value for key, value in airflow.items()},
        # MLflow asks Google's own client, which knows an emulator by this variable only.
        **({"STORAGE_EMULATOR_HOST": settings.store_endpoint} if settings.store_endpoint else {}),
        "MLFLOW_TRACKING_URI": settings.mlflow_tracking_uri,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "GIT_PYTHON_REFRESH": "quiet",
        "DVC_NO_ANALYTICS": "1",
        "DO_NOT_TRACK": "1",
        "STREAMLIT_BROWSER_GATHER_USAGE_STATS": "false",
        "STREAMLIT_LOGGER_HIDE_WELCOME_MESSAGE": str(settings.log_format == "ecs").lower(),
        # Small matrices, many threads: OpenBLAS would spin on every core and slow the simulation tenfold.
        "OPENBLAS_NUM_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "PYTHONUNBUFFERED": "1",
    }


def _celery(settings: Settings) -> dict[str, str]:
    """Airflow with workers: who they are asked through, and a log of each task that outlives its worker."""
    return {
        "CORE__EXECUTOR": "CeleryExecutor",
        "CELERY__BROKER_URL": settings.airflow_broker_url,
        "CELERY__RESULT_BACKEND": f"db+{driver(settings.airflow_database_url)}",
        "CELERY__WORKER_CONCURRENCY": "2",
        # After this long, seconds, the queue hands a task out anew: longer than the longest training.
        "CELERY_BROKER_TRANSPORT_OPTIONS__VISIBILITY_TIMEOUT": str(7 * 24 * 3600),
        # The API server may take its time on a machine that is busy with trainings; 5 s by default.
        "WORKERS__EXECUTION_API_TIMEOUT": "30",
        "LOGGING__LOGGING_CONFIG_CLASS": "neuroloop.embedded.task_logs.LOGGING_CONFIG",
    }


def wait_for(target: str, seconds: float = WAIT_SECONDS) -> None:
    """Return once `target` (`tcp://host:port`, or an HTTP URL that answers 200) is there; else `Unavailable`."""
    parts = urlsplit(target)
    deadline, reason = time.monotonic() + seconds, ""
    while time.monotonic() < deadline:
        try:
            if parts.scheme == "tcp":
                socket.create_connection((str(parts.hostname), int(parts.port or 0)), timeout=2).close()
                return
            with urllib.request.urlopen(target, timeout=5) as answer:
                if answer.status == 200:
                    return
        except (OSError, urllib.error.URLError) as error:
            reason = str(error)
        time.sleep(0.25)
    raise Unavailable(f"{target} did not answer in {seconds:.0f} s", why=reason, fix="see the logs of that part")


def become(name: str) -> None:
    """Wait for what the role needs, then replace this process by it."""
    if name not in ROLES:
        raise InvalidSetting(f"{name!r} is no role", fix=f"the roles are {', '.join(ROLES)}")
    settings, role = Settings.load(), ROLES[name]
    if name in ("airflow-api", "scheduler", "dag-processor", "triggerer", "worker"):
        settings.require("airflow_database_url", "airflow_jwt_secret", "airflow_fernet_key", "airflow_password")
        _write_airflow_login(settings)
    if name == "worker":
        settings.require("airflow_broker_url")
    if name == "mlflow":
        settings.require("mlflow_database_url")
        # Not an argument: those of a process are shown to everybody on the machine.
        os.environ["MLFLOW_BACKEND_STORE_URI"] = driver(settings.mlflow_database_url)
        _write_mlflow_login(settings)
    if name == "api" and settings.mlflow_api_password:
        os.environ["NEUROLOOP_MLFLOW_USER"] = MLFLOW_API_USER
        os.environ["NEUROLOOP_MLFLOW_PASSWORD"] = settings.mlflow_api_password
    os.environ.update(environment(settings))
    settings.past_proxies(os.environ)
    for need in role.needs:
        wait_for(need(settings))
    if role.first:
        argv = role.first(settings)
        status = os.spawnv(os.P_WAIT, argv[0], argv)
        if status:
            raise Unavailable(f"{' '.join(argv[1:])} failed with status {status}", fix="see the lines above")
    argv = role.argv(settings)
    os.chdir(ROOT)  # where Streamlit looks for its theme
    os.execv(argv[0], argv)


def _write_airflow_login(settings: Settings) -> None:
    file = settings.home / "airflow" / "passwords.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f".passwords.{os.getpid()}")
    fresh.touch(mode=0o600)
    fresh.write_text(json.dumps({settings.airflow_user: settings.airflow_password}))
    fresh.replace(file)


def _write_mlflow_login(settings: Settings) -> None:
    """MLflow's file of its own login; its users stand in its database."""
    if not settings.mlflow_password:
        return
    config = configparser.RawConfigParser()
    config["mlflow"] = {
        "default_permission": "READ",
        "database_uri": driver(settings.mlflow_database_url),
        "admin_username": settings.mlflow_user,
        "admin_password": settings.mlflow_password,
        "authorization_function": "mlflow.server.auth:authenticate_request_basic_auth",
        # A password is checked with PBKDF2, 0.4 s of a core: once a minute, not at each live metric.
        "auth_cache_ttl_seconds": "60",
    }
    file = settings.home / "mlflow-login.ini"
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    fresh.touch(mode=0o600)
    with fresh.open("w") as stream:
        config.write(stream)
    fresh.replace(file)
    os.environ["MLFLOW_AUTH_CONFIG_PATH"] = str(file)
    # It signs the form with which MLflow's admin adds users; a new one at each start only spoils an open form.
    os.environ["MLFLOW_FLASK_SERVER_SECRET_KEY"] = secrets.token_urlsafe(32)


def driver(url: str) -> str:
    """`postgresql://` as SQLAlchemy wants it, with the driver named."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(scheme="postgresql+psycopg2")) if url else ""
