"""deploy/postgres/databases.sh, on a server whose administrator is a superuser, and on one where it is not."""

import contextlib
import os
import secrets
import subprocess
from pathlib import Path

import psycopg2
import pytest

from conftest import PostgresServer
from neuroloop.embedded.postgres import binary

SCRIPT = Path(__file__).parents[2] / "deploy" / "postgres" / "databases.sh"
NAMES = ("airflow", "mlflow", "neuroloop")


@pytest.fixture
def server(tmp_path: Path, free_port):
    """A new server, for roles are the whole server's."""
    found = PostgresServer(tmp_path / "postgres", free_port(), secrets.token_urlsafe(16))
    found.start()
    yield found
    found.stop()


def run(server: PostgresServer, admin: str, passwords: dict[str, str]) -> None:
    """The script as `admin`, whose password is the server's."""
    path = {"PATH": f"{Path(binary('psql')).parent}:{os.environ['PATH']}"}
    given = {"PGHOST": "127.0.0.1", "PGPORT": str(server.port), "POSTGRES_USER": admin, "PGPASSWORD": server.password}
    given |= {f"POSTGRES_{name.upper()}_PASSWORD": passwords[name] for name in NAMES}
    done = subprocess.run([SCRIPT], env=path | given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("rights", ["SUPERUSER", "NOSUPERUSER CREATEDB CREATEROLE"])
def test_the_databases_are_made_and_a_second_run_sets_other_passwords(server: PostgresServer, rights: str):
    with contextlib.closing(psycopg2.connect(server.url())) as connection:
        connection.autocommit = True
        connection.cursor().execute(f"CREATE ROLE admin LOGIN {rights} PASSWORD %s", [server.password])
    for _ in range(2):
        passwords = {name: f'it\'s "{secrets.token_urlsafe(9)}"' for name in NAMES}
        run(server, "admin", passwords)
        for name in NAMES:
            login = {"user": name, "password": passwords[name], "dbname": name}
            with contextlib.closing(psycopg2.connect(host="127.0.0.1", port=server.port, **login)) as connection:
                cursor = connection.cursor()
                cursor.execute("CREATE TABLE IF NOT EXISTS mine (n int)")
                cursor.execute("SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = current_database()")
                assert cursor.fetchone() == (name,)
                connection.commit()
