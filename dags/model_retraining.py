"""
### Retraining: from corrections to a better model

Counts the corrected images that no retraining has used. At strictly more than the threshold (50) it makes a batch of
them, exactly once, trains the champion further on its own training part plus the corrections, and promotes the result
if it is better on the held-out ones (or, without such, on the frozen test part) and on the test part not worse than the
champion and the best before it. Otherwise it ends at `flag_false` with the count, which it mails if triggered by hand.

*For research only. Not a medical device.*
"""

from datetime import timedelta
from typing import Any

from airflow.sdk import Param, chain, dag, task

from neuroloop.bootstrap import services
from neuroloop.core.settings import Settings
from neuroloop.loop.failures import mail_failure

DEFAULT = Settings.load()


@dag(
    doc_md=__doc__,
    schedule=DEFAULT.retraining_schedule,
    catchup=False,
    max_active_runs=1,
    tags=["neuroloop", "retraining"],
    default_args={"retries": 1, "retry_delay": timedelta(seconds=15), "on_failure_callback": mail_failure},
    params={
        "minutes": Param(
            DEFAULT.retrain_minutes,
            type="number",
            exclusiveMinimum=0,
            title="Training budget, minutes",
            description="Training anneals to its end within this time; early stopping may end it sooner.",
        ),
        "epochs": Param(
            None,
            type=["null", "integer"],
            minimum=1,
            title="Epochs",
            description="At most so many; the budget may end it sooner.",
        ),
        "seed": Param(
            DEFAULT.seed, type="integer", minimum=0, title="Seed", description="Of augmentation and training."
        ),
    },
)
def model_retraining() -> None:
    """From corrections to a better model."""

    @task.branch
    def check_source_flag(**context: Any) -> str:
        from neuroloop.loop import retraining

        return "flag_true" if retraining.check_source_flag(services(), context["run_id"])["go"] else "flag_false"

    @task
    def flag_false(**context: Any) -> dict[str, Any]:
        from neuroloop.loop import retraining

        return retraining.flag_false(services(), context["run_id"], by_hand=context["dag_run"].run_type == "manual")

    @task.short_circuit
    def flag_true(**context: Any) -> dict[str, Any]:
        from neuroloop.loop import retraining

        return retraining.flag_true(services(), context["run_id"])

    @task(executor_config=DEFAULT.executor_config("retrain_model"))
    def retrain_model(**context: Any) -> dict[str, Any]:
        from neuroloop.loop import retraining

        chosen = {name: context["params"][name] for name in ("minutes", "epochs", "seed")}
        return retraining.retrain_model(services(), context["run_id"], **chosen)

    @task
    def evaluate_model(**context: Any) -> dict[str, Any]:
        from neuroloop.loop import retraining

        return retraining.evaluate_model(services(), context["run_id"])

    def shared(name: str) -> Any:
        @task(task_id=name)
        def run(**context: Any) -> dict[str, Any]:
            from neuroloop.loop import pipeline

            result: dict[str, Any] = getattr(pipeline, name)(services(), context["run_id"], "model_retraining")
            return result

        return run()

    go = flag_true()
    check_source_flag() >> [go, flag_false()]
    chain(go, retrain_model(), evaluate_model(), *map(shared, ("register_model", "promote_model", "send_email")))


model_retraining()
