"""`make up`, `down`, `status`, `logs`: the whole platform on one machine, supervised, in one folder.

First start: passwords and free ports are written to `$NEUROLOOP_HOME/env` (mode 600), from which every process and
every later command reads them. The supervisor restarts what crashes; each role waits for what it needs.
"""

import configparser
import contextlib
import errno
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import xmlrpc.client
from base64 import urlsafe_b64encode
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from neuroloop.core.credentials import new_key
from neuroloop.core.errors import InvalidSetting, NeuroLoopError, Unavailable
from neuroloop.core.settings import PREFIX, Settings, explicit
from neuroloop.embedded import postgres
from neuroloop.embedded.airflow import AirflowClient
from neuroloop.embedded.roles import EMBEDDED, ROOT

PORTS = ("postgres", "mlflow", "airflow", "api", "ui", "mail", "supervisor")
SHOWN = ("airflow", "mlflow", "api", "ui")
_FIRST_EPOCHS = 20  # of the first build at least: what fewer give may not beat the simplest rule
Say = Callable[[str], None]


class Stack:
    """The platform of one `NEUROLOOP_HOME`. `say` gets one line of progress at a time."""

    def __init__(self, environ: Mapping[str, str] | None = None, say: Say = lambda line: None) -> None:
        self.environ = dict(os.environ if environ is None else environ)
        self.say = say
        self.settings = Settings.load(self.environ)
        self.settings.past_proxies(os.environ)  # each of its processes does the same for itself

    # --- commands -------------------------------------------------------------------------------

    def up(self, *, build: bool = True) -> None:
        """Start what is not running, wait until all parts are healthy, and build a first model when there is none."""
        if not self.running():
            if self.processes():
                self.say("ending what an earlier start left behind")
                self.down()
            self._generate()
            self._start_supervisor()
        started = time.monotonic()
        self._wait_healthy()
        self.say(f"all parts healthy after {time.monotonic() - started:.0f} s")
        if build:
            self.ensure_champion()

    def down(self) -> None:
        """Stop all parts and the supervisor; end whatever process of this home is left."""
        pid = self._supervisor_pid()
        if pid:
            with contextlib.suppress(OSError, xmlrpc.client.Error):
                self._supervisor().supervisor.shutdown()
            _until(lambda: not _alive(pid), 90)
        leftovers = self.processes()
        for sign in (signal.SIGTERM, signal.SIGKILL):
            for leftover in leftovers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(leftover, sign)
            if _until(lambda: not self.processes(), 10):
                break
        (self.settings.home / "supervisord.pid").unlink(missing_ok=True)

    def status(self) -> dict[str, str]:
        """Each role and its state in words: `running, healthy`, `starting`, `stopped`..."""
        if not self.running():
            return dict.fromkeys(EMBEDDED, "stopped")
        try:
            infos: Any = self._supervisor().supervisor.getAllProcessInfo()
        except (OSError, xmlrpc.client.Error) as error:
            raise Unavailable(
                "The platform's supervisor does not answer", why=str(error), fix="it may be ending; try again shortly"
            ) from error
        states = {info["name"]: str(info["statename"]).lower() for info in infos}
        return {
            name: f"{states.get(name, 'unknown')}, {'healthy' if self._healthy(name) else 'not ready'}"
            for name in EMBEDDED
        }

    def pid(self, role: str) -> int:
        """The process of a role now, 0 while it has none."""
        info: Any = self._supervisor().supervisor.getProcessInfo(role)
        return int(info["pid"])

    def running(self) -> bool:
        """Whether this home's supervisor lives."""
        return self._supervisor_pid() is not None

    def processes(self) -> list[int]:
        """Ids of all processes, but this one, that were started for this home."""
        mark = f"NEUROLOOP_STACK={self.settings.home}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    dead = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
                    if not dead and mark in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
        return found

    def airflow(self) -> AirflowClient:
        """Airflow's REST API, logged in."""
        return AirflowClient(self.settings.airflow_internal, self.settings.airflow_user, self.settings.airflow_password)

    def summary(self) -> str:
        """URLs and logins."""
        s = self.settings
        return "\n".join(
            [
                f"  frontend  http://127.0.0.1:{s.ui_port}   your own name / {s.ui_password}",
                f"  API       {s.api_url}/docs   a key: neuroloop keys create NAME --role reader",
                f"  Airflow   {s.airflow_url}   login {s.airflow_user} / {s.airflow_password}",
                f"  MLflow    {s.mlflow_tracking_uri}   login {s.mlflow_user} / {s.mlflow_password}",
                f"  state     {s.home}   logs: make logs   stop: make down",
            ]
        )

    # --- first start ----------------------------------------------------------------------------

    def _generate(self) -> None:
        home = self.settings.home
        try:
            home.mkdir(mode=0o700, parents=True, exist_ok=True)  # uploads are for nobody else of this machine
            if not os.access(home, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise InvalidSetting(
                f"{PREFIX}HOME={home} cannot be used",
                why=error.strerror or str(error),
                fix="name a folder that you may write to",
            ) from None
        if home.stat().st_mode & 0o077:
            self.say(f"{home} is open to other users of this machine; to keep uploads from them: chmod 700 {home}")
        file, set_by_user = home / "env", explicit(self.environ)
        before: dict[str, str] = {}
        if file.exists():
            before = dict(line.split("=", 1) for line in file.read_text().splitlines() if "=" in line)
        values = dict(before)
        for name in ("postgres", "airflow", "mlflow", "mlflow_api", "ui", "supervisor"):
            values.setdefault(f"{PREFIX}{name.upper()}_PASSWORD", secrets.token_urlsafe(12))
        values.setdefault(f"{PREFIX}UI_API_KEY", new_key())
        values.setdefault(f"{PREFIX}AIRFLOW_JWT_SECRET", secrets.token_urlsafe(32))
        values.setdefault(f"{PREFIX}AIRFLOW_FERNET_KEY", urlsafe_b64encode(secrets.token_bytes(32)).decode())
        ports = self._ports(set_by_user)
        for name, port in ports.items():
            values[f"{PREFIX}{name.upper()}_PORT"] = str(port)
        urls = {
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{ports['mlflow']}",
            "AIRFLOW_URL": f"http://127.0.0.1:{ports['airflow']}",
            "API_URL": f"http://127.0.0.1:{ports['api']}",
            "NOTIFY_URL": f"smtp://127.0.0.1:{ports['mail']}",
        }
        for name, role in (("", "neuroloop"), ("AIRFLOW_", "airflow"), ("MLFLOW_", "mlflow")):
            key = f"{PREFIX}{name}DATABASE_URL"
            old = values.get(key, "")
            password = unquote(old.split(":", 2)[2].rsplit("@", 1)[0]) if old else secrets.token_urlsafe(16)
            urls[f"{name}DATABASE_URL"] = postgres.url(role, password, ports["postgres"])
        values |= {PREFIX + key: value for key, value in urls.items()}
        # What the user set counts instead; a secret from before is kept for when they no longer do.
        values = {
            key: before[key] if key in set_by_user else value
            for key, value in values.items()
            if key in before or key not in set_by_user
        }
        fresh = file.with_name("env.new")
        fresh.unlink(missing_ok=True)
        fresh.touch(mode=0o600)
        fresh.write_text("".join(f"{key}={value}\n" for key, value in sorted(values.items())))
        fresh.replace(file)
        self.settings = Settings.load(self.environ)

    def _ports(self, set_by_user: Mapping[str, str]) -> dict[str, int]:
        """A port for each server: the setting's where the user gave one, else the usual or a free one."""
        keys = {name: f"{PREFIX}{name.upper()}_PORT" for name in PORTS}
        wanted = {name: int(getattr(self.settings, f"{name}_port")) for name in PORTS}
        chosen: dict[int, str] = {}
        for name in PORTS:
            if keys[name] in set_by_user:
                other, port = chosen.setdefault(wanted[name], name), wanted[name]
                if other != name:
                    raise InvalidSetting(
                        f"{keys[other]} and {keys[name]} are both {port}",
                        why="two servers cannot listen on one port",
                        fix="set another one, or leave one of them out",
                    )
                if not _free(port):
                    raise InvalidSetting(
                        f"{keys[name]}={port} is in use",
                        why="another program listens there",
                        fix="stop it or set another port",
                    )
        ports = {name: port for port, name in chosen.items()}
        for name in PORTS:
            if name not in ports:
                port = wanted[name]
                if port in ports.values() or not _free(port):
                    port = _free_port({*ports.values(), *wanted.values()})
                    whose = f"chosen for {chosen[wanted[name]]}" if wanted[name] in chosen else "in use"
                    self.say(f"port {wanted[name]} is {whose}; {name} takes {port}")
                ports[name] = port
        return ports

    # --- supervisor -----------------------------------------------------------------------------

    def _configure_supervisor(self) -> Path:
        """The supervisor's file, in which `%` is written twice."""
        home = self.settings.home
        (home / "logs").mkdir(exist_ok=True)
        config: dict[str, dict[str, str]] = {}
        config["supervisord"] = {
            "nodaemon": "false",
            "logfile": str(home / "logs" / "supervisord.log"),
            "pidfile": str(home / "supervisord.pid"),
            "childlogdir": str(home / "logs"),
            **({"user": "root"} if os.geteuid() == 0 else {}),
        }
        config["inet_http_server"] = {
            "port": f"127.0.0.1:{self.settings.supervisor_port}",
            "username": "neuroloop",
            "password": self.settings.supervisor_password,
        }
        config["rpcinterface:supervisor"] = {
            "supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface"
        }
        for name in EMBEDDED:
            config[f"program:{name}"] = {
                "command": f'"{ROOT / "entrypoint.sh"}" {name}',
                "directory": str(home),
                "autorestart": "true",
                "startsecs": "1",
                "startretries": "1000",
                "stopasgroup": "true",
                "killasgroup": "true",
                "stopsignal": "INT" if name == "postgres" else "TERM",
                "stopwaitsecs": "20",
                # PostgreSQL and MLflow stop last: what writes to them ends first.
                "priority": {"postgres": "1", "mail": "1", "mlflow": "2"}.get(name, "10"),
                "redirect_stderr": "true",
                "stdout_logfile": f"logs/{name}.log",  # from its home: of this path, a % would be read twice
                "stdout_logfile_maxbytes": "10MB",
                "stdout_logfile_backups": "1",
            }
        file = home / "supervisord.conf"
        file.touch(mode=0o600)
        written = configparser.RawConfigParser()
        written.read_dict(
            {part: {key: value.replace("%", "%%") for key, value in own.items()} for part, own in config.items()}
        )
        with file.open("w") as stream:
            written.write(stream)
        return file

    def _start_supervisor(self) -> None:
        home, file = self.settings.home, self._configure_supervisor()
        env_file = Path(self.environ.get(f"{PREFIX}ENV_FILE") or ".env").absolute()
        marks = {"NEUROLOOP_HOME": str(home), "NEUROLOOP_STACK": str(home), "NEUROLOOP_ENV_FILE": str(env_file)}
        environ = {**self.environ, **marks}
        # The supervisor's switch from parent to child keeps no terminal: make up may end, the platform stays.
        done = subprocess.run(
            [sys.executable, "-m", "supervisor.supervisord", "-c", str(file)],
            env=environ,
            cwd=home,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise NeuroLoopError("the supervisor did not start", why=(done.stdout + done.stderr)[-500:])
        if not _until(self.running, 10):
            raise NeuroLoopError("the supervisor did not start", fix=f"see {home / 'logs' / 'supervisord.log'}")

    def _supervisor(self) -> Any:
        login = f"neuroloop:{self.settings.supervisor_password}"
        return xmlrpc.client.ServerProxy(f"http://{login}@127.0.0.1:{self.settings.supervisor_port}/RPC2")

    def _supervisor_pid(self) -> int | None:
        try:
            pid = int((self.settings.home / "supervisord.pid").read_text())
        except (OSError, ValueError):
            return None
        return pid if pid in self.processes() else None

    # --- health ---------------------------------------------------------------------------------

    def _healthy(self, role: str) -> bool:
        s = self.settings
        match role:
            case "postgres" | "mail":
                return not _free(s.postgres_port if role == "postgres" else s.mail_port)
            case "mlflow":
                return _answers(f"{s.mlflow_tracking_uri}/health")
            case "api":
                return _answers(f"{s.api_url}/health/live")
            case "ui":
                return _answers(f"http://127.0.0.1:{s.ui_port}/_stcore/health")
            case "airflow-api":
                return _answers(f"{s.airflow_url}/api/v2/version")
            case _:
                return self.airflow().health().get(role.replace("-", "_")) == "healthy"

    def _wait_healthy(self, seconds: float = 300) -> None:
        waiting, deadline = list(EMBEDDED), time.monotonic() + seconds
        while waiting:
            for role in list(waiting):
                if self._healthy(role):
                    waiting.remove(role)
                    self.say(f"{role} is healthy")
            if waiting and time.monotonic() > deadline:
                logs = self.settings.home / "logs"
                raise Unavailable(
                    f"{', '.join(waiting)} not healthy after {seconds:.0f} s", fix=f"read {logs}/{waiting[0]}.log"
                )
            time.sleep(0.5)

    # --- first model ----------------------------------------------------------------------------

    def ensure_champion(self) -> None:
        """Trigger the build DAG where no model serves, and show its progress until one does."""
        if self._serving() or self._champion_comes():
            return
        airflow = self.airflow()
        run = airflow.active_run("data_and_model_build")
        if run is None:
            self.say("no model yet: building one")
            # Simulated scans only show that the platform works: a small and short training does, if not too short.
            small = {
                "minutes": self.settings.first_build_minutes,
                "image_size": min(96, self.settings.image_size),
                "hyperparameters": {"least_epochs": _FIRST_EPOCHS},
            }
            conf = small if self.settings.data_url.startswith("phantom://") else {}
            run = airflow.trigger("data_and_model_build", conf)
        airflow.follow("data_and_model_build", run, self.say)
        if not _until(self._serving, 60):
            raise Unavailable(
                "the build ended but no model serves",
                why=self._last_decision(),
                fix="trigger data_and_model_build with more minutes; if it was promoted, see logs/api.log",
            )
        self.say("the model serves")

    def _champion_comes(self, seconds: float = 60) -> bool:
        """Whether the server comes to serve the champion that there is; False at once where there is none.

        A server and a registry that have just started need a while for it, and nobody wants a second model meanwhile.
        """
        champion: str | None = None

        def over() -> bool:
            nonlocal champion
            if (models := self._models()) is not None:
                champion = next((each["version"] for each in models["versions"] if "champion" in each["aliases"]), "")
            return self._serving() or champion == ""

        if not _until(over, seconds):
            why = f"version {champion}, the champion, does not load" if champion else "the registry cannot be asked"
            self.say(f"{why}: see logs/api.log")
        return self._serving()

    def _last_decision(self) -> str:
        """What the latest promotion, or what was not promoted, is recorded with."""
        models = self._models()
        if models is None:
            return "the registry cannot be asked"
        return str(models["promotions"][0]["reason"]) if models["promotions"] else "the run registered no model"

    def _models(self) -> dict[str, Any] | None:
        """The registered versions and the ledger of promotions, None where the registry cannot be asked."""
        key = {"Authorization": f"Bearer {self.settings.ui_api_key}"}
        request = urllib.request.Request(f"{self.settings.api_url}/v1/models", headers=key)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return dict(json.load(answer))
        except (OSError, ValueError):
            return None

    def _serving(self) -> bool:
        return _answers(f"{self.settings.api_url}/v1/model", self.settings.ui_api_key)


def _answers(url: str, key: str = "") -> bool:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _free_port(taken: Any) -> int:
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port not in taken:
            return port


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
