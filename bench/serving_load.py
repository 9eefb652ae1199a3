"""The clients of `bench/serving.py`, for locust: each sends one upload after another and reads the whole answer.

In the statistics an answer goes by its status (`201`, `503`), so that each has quantiles of its own. `LOAD_WAIT` is the
seconds from one request of a client to its next, 0 for at once. Clients that wait begin spread evenly over that time:
otherwise all would ask in the same moment, and so again each time.
"""

import itertools
import os
from pathlib import Path

import gevent
from locust import constant_throughput, task
from locust.contrib.fasthttp import FastHttpUser

BODIES = [path.read_bytes() for path in sorted(Path(os.environ["LOAD_BODIES"]).iterdir())]
PATH, HEADERS = os.environ["LOAD_PATH"], {"Content-Type": os.environ["LOAD_TYPE"]}
if key := os.environ.get("LOAD_KEY"):
    HEADERS["Authorization"] = f"Bearer {key}"
WAIT = float(os.environ.get("LOAD_WAIT", "0"))
_NUMBERS, _STARTED = itertools.count(), itertools.count()


class Client(FastHttpUser):
    """One client."""

    wait_time = constant_throughput(1 / WAIT) if WAIT else lambda _: 0
    connection_timeout = network_timeout = 60.0

    def on_start(self) -> None:
        """Wait for this client's turn: the fractional parts of multiples of the golden ratio lie evenly."""
        gevent.sleep(WAIT * (next(_STARTED) * 0.618034 % 1))

    @task
    def upload(self) -> None:
        """One upload; any status is an answer, only a broken connection is a failure."""
        body = BODIES[next(_NUMBERS) % len(BODIES)]
        with self.client.post(PATH, data=body, headers=HEADERS, catch_response=True) as response:
            response.request_meta["name"] = str(response.status_code)
            if response.status_code:
                response.success()
