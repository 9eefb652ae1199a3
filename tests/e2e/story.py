"""The whole loop on a platform of its own, from nothing to a model retrained by its readers' corrections.

`make story` runs it and prints what happened; the last line is one JSON object. The platform is the one of `make up`,
in a temporary folder and on free ports. The corrected scans come from a second simulated scanner, whose contrast the
first model has not met.
"""

import contextlib
import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from neuroloop.core.errors import NeuroLoopError
from neuroloop.core.schemas import LABELS, NO_TUMOUR
from neuroloop.embedded.stack import Stack
from neuroloop.imaging.decode import encode_png
from neuroloop.imaging.phantom import scan

# A short first training, so that the second has something left to learn on either scanner.
BUILD = {"minutes": 8, "epochs": 14, "image_size": 96}
RETRAINING = {"minutes": 12, "epochs": 32}
THRESHOLD = 50
NEVER = "0 0 1 1 *"
MOST_UPLOADS = 600
"""Scans shown to the first model at most, until 51 of them had to be corrected."""


class Story:
    """One playing of the loop; `say` gets a line a step."""

    patience = 60
    """Seconds that anything may take which is not a run of Airflow's."""

    def __init__(self, stack: Any, say: Callable[[str], None]) -> None:
        self.stack, self.say = stack, say
        self.seconds: dict[str, float] = {}

    def play(self) -> dict[str, Any]:
        """The chapters in order; the outcome in figures."""
        with self._timed("up"):
            self.stack.up(build=False)
        self.connect()
        with self._timed("build"):
            self._run("data_and_model_build", BUILD)
            before = self._champion()
        self.say(f"version {before['version']} serves")

        with self._timed("failing_build"):
            failure_mailed = self._failure_is_mailed()
        with self._timed("restart_after_kill"):
            self._kill("api")
        self.say("killed the API; the supervisor brought it back")

        scans, uploads, wrong = self._corrections(), 0, 0
        with self._timed("corrections"):
            while wrong < THRESHOLD:
                wrong += next(scans)
                uploads += 1
        self.say(f"{wrong} of {uploads} scans of the second scanner had to be corrected")
        with self._timed("run_at_50"):
            at_50 = self._retrained()
        wrong += next(corrected for corrected in scans if corrected)
        self.say(f"{wrong} corrections")
        with self._timed("run_at_51"), self._requests() as requests:
            at_51 = self._retrained()
            after = self._champion()
            self._until(lambda: requests.versions[-1:] == [after["version"]], "the new model answers")
        with self._timed("run_again"):
            again = self._retrained()
        promotion = self.api.get("/v1/models").json()["promotions"][0]
        first = requests.first_answer.get(after["version"])
        promoted_at = datetime.fromisoformat(promotion["created_at"]).timestamp()
        return {
            "retrained_at_50": at_50,
            "retrained_at_51": at_51,
            "retrained_again": again,
            "champion_before": before["version"],
            "champion_after": after["version"],
            "failed_requests": requests.failed,
            "requests_during_reload": len(requests.versions),
            "versions_seen": sorted(set(requests.versions)),
            "reload_seconds": None if first is None else round(max(0.0, first - promoted_at), 2),
            "second_scanner_uploads": uploads,
            "failure_mailed": failure_mailed,
            "promotion": promotion["checks"],
            "seconds": self.seconds,
        }

    def connect(self) -> None:
        """Open the API and Airflow of a platform that is up."""
        self.api = httpx.Client(base_url=self.stack.settings.api_url, timeout=60, headers=self._key())
        self.airflow = self.stack.airflow()

    def _corrections(self) -> Iterator[bool]:
        """Show scans of the second scanner one by one, correct what is wrong; yields whether it was."""
        for number in count():
            if number == MOST_UPLOADS:
                raise AssertionError(f"{MOST_UPLOADS} scans did not give {THRESHOLD + 1} corrections")
            label = LABELS[number % len(LABELS)]
            answer = self._upload(encode_png(scan(label, number, seed=77, scanner="B").pixels))
            if answer.status_code == 422:
                yield False  # the gate does not know it for a brain: there is nothing to correct
                continue
            answer.raise_for_status()
            prediction = answer.json()
            wrong = prediction["label"] != label
            verdict = {"verdict": "correct", "label": label} if wrong else {"verdict": "agree"}
            path = f"/v1/predictions/{prediction['id']}/feedback"
            self.api.post(path, json={"reader": "story", **verdict}).raise_for_status()
            yield wrong

    def _failure_is_mailed(self) -> bool:
        """Build from a folder that does not exist: the run fails, and the mail names the task and the folder."""
        try:
            self._run("data_and_model_build", {"data_url": "/no/such/folder"})
        except NeuroLoopError as error:
            self.say(f"as it should: {error}")
            mails = self.api.get("/v1/mails").json()
            return any("check_source failed" in mail["subject"] and "/no/such/folder" in mail["body"] for mail in mails)
        raise AssertionError("a build from a missing folder succeeded")

    def _kill(self, role: str) -> None:
        """End one part as a crash would, and wait until the platform is whole again."""
        before = self.stack.pid(role)
        os.kill(before, signal.SIGKILL)
        self._until(lambda: self.stack.pid(role) not in (0, before), f"{role} runs again")
        self._until(self.api_ready, f"{role} is ready again")

    def api_ready(self) -> bool:
        """Whether the API has its database, store and model."""
        with contextlib.suppress(httpx.HTTPError):
            return self.api.get("/health/ready").status_code == 200
        return False

    def _key(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.stack.settings.ui_api_key}"}

    def _upload(self, png: bytes) -> httpx.Response:
        return self.api.post("/v1/predictions", files={"file": ("scan.png", png, "image/png")})

    def _run(self, dag: str, conf: dict[str, Any]) -> dict[str, dict[str, Any]]:
        return self.airflow.follow(dag, self.airflow.trigger(dag, conf), self.say, seconds=3000)

    def _retrained(self) -> bool:
        return self._run("model_retraining", RETRAINING)["retrain_model"]["state"] == "success"

    def _champion(self) -> dict[str, Any]:
        """The model that serves, once the server has picked up the latest promotion."""
        ledger = self.api.get("/v1/models").json()["promotions"]
        newest = next((row["version"] for row in ledger if row["promoted"]), None)
        assert newest, f"no model was promoted: {[row['checks'] for row in ledger]}"

        def served() -> bool:
            answer = self.api.get("/v1/model")
            return answer.status_code == 200 and answer.json()["version"] == newest

        self._until(served, f"version {newest} serves")
        found: dict[str, Any] = self.api.get("/v1/model").json()
        return found

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + self.patience
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {self.patience} s: {what}")
            time.sleep(0.1)

    @contextlib.contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[step] = round(time.monotonic() - started, 1)

    @contextlib.contextmanager
    def _requests(self) -> Iterator["Requests"]:
        """Ask for predictions all the while, one after the other."""
        requests = Requests(self.stack.settings.api_url, self._key())
        requests.thread.start()
        try:
            yield requests
        finally:
            requests.stop.set()
            requests.thread.join(120)


