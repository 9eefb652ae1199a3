"""The module and its factory."""

import json
import os
import subprocess
import sys
import time

from neuroloop.core.errors import InvalidSetting
from serving.running import Api, head, serving

_IMPORT = """
import sys
before = set(sys.modules)
import neuroloop.serving.api
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""


def python(code: str, **environ: str) -> subprocess.CompletedProcess:
    keep = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    path = os.pathsep.join(sys.path)
    return subprocess.run(
        [sys.executable, "-c", code],
        env=keep | {"PYTHONPATH": path} | environ,
        capture_output=True,
        text=True,
        check=False,
    )


def test_importing_the_api_pulls_in_neither_tensorflow_nor_mlflow():
    loaded = python(_IMPORT).stdout.split()
    assert "fastapi" in loaded
    assert not {"tensorflow", "keras", "mlflow", "airflow", "psycopg2", "google", "matplotlib"} & set(loaded)


def test_the_factory_refuses_to_start_without_a_database_and_names_the_setting(tmp_path):
    done = python("from neuroloop.serving.api import app; app()", NEUROLOOP_HOME=str(tmp_path))
    assert done.returncode != 0
    assert f"{InvalidSetting.__name__}: NEUROLOOP_DATABASE_URL" in done.stderr


def test_each_request_is_logged_once_as_one_json_object(services, champion, caplog):
    with serving(services) as api, caplog.at_level("INFO", "neuroloop.serving.request_log"):
        caplog.clear()
        response = api.predict(head("glioma"))
        api.client.get(response.headers["Location"])
    first, second = (
        json.loads(record.getMessage()) for record in caplog.records if record.name.endswith("request_log")
    )
    assert first.pop("milliseconds") > 0
    assert first == {
        "request": response.headers["X-Request-Id"],
        "method": "POST",
        "route": "/v1/predictions",
        "status": 201,
        "prediction": response.json()["id"],
        "version": champion,
    }
    assert second["route"] == "/v1/predictions/{prediction_id}"


def test_a_server_stops_within_seconds(services, champion):
    with serving(services):
        started = time.monotonic()
    assert time.monotonic() - started < 8


def test_probes_answer_while_all_predicting_threads_are_busy(api: Api):
    from concurrent.futures import ThreadPoolExecutor

    large = head("glioma", height=2000, width=2000)
    with ThreadPoolExecutor(12) as pool:
        busy = [pool.submit(api.predict, large) for _ in range(12)]
        probe = api.client.get("/health/ready")
        answers = [one.result().status_code for one in busy]
    assert probe.status_code == 200
    assert set(answers) == {201}
