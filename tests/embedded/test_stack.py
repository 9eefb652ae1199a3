"""What `make up` decides before it starts anything; that it starts, restarts and stops is the story's."""

import json
import os
import socket
import stat
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from supervisor.options import ServerOptions

from neuroloop.bootstrap import services
from neuroloop.core.credentials import parted
from neuroloop.core.errors import InvalidSetting, Unavailable
from neuroloop.core.settings import Settings
from neuroloop.embedded import roles
from neuroloop.embedded.stack import PORTS, Stack

ROOT = Path(__file__).parents[2]


@pytest.fixture
def environ(tmp_path):
    return {"NEUROLOOP_HOME": str(tmp_path / "home"), "NEUROLOOP_ENV_FILE": str(tmp_path / ".env"), "PATH": os.defpath}


@pytest.fixture
def taken():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_the_first_start_generates_secrets_only_their_owner_can_read(environ, tmp_path):
    Stack(environ)._generate()
    file = tmp_path / "home" / "env"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    settings = Settings.load(environ)
    secrets = [settings.airflow_password, settings.postgres_password, settings.airflow_jwt_secret]
    assert all(len(secret) >= 16 for secret in secrets)
    secrets += [settings.ui_password, settings.mlflow_password, settings.mlflow_api_password, settings.ui_api_key]
    assert all(len(secret) >= 16 for secret in secrets)
    assert len(set(secrets)) == 7
    assert parted(settings.ui_api_key)
    settings.require("database_url", "mlflow_database_url", "airflow_database_url", "airflow_fernet_key")


def test_a_new_home_is_for_nobody_else(environ, tmp_path):
    before = os.umask(0o022)
    try:
        Stack(environ)._generate()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "home").stat().st_mode) == 0o700


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_home_that_cannot_be_one_is_a_clear_error(environ, tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidSetting, match=f"NEUROLOOP_HOME=.*{name} cannot be used"):
        Stack({**environ, "NEUROLOOP_HOME": str(tmp_path / name)})._generate()


def test_a_second_start_changes_nothing_that_was_generated(environ, tmp_path):
    Stack(environ)._generate()
    before = (tmp_path / "home" / "env").read_text()
    Stack(environ)._generate()
    assert (tmp_path / "home" / "env").read_text() == before


def test_a_database_password_with_signs_stays_as_it_is_over_any_number_of_starts(environ, tmp_path):
    link = "postgresql://neuroloop:a%40b%25@127.0.0.1:5432/neuroloop"  # pragma: allowlist secret
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "env").write_text(f"NEUROLOOP_DATABASE_URL={link}\n")
    for _ in range(2):
        stack = Stack(environ)
        stack._generate()
        assert stack.settings.database_url == link.replace("5432", str(stack.settings.postgres_port))


def test_a_secret_that_the_user_sets_for_a_while_does_not_cost_the_generated_one(environ, tmp_path):
    Stack(environ)._generate()
    before = (tmp_path / "home" / "env").read_text()
    stack = Stack({**environ, "NEUROLOOP_MLFLOW_PASSWORD": "of the user"})  # pragma: allowlist secret
    stack._generate()
    assert stack.settings.mlflow_password == "of the user"  # pragma: allowlist secret
    Stack(environ)._generate()
    assert (tmp_path / "home" / "env").read_text() == before


def test_a_port_the_user_chose_and_that_is_in_use_is_a_clear_error(environ, taken):
    with pytest.raises(InvalidSetting, match=f"NEUROLOOP_API_PORT={taken} is in use"):
        Stack({**environ, "NEUROLOOP_API_PORT": str(taken)})._generate()


def test_a_usual_port_in_use_is_replaced_by_a_free_one_and_every_address_follows(environ, tmp_path, taken):
    said = []
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "env").write_text(f"NEUROLOOP_API_PORT={taken}\n")
    stack = Stack(environ, said.append)
    stack._generate()
    assert stack.settings.api_port != taken
    assert stack.settings.api_url == f"http://127.0.0.1:{stack.settings.api_port}"
    assert any(f"port {taken} is in use" in line for line in said)


def test_a_port_the_user_chose_that_is_another_servers_usual_one_is_the_chosen_servers_alone(environ, free_port):
    port = free_port()
    (Path(environ["NEUROLOOP_HOME"])).mkdir()
    (Path(environ["NEUROLOOP_HOME"]) / "env").write_text(f"NEUROLOOP_AIRFLOW_PORT={port}\n")
    stack = Stack({**environ, "NEUROLOOP_API_PORT": str(port)})
    stack._generate()
    assert stack.settings.api_port == port
    assert len({getattr(stack.settings, f"{name}_port") for name in PORTS}) == len(PORTS)
    assert stack.settings.airflow_url == f"http://127.0.0.1:{stack.settings.airflow_port}"


