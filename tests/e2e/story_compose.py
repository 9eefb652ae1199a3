"""The loop on docker-compose with two workers, one of which is killed in mid-training.

`make story-compose` runs it and prints what happened; the last line is one JSON object. The stack is a compose project
of its own, with passwords and ports of its own, and is removed with its volumes at the end. `COMPOSE_FILE` names the
compose files, as docker compose itself has it. Data and trainings are those of the other story: on fewer scans, the
first model does not beat the trivial baselines, and is rightly not promoted.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from neuroloop.core.settings import PREFIX, Settings
from neuroloop.embedded.airflow import AirflowClient
from neuroloop.embedded.stack import _free_port

sys.path.insert(0, str(Path(__file__).parents[1]))
from e2e.story import BUILD, NEVER, RETRAINING, THRESHOLD, Story

ROOT = Path(__file__).parents[2]
PROJECT = "neuroloop-story"


class Compose:
    """The stack of the compose files, with `workers` workers; its files lie under `folder`."""

    def __init__(self, folder: Path, workers: int, say: Callable[[str], None]) -> None:
        self.say, self._file = say, folder / ".env"
        subprocess.run([sys.executable, ROOT / "deploy" / "make-env", self._file], check=True)
        ports: dict[str, int] = {}
        for name in ("API", "UI", "AIRFLOW", "MLFLOW"):
            ports[name] = _free_port(ports.values())
        chosen = {"RETRAINING_SCHEDULE": NEVER} | {f"{name}_PORT": str(port) for name, port in ports.items()}
        with self._file.open("a") as stream:
            stream.writelines(f"{PREFIX}{name}={value}\n" for name, value in chosen.items())
            stream.write(f"WORKERS={workers}\n")
        urls = {f"{PREFIX}{name}_URL": f"http://127.0.0.1:{ports[name]}" for name in ("API", "AIRFLOW")}
        self.settings = Settings.load(
            urls | {f"{PREFIX}ENV_FILE": str(self._file), f"{PREFIX}HOME": str(folder / "home")}
        )

    def up(self) -> None:
        """Build the images and start everything; ends when all is healthy."""
        self("build", "--quiet")
        started = time.monotonic()
        self("up", "--detach", "--wait", "--wait-timeout", "1200", "--quiet-pull")
        self.say(f"all services healthy after {time.monotonic() - started:.0f} s")

    def down(self) -> None:
        """Stop everything and remove its volumes."""
        self("down", "--volumes", "--timeout", "20")

    def airflow(self) -> AirflowClient:
        """Airflow's REST API, logged in."""
        settings = self.settings
        return AirflowClient(settings.airflow_url, settings.airflow_user, settings.airflow_password)

    def workers(self) -> list[str]:
        """The ids of the worker containers that run; each is its host's name too, in its first twelve letters."""
        return self("ps", "--status", "running", "--quiet", "worker").split()

    def kill(self, container: str) -> None:
        """End a container as a lost machine would."""
        subprocess.run(["docker", "kill", container], check=True, stdout=subprocess.DEVNULL)

    def __call__(self, *args: str) -> str:
        """What `docker compose ARGS` prints; raises where it fails."""
        bare = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
        done = subprocess.run(
            ["docker", "compose", "--project-name", PROJECT, "--env-file", self._file, *args],
            cwd=ROOT,
            env=bare,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise AssertionError(f"docker compose {args[0]} failed: {(done.stdout + done.stderr)[-2000:]}")
        return done.stdout


class ComposeStory(Story):
    """The story's parts on containers."""

    stack: Compose
    patience = 300

    def play(self) -> dict[str, Any]:
        """The chapters in order; the outcome in figures."""
        with self._timed("up"):
            self.stack.up()
        self.connect()
        workers = self.stack.workers()
        with self._timed("build"):
            built = self._run("data_and_model_build", BUILD)
            before = self._champion()
        self.say(f"version {before['version']} serves")

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
        killer = Killer(self.stack)
        with self._timed("run_at_51"), self._requests() as requests:
            killer.thread.start()
            tasks = self._run("model_retraining", RETRAINING)
            after = self._champion()
            self._until(lambda: requests.versions[-1:] == [after["version"]], "the new model answers")
        retrained = tasks["retrain_model"]
        with self._timed("run_again"):
            again = self._retrained()
        return {
            "workers": len(workers),
            "ran_tasks": sorted({task["hostname"] for task in (*built.values(), *tasks.values()) if task["hostname"]}),
            "retrained_at_50": at_50,
            "killed": killer.killed,
            "attempts": retrained["try_number"],
            "retrained_at_51": retrained["state"] == "success",
            "retrained_on": retrained["hostname"],
            "retrained_again": again,
            "champion_before": before["version"],
            "champion_after": after["version"],
            "failed_requests": requests.failed,
            "versions_seen": sorted(set(requests.versions)),
            "second_scanner_uploads": uploads,
            "log_of_attempt": self._log(retrained)[-200:],
            "promotion": self.api.get("/v1/models").json()["promotions"][0]["checks"],
            "seconds": self.seconds,
        }

    def _log(self, task: dict[str, Any]) -> str:
        """What the last attempt of a task said, as Airflow shows it."""
        path = f"/dags/{task['dag_id']}/dagRuns/{task['dag_run_id']}/taskInstances/{task['task_id']}"
        return str(self.airflow._call("GET", f"{path}/logs/{task['try_number']}").text)


class Killer:
    """Kills the worker that trains, some seconds into the training; `killed` is its host's name."""

    SECONDS = 15

    def __init__(self, stack: Compose) -> None:
        self._stack, self._airflow = stack, stack.airflow()
        self.killed = ""
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        dag, deadline = "model_retraining", time.monotonic() + 600
        while time.monotonic() < deadline:
            run = self._airflow.active_run(dag)
            task = self._airflow.tasks(dag, run).get("retrain_model", {}) if run else {}
            if task.get("state") == "running" and task.get("hostname"):
                time.sleep(self.SECONDS)
                host = task["hostname"].partition(".")[0]
                container = next(name for name in self._stack.workers() if name.startswith(host))
                self._stack.kill(container)
                self.killed = host
                self._stack.say(f"killed worker {host} {self.SECONDS} s into its training")
                return
            time.sleep(0.5)


def play(say: Callable[[str], None]) -> dict[str, Any]:
    """Play the story on a project of its own, which is removed whatever happens."""
    with tempfile.TemporaryDirectory(prefix="neuroloop-compose-", ignore_cleanup_errors=True) as folder:
        stack = Compose(Path(folder), 2, say)
        try:
            return ComposeStory(stack, say).play()
        except BaseException:
            say(stack("ps", "--all"))
            say(stack("logs", "--no-color", "--tail", "15"))
            raise
        finally:
            stack.down()


def check(outcome: dict[str, Any]) -> None:
    """Raise unless it ended as it should."""
    assert outcome["workers"] == 2
    assert outcome["retrained_at_50"] is False
    assert outcome["killed"]
    assert outcome["attempts"] == 2
    assert outcome["retrained_at_51"] is True
    assert outcome["retrained_on"] != outcome["killed"]
    assert outcome["retrained_again"] is False
    assert outcome["champion_after"] != outcome["champion_before"], outcome["promotion"]
    assert outcome["failed_requests"] == 0


if __name__ == "__main__":
    started = time.monotonic()
    outcome = play(lambda line: print(f"[{time.monotonic() - started:5.0f} s] {line}", file=sys.stderr, flush=True))
    print(json.dumps(outcome))
    check(outcome)
