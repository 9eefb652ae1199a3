"""A worker that runs DAG tasks as Airflow's does: what they need is imported once, then each try is a fork.

A program, not a test: it reads a task a line from its input, answers with the fork's process id, lets it go at the next
line, and answers with how it ended.
"""

import importlib.util
import json
import os
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from airflow.sdk.definitions.mappedoperator import MappedOperator

DAGS = Path(__file__).parents[2] / "dags"


def dag(name: str) -> Any:
    """The DAG as its file makes it."""
    spec = importlib.util.spec_from_file_location(name, DAGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)()


def warm() -> None:
    """Import what the tasks import at their start; TensorFlow only, which starts threads, not."""
    import mlflow.onnx  # noqa: F401
    import psycopg2  # noqa: F401

    from neuroloop.adapters import dvc, folder, mlflow_registry, postgres, smtp  # noqa: F401
    from neuroloop.loop import retraining, scoring  # noqa: F401


def attempt(found: Any, job: dict[str, Any]) -> None:
    """One try of a task, in the fork."""
    os.setsid()  # so that a whole try, with what it has started, can be killed like a container
    os.environ.update(job["environment"])
    with open(job["log"], "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    context = {
        "run_id": job["run_id"],
        "params": {**found.params.dump(), **job["params"]},
        "dag_run": SimpleNamespace(run_type="manual"),
    }
    task = found.get_task(job["task"])
    shard = {"shard": "1/1"} if isinstance(task, MappedOperator) else {}
    result = task.python_callable(**shard, **context)
    Path(job["result"]).write_text(json.dumps(result))


def main() -> None:
    """Serve until the input ends."""
    found = {name: dag(name) for name in ("data_and_model_build", "model_retraining")}
    warm()
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        gate, opened = os.pipe()
        child = os.fork()
        if not child:
            os.close(opened)
            os.read(gate, 1)
            code = 1
            try:
                attempt(found[job["dag"]], job)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(gate)
        print(child, flush=True)
        sys.stdin.readline()
        os.close(opened)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