def test_one_port_for_two_servers_is_a_clear_error(environ, free_port):
    port = str(free_port())
    with pytest.raises(InvalidSetting, match=f"NEUROLOOP_API_PORT and NEUROLOOP_UI_PORT are both {port}"):
        Stack({**environ, "NEUROLOOP_API_PORT": port, "NEUROLOOP_UI_PORT": port})._generate()


def test_no_two_servers_share_a_port(environ):
    settings = Stack(environ).settings
    assert len({getattr(settings, f"{name}_port") for name in PORTS}) == len(PORTS)


def test_what_the_user_set_is_not_written_over(environ, tmp_path):
    (tmp_path / ".env").write_text("NEUROLOOP_AIRFLOW_PASSWORD=my-own\n")
    stack = Stack(environ)
    stack._generate()
    assert stack.settings.airflow_password == "my-own"
    assert "my-own" not in (tmp_path / "home" / "env").read_text()


@pytest.mark.parametrize("who", ["make up", "a role", "a task"])
def test_what_runs_on_this_machine_is_asked_past_a_proxy(who, environ, free_port, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        match who:
            case "make up":
                stack = Stack({**environ, "NEUROLOOP_AIRFLOW_URL": url})
                assert stack._healthy("airflow-api")
                assert stack.airflow().health() == {"scheduler": "healthy"}
            case "a role":
                program = "import sys; from neuroloop.embedded.roles import ROLES, Role, become\n"
                program += "own = lambda _: [sys.executable, '-c', 'import os; print(os.environ[\"no_proxy\"])']\n"
                program += "ROLES['probe'] = Role(own, needs=(lambda _: sys.argv[1],)); become('probe')"
                done = subprocess.run(
                    [sys.executable, "-c", program, f"{url}/health"],
                    env={**os.environ, **environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                    capture_output=True,
                    text=True,
                    timeout=60,
                    check=False,
                )
                assert done.stdout == "localhost,127.0.0.1,::1\n", done.stderr
            case _:
                outside = services(Settings.load({**environ, "NEUROLOOP_MLFLOW_TRACKING_URI": url}))
                assert outside.registry.by_alias("champion") is None
        server.shutdown()


class Answers(BaseHTTPRequestHandler):
    """Everything is well here, and no model is registered."""

    def do_GET(self) -> None:
        found = not self.path.startswith("/api/2.0/mlflow/")
        body = {"scheduler": {"status": "healthy"}} if found else {"error_code": "RESOURCE_DOES_NOT_EXIST"}
        self.send_response(200 if found else 404)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent."""


def test_the_supervisor_takes_a_home_with_a_percent_sign(environ, tmp_path, monkeypatch):
    stack = Stack({**environ, "NEUROLOOP_HOME": str(tmp_path / "100%s"), "NEUROLOOP_SUPERVISOR_PASSWORD": "a%b"})
    stack._generate()
    read, file = ServerOptions(), stack._configure_supervisor()
    monkeypatch.chdir(tmp_path / "100%s")
    read.realize(["-c", str(file)])
    assert read.logfile == str(tmp_path / "100%s" / "logs" / "supervisord.log")
    assert read.configroot.supervisord.server_configs[0]["password"] == "a%b"  # pragma: allowlist secret
    programs = {each.name: each.process_configs[0] for each in read.process_group_configs}
    assert set(programs) == set(roles.EMBEDDED)
    assert programs["api"].directory == str(tmp_path / "100%s")
    assert programs["api"].stdout_logfile == "logs/api.log"


def test_a_platform_that_does_not_run_says_so_for_every_part(environ):
    stack = Stack(environ)
    assert stack.status() == dict.fromkeys(roles.EMBEDDED, "stopped")
    stack.down()


def test_an_unknown_role_names_the_known_ones():
    done = subprocess.run([ROOT / "entrypoint.sh", "webserver"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "'webserver' is no role" in done.stderr
    assert "dag-processor" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_need_that_never_comes_is_named_with_the_reason(free_port):
    with pytest.raises(Unavailable, match="refused"):
        roles.wait_for(f"tcp://127.0.0.1:{free_port()}", seconds=0.5)


def test_a_misspelt_setting_is_one_line_before_anything_starts(environ, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "neuroloop.cli", "up"],
        env={**environ, "NEUROLOOP_FEEDBACK_TRESHOLD": "5"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "did you mean NEUROLOOP_FEEDBACK_THRESHOLD?" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "home").exists()
