"""Store and database slow, silent, refusing, full: live, not ready, an answer in time, no half state, and recovery."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import psycopg2
import pytest

from neuroloop.bootstrap import Services
from neuroloop.core import keys
from neuroloop.core.credentials import Role
from neuroloop.core.schemas import LABELS
from neuroloop.serving import keyring
from neuroloop.serving.access import FRESH_SECONDS
from servers.relay import Relay
from serving.running import BEARER, KEY, Api, encoded, head, noise, serving, wait

IN_TIME = 15.0
PNG, PROXIED = {"Content-Type": "image/png"}, {"X-Forwarded-For": "192.0.2.1"}


def through(services: Services, relay: Relay, port: int) -> Services:
    """The same services, the database reached through the relay."""
    url = services.settings.database_url.replace(f":{port}/", f":{relay.port}/")
    return Services(services.settings.model_copy(update={"database_url": url}))


def in_the_bucket(services: Services, bucket: str) -> Services:
    return Services(services.settings.model_copy(update={"store_url": f"gs://{bucket}"}))


@pytest.fixture
def relay(postgres_server, free_port) -> Iterator[Relay]:
    with Relay(postgres_server.port, free_port()) as running:
        yield running


@pytest.fixture
def store_relay(gcs_server, gcs_bucket: str, free_port, monkeypatch) -> Iterator[Relay]:
    with Relay(int(gcs_server.url.rsplit(":", 1)[1]), free_port()) as running:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", running.url)
        yield running


def refused_in_time(api: Api, part: str) -> None:
    """Live, not ready for this part only, and predictions are 503 in time."""
    started = time.monotonic()
    response = api.predict(head("glioma"))
    assert time.monotonic() - started < IN_TIME
    assert (response.status_code, response.headers["content-type"]) == (503, "application/problem+json")
    assert int(response.headers["Retry-After"]) > 0
    assert api.client.get("/health/live").status_code == 200
    ready = api.client.get("/health/ready")
    assert ready.status_code == 503
    assert ready.json()["checks"][part] != "ok"
    others = {"database", "store", "model"} - {part}
    assert all(ready.json()["checks"][other] == "ok" for other in others)


def recovers(api: Api) -> None:
    wait(lambda: api.client.get("/health/ready").status_code == 200, 60)
    wait(lambda: api.predict(head("glioma")).status_code == 201, 30)


def whole(services: Services) -> int:
    """Every object has its row and every row its object; how many."""
    stored = [key for prefix in (keys.PREDICTIONS, keys.INVALID) for key in services.store.list(prefix)]
    ids = [key.rsplit("/", 1)[1].removesuffix(".png") for key in stored]
    rows = services.log.known(ids)
    assert sorted(stored) == sorted(row.object_key for row in rows.values())
    assert services.log.monitoring().predictions == len(stored)
    return len(stored)


def test_many_slow_monitoring_pages_leave_connections_to_the_database_for_predictions(services, champion):
    with serving(services) as api, ThreadPoolExecutor(24) as pool:
        with contextlib.closing(psycopg2.connect(services.settings.database_url)) as other, other.cursor() as cursor:
            cursor.execute("LOCK TABLE feedback IN ACCESS EXCLUSIVE MODE")  # predictions do without it
            pages = [pool.submit(api.client.get, "/v1/monitoring") for _ in range(24)]
            time.sleep(1.0)
            assert [api.predict(head("glioma")).status_code for _ in range(3)] == [201] * 3
            assert api.client.get("/health/ready").status_code == 200
            other.rollback()
        assert {page.result().status_code for page in pages} <= {200, 503}


def test_a_database_that_falls_silent_is_503_in_time_and_recovers_without_a_restart(
    services, champion, relay, postgres_server
):
    with serving(through(services, relay, postgres_server.port)) as api:
        assert api.predict(head("glioma")).status_code == 201
        time.sleep(FRESH_SECONDS + 0.1)  # so that the key has to be asked for anew
        relay.stall()
        refused_in_time(api, "database")
        relay.flow()
        recovers(api)
    for key in services.store.list(keys.PREDICTIONS):
        assert services.log.known([key.rsplit("/", 1)[1].removesuffix(".png")]), key


def test_a_database_that_is_down_at_the_start_is_waited_for(services, champion, relay, postgres_server):
    relay.close()
    with serving(through(services, relay, postgres_server.port), model=False) as api:
        wait(lambda: api.client.get("/health/ready").json()["checks"]["model"] == "ok")
        refused_in_time(api, "database")
        relay.open()
        recovers(api)
    assert whole(services) == 1


def test_what_is_away_is_named_to_an_admin_on_this_machine_only(services, champion, relay, postgres_server):
    made = keyring.create(services.keys, "una", Role.UPLOADER, by="a test").key
    uploader = {"Authorization": f"Bearer {made}"}
    with serving(through(services, relay, postgres_server.port)) as api:

        def ask(**more: str) -> httpx.Response:
            return api.client.post("/v1/predictions", content=encoded(head("glioma")), headers=PNG | more)

        assert ask(**uploader).status_code == 201  # and the key is known
        relay.close()
        here, *others = ask(), ask(**PROXIED), ask(**uploader)
        files = [("file", ("a", encoded(head("glioma"))))] * 2
        batch = api.client.post("/v1/predictions:batch", files=files)
        relay.open()
    assert f"127.0.0.1:{relay.port}" in here.json()["detail"]
    for other in (*others, batch):
        assert other.status_code == here.status_code == 503
        assert other.json()["detail"] == "A part that the service needs does not answer"
        assert str(relay.port) not in other.text
        assert "PostgreSQL" not in other.text


def test_a_registry_that_hangs_keeps_no_verdict_waiting(services, champion, mlflow_uri, free_port):
    with Relay(int(mlflow_uri.rsplit(":", 1)[1]), free_port()) as relay:
        moved = services.settings.model_copy(update={"mlflow_tracking_uri": relay.url})
        with serving(Services(moved)) as api, ThreadPoolExecutor(10) as pool:
            given = api.predict(head("glioma")).json()["id"]
            relay.stall()
            hanging = [pool.submit(api.client.get, "/v1/models") for _ in range(10)]
            time.sleep(0.5)
            assert api.feedback(given, "agree").status_code == 200
            assert not any(each.done() for each in hanging)
            assert {each.result().status_code for each in hanging} == {503}
            relay.flow()


def test_a_database_that_hangs_at_the_start_is_waited_for(services, champion, relay, postgres_server):
    relay.stall()
    with serving(through(services, relay, postgres_server.port), model=False) as api:
        wait(lambda: api.client.get("/health/ready").json()["checks"]["model"] == "ok")
        refused_in_time(api, "database")
        relay.flow()
        recovers(api)


def test_a_slow_database_is_answered_by_as_soon_as_it_can(services, champion, relay, postgres_server):
    with serving(through(services, relay, postgres_server.port)) as api:
        assert api.predict(head("glioma")).status_code == 201
        relay.stall()
        threading.Timer(2.0, relay.flow).start()
        assert api.predict(head("glioma")).status_code == 201
    assert whole(services) == 2


def test_a_row_whose_commit_broke_off_is_answered_with_what_was_recorded(services, champion, relay, postgres_server):
    with serving(through(services, relay, postgres_server.port)) as api:
        assert api.predict(head("glioma")).status_code == 201
        wait(lambda: api.client.get("/health/ready").status_code == 200)
        relay.tell_of(b"INSERT INTO predictions", lambda: relay.swallow_answer_to(b"COMMIT"))
        broken = api.predict(head("glioma"))
        relay.tell_of(b"INSERT INTO predictions", lambda: None)
        assert whole(services) == 2  # the row is there, so it is answered
        assert broken.status_code == 201
        assert set(services.log.known([broken.json()["id"]])) == {broken.json()["id"]}
        recovers(api)


def test_a_row_that_broke_off_before_its_commit_is_503_and_leaves_nothing(services, champion, relay, postgres_server):
    with serving(through(services, relay, postgres_server.port)) as api:
        assert api.predict(head("glioma")).status_code == 201
        wait(lambda: api.client.get("/health/ready").status_code == 200)
        relay.swallow_answer_to(b"INSERT INTO predictions")
        assert api.predict(head("glioma")).status_code == 503
        assert whole(services) == 1
        recovers(api)


@pytest.mark.parametrize("start", ["before the server", "while it serves"])
def test_a_store_that_is_down_is_503_in_time_and_recovers(services, champion, store_relay, gcs_bucket, start):
    inside = in_the_bucket(services, gcs_bucket)
    if start == "before the server":
        store_relay.close()
    with serving(inside) as api:
        if start != "before the server":
            assert api.predict(head("glioma")).status_code == 201
            store_relay.close()
        refused_in_time(api, "store")
        assert services.log.monitoring().predictions == (start != "before the server")
        store_relay.open()
        recovers(api)
    wait(lambda: whole(inside) >= 1)


def test_a_store_that_falls_silent_is_503_in_time_and_recovers(services, champion, store_relay, gcs_bucket):
    inside = in_the_bucket(services, gcs_bucket)
    with serving(inside) as api:
        assert api.predict(head("glioma")).status_code == 201
        store_relay.stall()
        refused_in_time(api, "store")
        store_relay.flow()
        recovers(api)
    for row in services.log.known([key.rsplit("/", 1)[1][:-4] for key in inside.store.list(keys.PREDICTIONS)]).values():
        assert inside.store.get(row.object_key)


def test_errors_of_the_store_are_retried_within_bounds_and_then_a_503(services, champion, gcs_server, gcs_bucket):
    inside = in_the_bucket(services, gcs_bucket)
    with serving(inside) as api:
        gcs_server.faults.extend([("POST", 503, False), ("POST", 503, True)])
        assert api.predict(head("glioma")).status_code == 201
        gcs_server.faults.extend([("POST", 503, False)] * 500)
        started = time.monotonic()
        try:
            assert api.predict(head("glioma")).status_code == 503
            assert time.monotonic() - started < IN_TIME
            # The thread behind it gives up, too: requests to the store end.
            wait(lambda: quiet(gcs_server), 60)
        finally:
            gcs_server.faults.clear()
        recovers(api)
    assert whole(inside) == 2


def quiet(server) -> bool:
    seen = len([one for one in server.requests if one[0] == "POST"])
    time.sleep(5)
    return len([one for one in server.requests if one[0] == "POST"]) == seen


# --- disk full ----------------------------------------------------------------------------------


@contextlib.contextmanager
def own_process(services: Services, prefix: list[str], log: Path) -> Iterator[httpx.Client]:
    """The API as a process of its own, started by `prefix`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = services.settings
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "NEUROLOOP_HOME": str(settings.home),
        "NEUROLOOP_DATABASE_URL": settings.database_url,
        "NEUROLOOP_MLFLOW_TRACKING_URI": settings.mlflow_tracking_uri,
        "NEUROLOOP_UI_API_KEY": KEY,
        "NEUROLOOP_API_PORT": str(port),
    }
    server = [sys.executable, "-m", "neuroloop.serving.server"]
    with log.open("wb") as output:
        process = subprocess.Popen([*prefix, *server], env=environment, stdout=output, stderr=output)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, headers=BEARER) as client:

            def ready() -> bool:
                assert process.poll() is None, log.read_text()
                with contextlib.suppress(httpx.HTTPError):
                    return client.get("/health/ready").status_code == 200
                return False

            wait(ready, 120)
            yield client
    finally:
        process.kill()
        process.wait()


