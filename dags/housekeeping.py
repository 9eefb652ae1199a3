"""
### Housekeeping: what is kept of uploads, and what is not

Finishes erasures that broke off half-way, erases what is older than `NEUROLOOP_RETENTION_DAYS`, puts the corrected
copies in order with the readers' verdicts, and removes images without a row that a killed server left behind, and
after a day what was noted of uploads that were never answered. Safe to run at any time. `neuroloop sweep` does the
same without Airflow. Where so many images have no row that the database must be another one, none is removed and a
mail says so.

*For research only. Not a medical device.*
"""

from datetime import timedelta
from typing import Any

from airflow.sdk import dag, task

from neuroloop.bootstrap import services
from neuroloop.core.settings import Settings
from neuroloop.loop.failures import mail_failure

DEFAULT = Settings.load()


@dag(
    doc_md=__doc__,
    schedule=DEFAULT.housekeeping_schedule,
    catchup=False,
    max_active_runs=1,
    tags=["neuroloop", "housekeeping"],
    default_args={"retries": 1, "retry_delay": timedelta(seconds=60), "on_failure_callback": mail_failure},
)
def housekeeping() -> None:
    """What is kept of uploads, and what is not."""

    @task(executor_config=DEFAULT.executor_config("tidy"))
    def tidy() -> dict[str, Any]:
        from neuroloop.loop import housekeeping

        return housekeeping.tidy(services())

    tidy()


housekeeping()
