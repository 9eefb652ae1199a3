"""Airflow's task logs in the object store, so that a log outlives the worker whose disk it was written on.

Airflow finds this by `AIRFLOW__LOGGING__LOGGING_CONFIG_CLASS=neuroloop.embedded.task_logs.LOGGING_CONFIG`, takes
`REMOTE_TASK_LOG` from it, hands over each attempt's log at its end, and asks for it when somebody opens it. While a
task runs, its log is read from the worker itself.
"""

import logging
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

from neuroloop.bootstrap import services
from neuroloop.core import keys
from neuroloop.core.errors import NeuroLoopError, NotFound
from neuroloop.core.ports import ObjectStore

log = logging.getLogger(__name__)


class StoreTaskLogs:
    """Airflow's `RemoteLogIO`. Paths are relative to `folder`; without a `store`, that of the settings is used."""

    processors = ()

    def __init__(self, folder: Path, store: ObjectStore | None = None) -> None:
        self._folder = folder
        if store:
            self._store = store

    def upload(self, path: str | PathLike[str], ti: Any = None) -> None:
        """Keep the log at `path`; a store that is away costs the log its copy, never the task its result."""
        file = self._folder / path
        key = keys.task_log(file.relative_to(self._folder).as_posix())
        try:
            self._store.put(key, file.read_bytes(), content_type="text/plain; charset=utf-8")
        except (NeuroLoopError, OSError) as error:
            log.warning("the log %s stays on this worker only: %s", path, error)

    def read(self, relative_path: str, ti: Any = None) -> tuple[list[str], list[str] | None]:
        """(where it was looked for, the log) as Airflow wants them; the log is None where there is none."""
        key = keys.task_log(relative_path)
        try:
            return [f"the object store, {key}"], [self._store.get(key).decode(errors="replace")]
        except NotFound:
            return [], None
        except NeuroLoopError as error:
            return [f"the object store cannot be asked: {error}"], None

    @cached_property
    def _store(self) -> ObjectStore:
        return services().store


def __getattr__(name: str) -> Any:
    """The two names that Airflow asks for; made then, because importing Airflow makes folders."""
    if name == "LOGGING_CONFIG":
        from airflow.config_templates.airflow_local_settings import DEFAULT_LOGGING_CONFIG

        return DEFAULT_LOGGING_CONFIG
    if name == "REMOTE_TASK_LOG":
        from airflow.configuration import conf

        return StoreTaskLogs(Path(conf.get("logging", "base_log_folder")))
    raise AttributeError(name)
