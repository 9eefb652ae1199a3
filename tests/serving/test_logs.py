"""What the API and the frontend write to stdout for a collector: real processes, read line by line."""

import base64
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from neuroloop.bootstrap import Services
from neuroloop.core.credentials import Role, new_key
from neuroloop.serving import keyring
from serving.running import encoded, head, noise, wait
from serving.test_privacy import MARK, dicom_of, marked, png

ROOT = Path(__file__).parents[2]
SECRET = "hunter2-planted-secret"  # pragma: allowlist secret
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Process:
    """One role in a process of its own; what it writes to stdout and stderr, line by line."""

    def __init__(self, argv: list[str], env: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            argv, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def end(self) -> list[str]:
        self.process.terminate()
        self.process.wait(30)
        self._reader.join(30)
        return self.lines


def environment(services: Services, **more: str) -> dict[str, str]:
    settings = services.settings
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NEUROLOOP_")}
    given = {
        "HOME": str(settings.home),
        "DATABASE_URL": settings.database_url,
        "MLFLOW_TRACKING_URI": settings.mlflow_tracking_uri,
        "NOTIFY_URL": settings.notify_url,
        "REFRESH_SECONDS": "0.2",
        "DECODE_SECONDS": "10",
        "LOG_FORMAT": "ecs",
        "ENV_FILE": str(settings.home / "none"),
        "UI_API_KEY": new_key(),
    }
    paths = {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *([kept["PYTHONPATH"]] if "PYTHONPATH" in kept else [])])
    }
    return kept | paths | {f"NEUROLOOP_{name}": value for name, value in given.items()} | more


@pytest.fixture
def api(services, champion, free_port) -> Iterator[tuple[Process, httpx.Client, dict[str, str]]]:
    """The API as its role starts it, writing for a collector."""
    port, env = free_port(), environment(services)
    process = Process([sys.executable, "-m", "neuroloop.serving.server"], env | {"NEUROLOOP_API_PORT": str(port)})
    key = env["NEUROLOOP_UI_API_KEY"]
    with httpx.Client(
        base_url=f"http://127.0.0.1:{port}", timeout=60, headers={"Authorization": f"Bearer {key}"}
    ) as it:
        wait(lambda: _answers(it), 120)
        yield process, it, env
    process.end()


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/health/ready").status_code == 200
    except httpx.TransportError:
        return False


def parsed(lines: list[str]) -> list[dict]:
    assert lines
    for line in lines:
        assert line.startswith("{"), f"no JSON: {line[:300]}"
    return [json.loads(line) for line in lines]


def field(line: dict, name: str):
    """A field by its dotted name, however the line nests it."""
    if name in line:
        return line[name]
    for part in name.split("."):
        line = line.get(part) if isinstance(line, dict) else None
    return line


def test_every_line_of_the_api_is_ecs_and_a_request_can_be_followed_by_its_ids(api, champion):
    process, client, _ = api
    trace = "0af7651916cd43dd8448eb211c80319c"  # pragma: allowlist secret
    answer = client.post(
        "/v1/predictions",
        files={"file": ("a.png", encoded(head("glioma")))},
        headers={"traceparent": f"00-{trace}-b7ad6b7169203331-01"},
    )
    batch = client.post("/v1/predictions:batch", files=[("file", ("a", encoded(head("pituitary"))))])
    assert answer.status_code == 201
    assert client.get("/v1/predictions/none").status_code == 404
    lines = parsed(process.end())
    for line in lines:
        for name in ("@timestamp", "message", "log.level", "log.logger", "ecs.version", "service.name"):
            assert field(line, name), (name, line)
        assert field(line, "service.name") == "neuroloop-api"
        assert field(line, "event.dataset") == "neuroloop.api"
    requests = [line for line in lines if field(line, "event.action") == "request"]
    mine = [line for line in requests if field(line, "http.request.id") == answer.headers["X-Request-Id"]]
    assert len(mine) == 1
    assert field(mine[0], "trace.id") == trace
    assert field(mine[0], "http.route") == "/v1/predictions"
    assert field(mine[0], "http.request.method") == "POST"
    assert field(mine[0], "http.response.status_code") == 201
    assert field(mine[0], "event.duration") > 0
    assert field(mine[0], "neuroloop.prediction.id") == answer.json()["id"]
    assert field(mine[0], "neuroloop.model.version") == champion
    assert mine[0]["message"] == "POST /v1/predictions 201"
    of_batch = [line for line in lines if field(line, "http.request.id") == batch.headers["X-Request-Id"]]
    assert batch.json()["results"][0]["answer"]["id"] in [field(line, "neuroloop.prediction.id") for line in of_batch]
    assert len({field(line, "trace.id") for line in of_batch}) == 1
    assert any(field(line, "log.logger").startswith("uvicorn") for line in lines)


def test_what_is_logged_in_a_thread_of_a_request_names_the_request(api):
    process, client, _ = api
    made = client.post("/v1/keys", json={"name": "ann", "role": "reader"})
    assert made.status_code == 201
    lines = parsed(process.end())
    told = next(line for line in lines if made.json()["id"] in line["message"])
    assert field(told, "log.logger") == "neuroloop.serving.keyring"
    assert field(told, "http.request.id") == made.headers["X-Request-Id"]
    assert field(told, "trace.id")


