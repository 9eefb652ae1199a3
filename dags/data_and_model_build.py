"""
### Build: from a data source to a served model

Checks the source, downloads the images and versions them with DVC, audits them and splits them by groups of twins,
captures statistics, augments the training part, trains, evaluates on the frozen test part, registers the model in
MLflow, and promotes it if it has earned it. **Trigger** opens a form; every field has a default. A task that fails
mails the reason: mend the cause, clear the task, and the run goes on from there.

*For research only. Not a medical device.*
"""

from datetime import timedelta
from typing import Any, get_args

from airflow.sdk import Param, chain, dag, task

from neuroloop.bootstrap import services
from neuroloop.core.schemas import ArchitectureName, SplitName
from neuroloop.core.settings import Settings
from neuroloop.loop.failures import mail_failure

DEFAULT = Settings.load()
SOURCES = "`phantom://` (simulated scans), a folder, `gs://`, `s3://`, `az://bucket/prefix`, `kaggle://owner/dataset`"
STEPS = (
    *("check_source", "download_data", "audit_data", "capture_statistics", "augment_input_data"),
    *("transform_testing_data", "building_model", "evaluate_model", "register_model", "promote_model", "send_email"),
)
WITH_PARAMS = {"check_source", "download_data", "augment_input_data", "transform_testing_data", "building_model"}


def step(name: str) -> Any:
    """The task that runs the pipeline step of that name."""

    @task(task_id=name, executor_config=DEFAULT.executor_config(name))
    def run(**context: Any) -> dict[str, Any]:
        from neuroloop.loop import pipeline

        outside = services()
        given = (pipeline.Params.of(outside, dict(context["params"])),) if name in WITH_PARAMS else ()
        result: dict[str, Any] = getattr(pipeline, name)(outside, context["run_id"], *given)
        return result

    return run()


@dag(
    doc_md=__doc__,
    schedule=None,
    max_active_runs=1,
    tags=["neuroloop", "build"],
    default_args={"retries": 1, "retry_delay": timedelta(seconds=15), "on_failure_callback": mail_failure},
    params={
        "data_url": Param(DEFAULT.data_url, type="string", title="Data source", description_md=SOURCES),
        "minutes": Param(
            DEFAULT.train_minutes,
            type="number",
            exclusiveMinimum=0,
            title="Training budget, minutes",
            description="Training anneals to its end within this time; early stopping may end it sooner.",
        ),
        "epochs": Param(
            None, type=["null", "integer"], minimum=1, title="Epochs", description="Optional, still within the budget."
        ),
        "image_size": Param(
            None,
            type=["null", "integer"],
            enum=[None, *sorted({64, 96, 128, 160, 224, 304, DEFAULT.image_size})],
            title="Image size, pixels",
            description="Side of the canonical image. Empty: the setting's, or else the architecture's own.",
        ),
        "architecture": Param(
            DEFAULT.architecture,
            type="string",
            enum=list(get_args(ArchitectureName)),
            title="Architecture",
            description="The last three are transfer learning from ImageNet: they want a GPU and make large bundles.",
        ),
        "split": Param(
            "grouped",
            type="string",
            enum=list(get_args(SplitName)),
            title="Split",
            description="legacy: the split the source comes with, leaks and all, to compare; never promoted.",
        ),
        "hyperparameters": Param(
            None, type=["null", "object"], title="Hyper-parameters", description="As `neuroloop search` prints them."
        ),
        "seed": Param(DEFAULT.seed, type="integer", minimum=0, title="Seed", description="Of simulation and training."),
    },
)
def data_and_model_build() -> None:
    """From a data source to a served model."""
    tasks = {name: step(name) for name in STEPS}
    chain(*(tasks[name] for name in ("check_source", "download_data", "audit_data")))
    prepare = [tasks[name] for name in ("capture_statistics", "augment_input_data", "transform_testing_data")]
    chain(tasks["audit_data"], prepare, tasks["building_model"])
    chain(*(tasks[name] for name in STEPS[STEPS.index("building_model") :]))


data_and_model_build()
