"""Airflow's REST API, as far as the platform uses it from outside: health, trigger, follow."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx

from neuroloop.core.errors import NeuroLoopError, Unavailable

_PAGE = 100  # the most that Airflow gives at a time


class AirflowClient:
    """Logged in with user and password; the token is fetched anew when it expires."""

    def __init__(self, url: str, user: str, password: str) -> None:
        self.url, self.user, self.password = url, user, password
        self._http = httpx.Client(base_url=url, timeout=30)
        self._token = ""

    def health(self) -> dict[str, str]:
        """Each part of Airflow and its status; empty when the API server does not answer."""
        try:
            parts = self._http.get("/api/v2/monitor/health").json()
            return {name: str((part or {}).get("status")) for name, part in parts.items()}
        except (httpx.HTTPError, ValueError):
            return {}

    def trigger(self, dag: str, conf: Mapping[str, Any]) -> str:
        """Start a run with `conf` as its params; the run's id. Waits a minute for a DAG not parsed yet."""
        deadline = time.monotonic() + 60
        while True:
            answer = self._call("POST", f"/dags/{dag}/dagRuns", json={"conf": dict(conf), "logical_date": None})
            if answer.status_code == 404 and time.monotonic() < deadline:
                time.sleep(0.5)
                continue
            _checked(answer, f"{dag} could not be triggered")
            return str(answer.json()["dag_run_id"])

    def active_run(self, dag: str) -> str | None:
        """A queued or running run of `dag`, if there is one."""
        answer = self._call("GET", f"/dags/{dag}/dagRuns", params={"state": ["queued", "running"], "limit": 1})
        runs = answer.json().get("dag_runs", []) if answer.status_code == 200 else []
        return str(runs[0]["dag_run_id"]) if runs else None

    def state(self, dag: str, run: str) -> str:
        """`queued`, `running`, `success` or `failed`."""
        answer = _checked(self._call("GET", f"/dags/{dag}/dagRuns/{run}"), f"run {run} cannot be read")
        return str(answer.json()["state"])

    def tasks(self, dag: str, run: str) -> dict[str, dict[str, Any]]:
        """Task id -> its instance (`state`, `start_date`, `duration`, ...); of mapped ones, `id[2/8]` -> each."""
        found: list[dict[str, Any]] = []
        while True:
            page = {"limit": _PAGE, "offset": len(found)}
            answer = self._call("GET", f"/dags/{dag}/dagRuns/{run}/taskInstances", params=page)
            more = _checked(answer, f"run {run} cannot be read").json()["task_instances"]
            found += more
            if len(more) < _PAGE:
                return {_named(task): task for task in found}

    def result(self, dag: str, run: str, task: str) -> Any:
        """What a task returned."""
        path = f"/dags/{dag}/dagRuns/{run}/taskInstances/{task}/xcomEntries/return_value"
        answer = self._call("GET", path, params={"deserialize": True})
        return _checked(answer, f"{task} of {run} has no result").json()["value"]

    def follow(
        self, dag: str, run: str, say: Callable[[str], None] = lambda line: None, seconds: float = math.inf
    ) -> dict[str, dict[str, Any]]:
        """Report each task as it starts and ends, until the run ends; its tasks. A failed run raises.

        So does one that has not ended after `seconds`; by default it is followed however long it takes.
        """
        seen: dict[str, str] = {}
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            state, tasks = self.state(dag, run), self.tasks(dag, run)
            for name, task in tasks.items():
                now = task["state"] or "waiting"
                if now != seen.get(name) and now not in ("waiting", "scheduled", "queued"):
                    took = f" ({task['duration']:.0f} s)" if now == "success" and task.get("duration") else ""
                    say(f"{dag}.{name}: {now}{took}")
                seen[name] = now
            if state == "success":
                return tasks
            if state == "failed":
                failed = [name for name, now in seen.items() if now == "failed"]
                raise NeuroLoopError(
                    f"{dag} failed in {', '.join(failed) or 'no task'}",
                    fix=f"read the task's log at {self.url}/dags/{dag}",
                )
            time.sleep(1)
        raise Unavailable(f"{dag} did not end in {seconds:.0f} s", fix=f"look at {self.url}/dags/{dag}")

    def _call(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        for fresh in (False, True):
            if fresh or not self._token:
                self._token = self._login()
            try:
                headers = {"Authorization": f"Bearer {self._token}"}
                answer = self._http.request(method, f"/api/v2{path}", headers=headers, **kwargs)
            except httpx.HTTPError as error:
                raise Unavailable(f"Airflow at {self.url} does not answer", why=str(error)) from None
            if answer.status_code != 401:
                break
        return answer

    def _login(self) -> str:
        try:
            answer = self._http.post("/auth/token", json={"username": self.user, "password": self.password})
        except httpx.HTTPError as error:
            raise Unavailable(f"Airflow at {self.url} does not answer", why=str(error)) from None
        return str(_checked(answer, "Airflow refused the login").json()["access_token"])


def _named(task: dict[str, Any]) -> str:
    index = task.get("map_index", -1)
    shown = task.get("rendered_map_index") or index
    return str(task["task_id"]) if index < 0 else f"{task['task_id']}[{shown}]"


def _checked(answer: httpx.Response, what: str) -> httpx.Response:
    if answer.is_error:
        raise NeuroLoopError(what, why=f"Airflow answered {answer.status_code}: {answer.text[:300]}")
    return answer