def may_mount() -> bool:
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", "mount -t tmpfs -o size=1m none /mnt"], capture_output=True, check=False
    )
    return done.returncode == 0


@pytest.mark.skipif(not may_mount(), reason="a small file system of its own needs the right to mount one")
def test_a_full_disk_is_a_507_and_nothing_is_corrupt(services, champion, tmp_path):
    store = tmp_path / "store"
    store.mkdir()
    inside = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs -o size=400k none {store} && exec "$@"', "sh"]
    generator = np.random.default_rng(0)
    sent, kept, refused = 0, [], []
    with own_process(services, inside, tmp_path / "api.log") as client:
        while not refused and sent < 100:
            pixels = head(LABELS[sent % 4]) // 2 + generator.integers(0, 12, (200, 240), dtype=np.uint8)
            response = client.post("/v1/predictions", files={"file": ("a", encoded(pixels))})
            sent += 1
            (kept if response.status_code == 201 else refused).append(response)
        assert len(kept) >= 3
        problem = refused[0].json()
        assert (refused[0].status_code, refused[0].headers["content-type"]) == (507, "application/problem+json")
        assert "No space left" in problem["detail"]
        assert "free disk space" in problem["fix"]
        assert client.get("/health/live").status_code == 200
        rows = client.get("/v1/monitoring").json()["predictions"]
        assert rows == len(kept)
        for answer in kept:
            image = client.get(f"/v1/predictions/{answer.json()['id']}/image")
            assert image.content.startswith(b"\x89PNG")
            assert image.content.rstrip().endswith(b"IEND\xaeB`\x82")
        # Erasing makes room, and it goes on.
        for answer in kept[:2]:
            client.delete(f"/v1/predictions/{answer.json()['id']}", params={"reason": "mistake", "by": "ann"})
        again = client.post("/v1/predictions", files={"file": ("a", encoded(head("glioma")))})
        assert again.status_code == 201


def test_a_write_cut_short_by_the_system_is_a_507_and_leaves_no_piece(services, champion, tmp_path):
    # RLIMIT_FSIZE stands for a quota: writes beyond it fail half-way, as on a full disk.
    limited = ["sh", "-c", 'ulimit -f 16; exec "$@"', "sh"]  # blocks of 512 or 1,024 bytes
    with own_process(services, limited, tmp_path / "api.log") as client:
        small = client.post("/v1/predictions", files={"file": ("a", encoded(head("glioma")))})
        large = client.post("/v1/predictions", files={"file": ("a", encoded(noise(400)))})
    assert (small.status_code, large.status_code) == (201, 507)
    assert list((tmp_path / "store" / ".neuroloop-tmp").iterdir()) == []
    assert whole(services) == 1
