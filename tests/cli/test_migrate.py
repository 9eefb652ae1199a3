"""`neuroloop migrate`, as a deployment runs it before the servers."""

import os
import subprocess
import sys
from pathlib import Path

import psycopg2
import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path.stem for path in (ROOT / "src/neuroloop/adapters/migrations").glob("*.sql"))


@pytest.fixture
def migrate(tmp_path: Path):
    """A function that runs the command on the database of a URL, through the entrypoint of the images."""

    def run(url: str, *args: str) -> subprocess.CompletedProcess[str]:
        environ = {"PATH": os.defpath, "PYTHONPATH": os.pathsep.join(sys.path), "NEUROLOOP_HOME": str(tmp_path)}
        environ |= {"NEUROLOOP_ENV_FILE": str(tmp_path / "none"), "NEUROLOOP_DATABASE_URL": url}
        argv = [ROOT / "entrypoint.sh", sys.executable, "-m", "neuroloop.cli", "migrate", *args]
        return subprocess.run(argv, env=environ, capture_output=True, text=True, check=False)

    return run


def test_an_empty_database_gets_every_step_once(migrate, postgres_url: str):
    assert migrate(postgres_url).stdout.splitlines() == FILES
    with psycopg2.connect(postgres_url) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM predictions")
        assert cursor.fetchone() == (0,)
    assert migrate(postgres_url).stdout == "nothing to do\n"


def test_without_a_database_it_fails_in_one_line_that_says_so(migrate, free_port):
    done = migrate(f"postgresql://user:password@127.0.0.1:{free_port()}/neuroloop", "--wait", "1")
    assert done.returncode == 1
    assert "did not answer in 1 s" in done.stderr
    assert "password" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_no_database_set_names_the_setting(migrate):
    assert "NEUROLOOP_DATABASE_URL is not set" in migrate("").stderr
