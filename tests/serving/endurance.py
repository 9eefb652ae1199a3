"""Many clients, and processes killed under them; then every answer, row, object and correction is accounted for.

The tests play it small, `bench/serving_faults.py` in full. Clients behave as clients should: they repeat a request with
its Idempotency-Key until it is answered.
"""

import base64
import contextlib
import io
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

from neuroloop.bootstrap import Services
from neuroloop.core import keys
from neuroloop.core.schemas import LABELS, now
from neuroloop.imaging.canonical import canonicalize
from neuroloop.model.bundle import Bundle
from neuroloop.records import orphans
from serving.running import BEARER, CORNERS, KEY, encoded, head

SIDES = 160  # heights and widths from 130 px on: 25,600 images that differ in their size, so each is known by its row


@dataclass
class Asked:
    """One request and what came of it."""

    number: int
    key: str = field(default_factory=lambda: str(uuid.uuid4()))
    answer: dict = field(default_factory=dict)
    corrected: str | None = None
    tries: int = 0

    @property
    def label(self) -> str:
        return LABELS[self.number % 4]

    @property
    def pixels(self) -> np.ndarray:
        return head(self.label, height=130 + self.number % SIDES, width=130 + self.number // SIDES % SIDES)


class Server:
    """The API as a process that is started again whenever it ends, as a supervisor does."""

    def __init__(self, services: Services, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        settings = services.settings
        self._log, self._stop = log, threading.Event()
        self._environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(sys.path),
            "NEUROLOOP_HOME": str(settings.home),
            "NEUROLOOP_DATABASE_URL": settings.database_url,
            "NEUROLOOP_MLFLOW_TRACKING_URI": settings.mlflow_tracking_uri,
            "NEUROLOOP_UI_API_KEY": KEY,
            "NEUROLOOP_API_PORT": str(self.port),
        }
        self.process = self._start()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _start(self) -> subprocess.Popen:
        argv = [sys.executable, "-m", "neuroloop.serving.server"]
        with self._log.open("ab") as output:
            return subprocess.Popen(argv, env=self._environment, stderr=output)

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.process.wait()
            if not self._stop.is_set():
                self.process = self._start()

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)

    def ready_after(self, seconds: float = 120) -> float:
        """Seconds until it is ready."""
        started = time.monotonic()
        with httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=5) as client:
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    if client.get("/health/ready").status_code == 200:
                        return time.monotonic() - started
                assert time.monotonic() - started < seconds, self._log.read_text()[-3000:]
                time.sleep(0.05)

    def stop(self) -> None:
        self._stop.set()
        self.process.kill()
        self._thread.join(10)
        self.process.kill()


@contextlib.contextmanager
def running(services: Services, log: Path) -> Iterator[Server]:
    """The server, ready."""
    server = Server(services, log)
    try:
        server.ready_after()
        yield server
    finally:
        server.stop()


