"""deploy/postgres/databases.sh, where the administrator is a superuser and where not; by the README's command too."""

import contextlib
import os
import re
import secrets
import subprocess
import sys
from pathlib import Path

import psycopg2
import pytest

from conftest import PostgresServer
from neuroloop.embedded.postgres import binary

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "deploy" / "postgres" / "databases.sh"
NAMES = ("airflow", "mlflow", "neuroloop")


@pytest.fixture
def server(tmp_path: Path, free_port):
    """A new server, for roles are the whole server's."""
    found = PostgresServer(tmp_path / "postgres", free_port(), secrets.token_urlsafe(16))
    found.start()
    yield found
    found.stop()


def make_administrator(server: PostgresServer, rights: str) -> None:
    """A role `admin` with the server's password."""
    with contextlib.closing(psycopg2.connect(server.url())) as connection:
        connection.autocommit = True
        connection.cursor().execute(f"CREATE ROLE admin LOGIN {rights} PASSWORD %s", [server.password])


def run(server: PostgresServer, passwords: dict[str, str]) -> None:
    """The script as the administrator."""
    given = client(server) | {"PGHOST": "127.0.0.1", "POSTGRES_USER": "admin", "PGPASSWORD": server.password}
    given |= {f"POSTGRES_{name.upper()}_PASSWORD": passwords[name] for name in NAMES}
    done = subprocess.run([SCRIPT], env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def client(server: PostgresServer) -> dict[str, str]:
    return {"PATH": f"{Path(binary('psql')).parent}:{os.environ['PATH']}", "PGPORT": str(server.port)}


@pytest.mark.parametrize("rights", ["SUPERUSER", "NOSUPERUSER CREATEDB CREATEROLE"])
def test_the_databases_are_made_and_a_second_run_sets_other_passwords(server: PostgresServer, rights: str):
    make_administrator(server, rights)
    for _ in range(2):
        passwords = {name: f'it\'s "{secrets.token_urlsafe(9)}"' for name in NAMES}
        run(server, passwords)
        for name in NAMES:
            login = {"user": name, "password": passwords[name], "dbname": name}
            with contextlib.closing(psycopg2.connect(host="127.0.0.1", port=server.port, **login)) as connection:
                cursor = connection.cursor()
                cursor.execute("CREATE TABLE IF NOT EXISTS mine (n int)")
                cursor.execute("SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = current_database()")
                assert cursor.fetchone() == (name,)
                connection.commit()


def test_the_readmes_command_makes_them_with_the_passwords_of_the_file(server: PostgresServer, tmp_path: Path):
    make_administrator(server, "NOSUPERUSER CREATEDB CREATEROLE")
    readme = (ROOT / "deploy" / "kubernetes" / "README.md").read_text()
    (command,) = re.findall(r"```\n(read -rsp .*?)```", readme, re.DOTALL)
    command = command.replace("10.20.0.3 postgres", "127.0.0.1 admin")
    file = tmp_path / "neuroloop-secrets.env"
    subprocess.run([sys.executable, ROOT / "deploy" / "make-env", file], check=True)
    in_the_pod = 'kubectl() { [ "${!#}" = bash ] && bash; }; '
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", in_the_pod + command],
        env=client(server) | {"HOME": str(tmp_path)},
        cwd=ROOT,
        input=f"{server.password}\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    given = dict(line.split("=", 1) for line in file.read_text().splitlines())
    for name in NAMES:
        login = {"user": name, "password": given[f"POSTGRES_{name.upper()}_PASSWORD"], "dbname": name}
        psycopg2.connect(host="127.0.0.1", port=server.port, **login).close()