def test_no_pixel_name_file_name_or_secret_is_in_any_line(api, services):
    process, client, env = api
    ann = keyring.create(services.keys, MARK, Role.READER, by="a test").key
    uploads = {f"{MARK}.dcm": dicom_of(head("glioma")), f"{MARK}.png": png(noise()), f"{MARK}.txt": MARK.encode() * 9}
    images = []
    for name, data in uploads.items():
        sent = client.post(
            "/v1/predictions", files={"file": (name, data)}, headers={"Idempotency-Key": f"{MARK}{name}"}
        )
        assert sent.status_code in (201, 415, 422)
        images += [sent.json()[each] for each in ("image", "heatmap") if sent.json().get(each)]
        client.post("/v1/predictions:batch", files=[("file", (name, data)), ("file", (name, data[: len(data) // 2]))])
        if "id" in sent.json():
            said = {"verdict": "correct", "label": "pituitary", "reader": MARK}
            assert client.post(f"/v1/predictions/{sent.json()['id']}/feedback", json=said).status_code == 200
            gone = client.delete(f"/v1/predictions/{sent.json()['id']}", params={"reason": "mistake", "by": MARK})
            assert gone.status_code == 200
    for more in ({"traceparent": MARK}, {"X-Consent": MARK}, {"Content-Type": MARK}):
        client.post("/v1/predictions", content=uploads[f"{MARK}.dcm"], headers={"Content-Type": "image/*"} | more)
    client.get(f"/v1/{MARK}", params={"name": MARK, "key": SECRET})
    client.get(f"/v1/predictions/{MARK}")
    client.get("/v1/model", headers={"Authorization": f"Bearer {SECRET}", "X-NeuroLoop-Person": MARK})
    client.get("/v1/me", headers={"Authorization": f"Bearer {ann}"})
    client.post("/v1/keys", json={"name": MARK, "role": "reader"})
    client.post("/v1/models/9999/champion", json={"by": MARK, "reason": MARK})
    lines = process.end()
    parsed(lines)
    assert images
    pixels = [text[200:260] for text in images]
    pixels += [base64.b64encode(data[len(data) // 2 :])[:60].decode() for data in uploads.values()]
    database = services.settings.database_url.split(":")[2].split("@")[0]
    secrets = [SECRET, ann, ann.split("_", 2)[2], env["NEUROLOOP_UI_API_KEY"].split("_", 2)[2], database]
    for line in lines:
        assert not marked(line.encode()), line
        assert not any(secret in line for secret in secrets), line
        assert not any(piece in line for piece in pixels), line


def test_a_fault_that_nobody_foresaw_is_one_line_with_its_stack(services, tmp_path):
    code = (
        "import threading; from neuroloop.core import logs; logs.configure('ecs', 'loop')\n"
        "def broken(): raise ValueError('broken here')\n"
        "thread = threading.Thread(target=broken); thread.start(); thread.join(); broken()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(services), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    lines = parsed(done.stdout.splitlines())
    assert done.stderr == ""
    assert [field(line, "error.type") for line in lines] == ["ValueError", "ValueError"]
    assert all("broken" in field(line, "error.stack_trace") for line in lines)


def test_the_frontends_lines_meet_the_apis_by_their_ids(live_api, services):
    code = (
        "import sys; sys.path.append('frontend')\n"
        "from neuroloop.core import logs; logs.configure('ecs', 'ui')\n"
        "from api_client import ApiClient, Identity\n"
        "client = ApiClient(sys.argv[1]).acting_for(Identity(sys.argv[2], person=sys.argv[4], role='reader'))\n"
        "client.predict(open(sys.argv[3], 'rb').read(), 'image/png')\n"
    )
    file = services.settings.home / f"{MARK}.png"
    file.write_bytes(encoded(head("glioma")))
    argv = [sys.executable, "-c", code, f"http://127.0.0.1:{live_api.port}", live_api.key, str(file), MARK]
    done = subprocess.run(argv, env=environment(services), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = parsed(done.stdout.splitlines())
    call = next(line for line in lines if field(line, "event.action") == "call")
    told = next(line for line in lines if field(line, "neuroloop.prediction.id"))
    assert UUID.fullmatch(field(call, "http.request.id"))
    assert field(call, "trace.id") == field(told, "trace.id")
    assert field(told, "neuroloop.model.version")
    assert live_api.client.get(f"/v1/predictions/{field(told, 'neuroloop.prediction.id')}").status_code == 200
    assert not any(marked(line.encode()) or live_api.key in line for line in done.stdout.splitlines())


@pytest.mark.parametrize("level", ["info", "error"])
def test_streamlits_own_lines_are_json_too(services, level: str):
    code = (
        "import logging, streamlit.logger as own; own.get_logger('streamlit.runtime.x')\n"
        "from neuroloop.core import logs; logs.configure('ecs', 'ui')\n"
        f"own.get_logger('streamlit.runtime.x').{level}('as usual')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(services), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [line["message"] for line in parsed(done.stdout.splitlines())] == ["as usual"]


def test_what_is_bound_holds_inside_only_and_its_line_stays_readable_as_text(capsys, caplog):
    from neuroloop.core import logs

    bound: Callable[[], str] = lambda: logs.bound(logs.TRACE)  # noqa: E731
    with logs.about(trace__id="abc"):
        assert bound() == "abc"
        with logs.about(neuroloop__run="r1"):
            assert (bound(), logs.bound(logs.RUN)) == ("abc", "r1")
    assert bound() == ""
