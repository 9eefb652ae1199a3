"""`neuroloop keys`, as a person types it."""

import os
import subprocess
import sys

import pytest

from neuroloop.adapters.postgres import PostgresLog
from neuroloop.core.credentials import parted


@pytest.fixture
def neuroloop(postgres_url: str, tmp_path):
    """A function that runs the command line on an empty database."""
    environ = {"PATH": os.defpath, "PYTHONPATH": os.pathsep.join(sys.path), "NEUROLOOP_HOME": str(tmp_path)}
    environ |= {"NEUROLOOP_ENV_FILE": str(tmp_path / "none"), "NEUROLOOP_DATABASE_URL": postgres_url}

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "neuroloop.cli", "keys", *args]
        return subprocess.run(argv, env=environ, capture_output=True, text=True, check=False)

    return run


def test_a_key_is_made_listed_and_revoked(neuroloop, postgres_url: str):
    made = neuroloop("create", "Zoë Müller", "--role", "reader", "--days", "2")
    key_id, secret = parted(made.stdout.strip())
    row = PostgresLog(postgres_url).api_key(key_id)
    assert row.matches(secret)
    assert (row.name, row.role, row.delegates) == ("Zoë Müller", "reader", False)
    listed = neuroloop("list").stdout
    assert key_id in listed
    assert "Zoë Müller" in listed
    assert "valid" in listed
    assert secret not in listed
    assert neuroloop("revoke", key_id).stdout == f"the key {key_id} of Zoë Müller is revoked\n"
    assert "revoked" in neuroloop("list").stdout


def test_what_cannot_be_done_is_one_line(neuroloop):
    for args, why in (
        (("revoke", "nobody"), "there is no key"),
        (("create", " ", "--role", "reader"), "characters"),
        (("create", "ann", "--role", "reader", "--days", "99999999"), "at most 3650"),
        (("create", "ann", "--role", "reader", "--days", "0"), "more than 0"),
    ):
        done = neuroloop(*args)
        assert done.returncode == 1
        assert why in done.stderr
        assert "Traceback" not in done.stderr
