"""What happens when a task fails: a mail that says what, and a tracking run marked as failed."""

import logging
from collections.abc import Mapping
from typing import Any

from neuroloop.bootstrap import Services, services
from neuroloop.core.errors import NeuroLoopError
from neuroloop.core.schemas import PipelineEnd

log = logging.getLogger("neuroloop.failures")


def mail_failure(context: Mapping[str, Any]) -> None:
    """Airflow's `on_failure_callback`: report the failed task of `context`."""
    instance = context["ti"]
    report(services(), instance.dag_id, instance.run_id, instance.task_id, str(context.get("exception") or "unknown"))


def report(outside: Services, dag: str, run_id: str, task: str, error: str) -> None:
    """Mail the failure, record it, close the MLflow run as failed; none keeps the others from happening."""
    link = f"{outside.settings.airflow_url}/dags/{dag}/runs/{run_id}"
    body = f"{task} of run {run_id} failed.\n\n{error}\n\nIts log: {link}\nMend the cause, then clear the task there."
    if dag == "data_and_model_build":
        body += " Where the cause is in the images, mend their source and clear check_source with all that follows."
    try:
        outside.notifier.send(f"NeuroLoop {dag}: {task} failed", body)
    except NeuroLoopError:
        log.exception("the failure could not be mailed")
    try:
        outside.log.record_end(PipelineEnd(dag=dag, outcome="failed", run_id=run_id, task=task))
    except NeuroLoopError:
        log.exception("the failure could not be recorded")
    try:
        run = outside.registry.open_run(run_id, experiment=dag, tags={"neuroloop.pipeline": dag})
        outside.registry.close_run(run, failed=True)
    except NeuroLoopError:
        log.exception("the tracking run could not be closed")
