"""
### Build: from a data source to a served model

Checks the source, downloads the images and versions them with DVC, audits them and splits them by groups of twins,
captures statistics, augments the training part, trains, evaluates on the frozen test part, registers the model in
MLflow, and promotes it if it has earned it. Work on images is shared out in shards to as many workers as there are.
**Trigger** opens a form; every field has a default. A task that fails mails the reason: mend the cause, clear the
task, and the run goes on from there. Where the cause is in the images, mend their source and clear `check_source`
with all that follows: the run then fetches every image anew.

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
BUDGET = "The training budget: training anneals to its end within this time; early stopping may end it sooner."
LEGACY = "legacy: the split the source comes with, leaks and all, to compare; never promoted."
SEARCHED = "As `neuroloop search` prints them."
SHARED = "Tasks that share the work on images; 0: one for every 4,000. The result is the same for any number."
TRAIN = "building_model"
PARAMETRIC = {"check_source", "download_data", "prepare_shard", "augment_input_data", "transform_testing_data", TRAIN}


def step(name: str, shards: Any = None) -> Any:
    """The task that runs the pipeline step of that name; where there are `shards`, mapped over them."""

    @task(
        task_id=name,
        executor_config=DEFAULT.executor_config(name),
        map_index_template=None if shards is None else "{{ task.op_kwargs['shard'] }}",
    )
    def run(shard: str | None = None, **context: Any) -> Any:
        from neuroloop.loop import pipeline

        outside = services()
        given = (pipeline.Params.of(outside, dict(context["params"])),) if name in PARAMETRIC else ()
        return getattr(pipeline, name)(outside, context["run_id"], *given, *filter(None, [shard]))

    return run() if shards is None else run.expand(shard=shards)


@dag(
    doc_md=__doc__,
    schedule=None,
    max_active_runs=1,
    tags=["neuroloop", "build"],
    default_args={"retries": 1, "retry_delay": timedelta(seconds=15), "on_failure_callback": mail_failure},
    params={
        "data_url": Param(DEFAULT.data_url, type="string", title="Data source", description_md=SOURCES),
        "minutes": Param(DEFAULT.train_minutes, type="number", exclusiveMinimum=0, title="Minutes", description=BUDGET),
        "epochs": Param(None, type=["null", "integer"], minimum=1, title="Epochs", description="At most this many."),
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
        "split": Param("grouped", type="string", enum=list(get_args(SplitName)), title="Split", description=LEGACY),
        "hyperparameters": Param(None, type=["null", "object"], title="Hyper-parameters", description=SEARCHED),
        "shards": Param(
            DEFAULT.data_shards, type="integer", minimum=0, maximum=256, title="Shards", description=SHARED
        ),
        "seed": Param(DEFAULT.seed, type="integer", minimum=0, title="Seed", description="Of simulation and training."),
    },
)
def data_and_model_build() -> None:
    """From a data source to a served model."""
    download, audit, train = (step(name) for name in ("download_data", "audit_data", TRAIN))
    shards = step("list_shards")
    look, prepare = step("audit_shard", shards), step("prepare_shard", shards)
    joined = [step("capture_statistics"), step("augment_input_data")]
    chain(step("check_source"), download, shards, look, audit, prepare, joined, train)
    chain(audit, step("transform_testing_data"), train)
    chain(train, *(step(name) for name in ("evaluate_model", "register_model", "promote_model", "send_email")))


data_and_model_build()
