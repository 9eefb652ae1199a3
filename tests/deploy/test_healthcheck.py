"""The health check of the containers, against a real HTTP server."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "deploy" / "healthcheck.py"


class Monitor(BaseHTTPRequestHandler):
    """Answers as Airflow's monitor does, with one part that is not healthy; anything else is not found."""

    def do_GET(self) -> None:
        parts = {"scheduler": {"status": "healthy"}, "triggerer": {"status": "unhealthy"}, "dag_processor": None}
        found = self.path == "/api/v2/monitor/health"
        self.send_response(200 if found else 404)
        self.end_headers()
        self.wfile.write(json.dumps(parts).encode() if found else b"")

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent."""


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Monitor)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def ask(*args: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-IS", SCRIPT, *args], capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def test_an_open_port_and_a_page_that_answers_are_healthy(port: int):
    assert ask(f"tcp://127.0.0.1:{port}") == (0, "")
    assert ask(f"http://127.0.0.1:{port}/api/v2/monitor/health") == (0, "")


def test_a_proxy_meant_for_the_internet_is_not_asked(port: int, free_port, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert ask(f"http://127.0.0.1:{port}", "scheduler") == (0, "")


def test_a_closed_port_and_a_missing_page_are_not(port: int, free_port):
    for url in (f"tcp://127.0.0.1:{free_port()}", f"http://127.0.0.1:{port}/nothing"):
        status, reason = ask(url)
        assert status == 1
        assert f"{url} does not answer" in reason


def test_a_part_of_airflow_is_as_healthy_as_its_monitor_says(port: int):
    monitor = f"http://127.0.0.1:{port}"
    assert ask(monitor, "scheduler") == (0, "")
    assert ask(monitor, "triggerer") == (1, "triggerer is unhealthy\n")
    assert ask(monitor, "dag_processor") == (1, "dag_processor is unknown\n")