class Clients:
    """`count` clients with `each` requests, or (0) with as many as there is time for until `finish`."""

    def __init__(self, port: int, count: int, each: int = 0, *, correct_every: int = 0) -> None:
        self._url, self._each, self._correct_every = f"http://127.0.0.1:{port}", each, correct_every
        self._numbers = iter(range(SIDES * SIDES))
        self._lock, self._finish = threading.Lock(), threading.Event()
        self.asked: list[Asked] = []
        self.faults: list[str] = []
        self._threads = [threading.Thread(target=self._work) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def answered(self) -> int:
        return sum(bool(one.answer) for one in list(self.asked))

    def wait_for_more_than(self, answered: int) -> None:
        """Until there are more answers than so many. Raises `RuntimeError` where nobody asks any more."""
        while self.answered() <= answered:
            if not any(thread.is_alive() for thread in self._threads):
                raise RuntimeError(f"the clients have ended after {len(self.asked)} requests")
            time.sleep(0.01)

    def finish(self) -> list[Asked]:
        """No new requests; those that were begun are ended."""
        self._finish.set()
        return self.join()

    def join(self) -> list[Asked]:
        for thread in self._threads:
            thread.join()
        return self.asked

    def _work(self) -> None:
        done = 0
        with httpx.Client(base_url=self._url, timeout=30, headers=BEARER) as client:
            while not self._finish.is_set() and not (self._each and done >= self._each):
                with self._lock:
                    one = Asked(next(self._numbers))
                    self.asked.append(one)
                data = encoded(one.pixels)
                one.answer = self._until(
                    one,
                    201,
                    lambda d=data, o=one: client.post(
                        "/v1/predictions", files={"file": ("a", d)}, headers={"Idempotency-Key": o.key}
                    ),
                )
                if one.answer and self._correct_every and one.number % self._correct_every == 0:
                    wrong = LABELS[(one.number + 1) % 4]
                    said = {"verdict": "correct", "label": wrong, "reader": "ann"}
                    url = f"/v1/predictions/{one.answer['id']}/feedback"
                    if self._until(one, 200, lambda u=url, s=said: client.post(u, json=s)):
                        one.corrected = wrong
                done += 1

    def _until(self, one: Asked, wanted: int, send: Callable[[], httpx.Response]) -> dict:
        """The answer, however often the service has to be asked; another than wanted or 429, 503 is a fault."""
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            one.tries += 1
            try:
                response = send()
            except httpx.HTTPError:
                time.sleep(0.2)
                continue
            if response.status_code == wanted:
                return response.json()
            if response.status_code not in (429, 503):
                self.faults.append(f"{response.status_code}: {response.text[:300]}")
                return {}
            time.sleep(0.2)
        self.faults.append("no answer within five minutes")
        return {}


def account(services: Services, asked: list[Asked], bundle: Bundle) -> dict[str, int]:
    """Count the answers, maps, rows, objects and corrections that are missing, doubled or somebody else's."""
    wrong = dict.fromkeys(("answers", "maps", "rows", "objects", "corrections", "doubled", "unexplained"), 0)
    answered = [one for one in asked if one.answer]
    rows = services.log.known([one.answer["id"] for one in answered])
    wrong["doubled"] = len(answered) - len({one.answer["id"] for one in answered})
    canonical = np.stack([canonicalize(one.pixels, bundle.image_size) for one in answered])
    expected = bundle.predict(canonical).probabilities
    for one, probabilities in zip(answered, expected, strict=True):
        answer, pixels, row = one.answer, one.pixels, rows.get(one.answer["id"])
        said = [answer["probabilities"][label] for label in LABELS]
        size = (answer["height"], answer["width"])
        wrong["answers"] += not (
            answer["label"] == one.label and size == pixels.shape and np.allclose(said, probabilities, atol=1e-4)
        )
        wrong["maps"] += not _map_fits(answer, pixels)
        wrong["rows"] += not (
            row
            and (row.label, row.height, row.width) == (one.label, *size)
            and row.probabilities == answer["probabilities"]
        )
        try:
            stored = np.asarray(Image.open(io.BytesIO(services.store.get(row.object_key if row else ""))))
            wrong["objects"] += not np.array_equal(stored, pixels)
        except Exception:
            wrong["objects"] += 1
        if one.corrected:
            copies = [label for label in LABELS if services.store.exists(keys.correction(label, answer["id"]))]
            verdicts = [(each.reader, each.label) for each in services.log.feedback(answer["id"])]
            wrong["corrections"] += copies != [one.corrected] or verdicts != [("ann", one.corrected)]
    wrong["unanswered"] = len(asked) - len(answered)
    recorded = services.log.monitoring().predictions
    wrong["doubled"] += max(0, recorded - len(answered))
    leftovers = orphans.sweep(services.log, services.store, now(), force=True)
    objects = services.store.list(keys.PREDICTIONS) + services.store.list(keys.INVALID)
    wrong["unexplained"] = abs(len(objects) - recorded)
    return wrong | {"leftovers_swept": len(leftovers)}


def _map_fits(answer: dict, pixels: np.ndarray) -> bool:
    """The image in the answer is the one that was sent, and its map points to where that one's spot is."""
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["image"]))))
    if not np.array_equal(shown, pixels):
        return False
    if answer["label"] == "notumor":
        return answer["heatmap"] is None
    heat = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["heatmap"]))))
    if heat.shape != pixels.shape:
        return False
    ys, xs = np.nonzero(heat > 200)
    lower, right = CORNERS[answer["label"]]
    return (ys.mean() > heat.shape[0] / 2) == bool(lower) and (xs.mean() > heat.shape[1] / 2) == bool(right)


def kill_server(server: Server, clients: Clients, times: int, generator: random.Random) -> list[float]:
    """Kill the API `times` times, each at a random moment while it answers; seconds until it was ready again."""
    seconds = []
    for _ in range(times):
        seen = clients.answered()
        clients.wait_for_more_than(seen)  # not only starts are hit
        time.sleep(generator.uniform(0, 1.5))
        server.kill()
        time.sleep(0.05)
        seconds.append(server.ready_after())
    return seconds


def kill_postgres(postgres, server: Server, clients: Clients, times: int, generator: random.Random) -> list[float]:
    """Kill every process of PostgreSQL `times` times during writes, and start it again; seconds until all is ready."""
    seconds = []
    for _ in range(times):
        seen = clients.answered()
        clients.wait_for_more_than(seen)
        time.sleep(generator.uniform(0, 1.0))
        postgres.kill()
        started = time.monotonic()
        postgres.start()
        server.ready_after()
        seconds.append(time.monotonic() - started)
    return seconds