class Requests:
    """Continuous predictions of one scan: the versions that answered, in order, and how many failed."""

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        self.url, self.headers = url, headers
        self.png = encode_png(scan(NO_TUMOUR, 1, seed=5).pixels)
        self.versions: list[str] = []
        self.first_answer: dict[str, float] = {}
        self.failed = 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._ask, daemon=True)

    def _ask(self) -> None:
        with httpx.Client(base_url=self.url, timeout=30, headers=self.headers) as api:
            while not self.stop.is_set():
                version = None
                with contextlib.suppress(httpx.HTTPError):
                    answer = api.post("/v1/predictions", files={"file": ("scan.png", self.png, "image/png")})
                    if answer.status_code == 201:
                        version = answer.json()["model_version"]
                if version:
                    self.versions.append(version)
                    self.first_answer.setdefault(version, datetime.now(UTC).timestamp())
                else:
                    self.failed += 1
                self.stop.wait(0.5)


def embedded(home: Path, say: Callable[[str], None]) -> Stack:
    """The platform of `make up` under `home`."""
    # Never by the clock while the story plays: it triggers each run itself.
    never = {"NEUROLOOP_RETRAINING_SCHEDULE": NEVER, "NEUROLOOP_HOME": str(home)}
    bare = {name: value for name, value in os.environ.items() if not name.startswith("NEUROLOOP_")}
    return Stack({**bare, **never, "NEUROLOOP_ENV_FILE": str(home / "none")}, say=say)


def told_secrets(file: Path) -> list[str]:
    """The settings of the platform's own `file` whose secret stands in the command line of a process."""
    values = dict(line.split("=", 1) for line in file.read_text().splitlines())
    secrets = {name: value for name, value in values.items() if re.search("PASSWORD|SECRET|KEY", name)}
    secrets |= {name: urlsplit(value).password or "" for name, value in values.items() if "DATABASE" in name}
    assert len(secrets) > 10
    assert all(secrets.values())
    lines = ""
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            lines += process.read_bytes().replace(b"\0", b" ").decode(errors="replace") + "\n"
    assert "supervisord" in lines
    return sorted(name for name, value in secrets.items() if value in lines)


def play(say: Callable[[str], None]) -> dict[str, Any]:
    """Play the story on a platform of its own, which is stopped and removed whatever happens."""
    with tempfile.TemporaryDirectory(prefix="neuroloop-story-", ignore_cleanup_errors=True) as folder:
        story = Story(embedded(Path(folder) / "home", say), say)
        try:
            return {**story.play(), "told_secrets": told_secrets(Path(folder) / "home" / "env")}
        except BaseException:
            for log in sorted((Path(folder) / "home" / "logs").glob("*.log")):
                say(f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-15:]))
            raise
        finally:
            story.stack.down()
            left = story.stack.processes()
            assert not left, f"processes left behind: {left}"


if __name__ == "__main__":
    started = time.monotonic()
    outcome = play(lambda line: print(f"[{time.monotonic() - started:5.0f} s] {line}", file=sys.stderr, flush=True))
    print(json.dumps(outcome))
