"""Log lines: plain text for a person at the machine, JSON in the Elastic Common Schema for whoever collects them.

`NEUROLOOP_LOG_FORMAT` says which. Lines in ECS go to stdout and carry what `about` binds: the request (`trace.id`,
`http.request.id`), the prediction, the model's version, the run. What is bound are ids that servers made, never a
client's words: no file name, no person, no pixel.

Airflow has JSON lines of its own, which carry the run and the task of each step; `deploy/monitoring/filebeat.yml`
renames their fields to these.
"""

import logging
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import MappingProxyType, TracebackType
from typing import Any, Literal

LogFormat = Literal["text", "ecs"]

TRACE, REQUEST = "trace.id", "http.request.id"
PREDICTION, MODEL = "neuroloop.prediction.id", "neuroloop.model.version"
RUN, DAG = "neuroloop.run", "neuroloop.dag"

_TEXT = "%(asctime)s %(levelname)s %(name)s %(message)s"
_CHATTY = ("urllib3.connectionpool", "httpx")
"""Each of their retries would be a line; metrics count them."""
_OWN_HANDLERS = ("uvicorn", "streamlit")
"""Libraries whose loggers come with handlers of their own and would write text between the JSON."""
_SILENT = "uvicorn.access"
"""It quotes paths and queries, which are the client's words; `serving.request_log` has the line instead."""
_SUMMARY = "ecs_message"
_NOTHING: Mapping[str, str] = MappingProxyType({})
_bound: ContextVar[Mapping[str, str]] = ContextVar("neuroloop_log_fields", default=_NOTHING)
_LOG = logging.getLogger(__name__)


def configure(form: LogFormat, service: str, *, level: int = logging.INFO) -> None:
    """Send this process' log lines to where they belong: text to stderr, ECS to stdout. A repeat changes nothing.

    `service` is the process' part in the platform: api, ui, loop.
    """
    root = logging.getLogger()
    if form == "text":
        if not root.handlers:
            logging.basicConfig(level=level, format=_TEXT)
    elif not any(isinstance(handler, _EcsHandler) for handler in root.handlers):
        handler = _EcsHandler(sys.stdout)
        handler.setFormatter(formatter(service))
        root.handlers[:] = [handler]
        root.setLevel(level)
        logging.captureWarnings(True)
        sys.excepthook = _uncaught
        threading.excepthook = lambda fault: _uncaught(
            fault.exc_type, fault.exc_value or fault.exc_type(), fault.exc_traceback
        )
    if form == "ecs":  # at each call: some of these loggers are made late
        for name, logger in list(logging.root.manager.loggerDict.items()):
            if isinstance(logger, logging.Logger) and name.split(".")[0] in _OWN_HANDLERS:
                logger.handlers.clear()
                logger.propagate = name != _SILENT
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def about(**fields: str) -> Iterator[None]:
    """Let every line that is written inside carry these fields; `__` in a name stands for a dot.

    Holds for this thread or task, and where its context is copied (`asyncio.to_thread`, `contextvars.copy_context`).
    """
    token = _bound.set({**_bound.get(), **_dotted(fields)})
    try:
        yield
    finally:
        _bound.reset(token)


def bound(field: str) -> str:
    """What `about` has bound to this field here, empty where nothing is."""
    return _bound.get().get(field, "")


def summary(text: str, fields: dict[str, Any]) -> dict[str, Any]:
    """`extra` of a line whose ECS form has `text` as its message and these fields, and whose text form has neither."""
    return {_SUMMARY: text, **fields}


def _dotted(fields: dict[str, str]) -> dict[str, str]:
    return {name.replace("__", "."): value for name, value in fields.items() if value}


class _EcsHandler(logging.StreamHandler[Any]):
    """Its type tells that this module has been here."""


@cache
def formatter(service: str) -> logging.Formatter:
    """What makes a line in ECS of a record of this process."""
    from ecs_logging import StdlibFormatter  # not needed, and not loaded, where lines are text

    class Ecs(StdlibFormatter):
        """Adds what is bound, and takes the line's own message for collectors where there is one."""

        def format_to_ecs(self, record: logging.LogRecord) -> dict[str, Any]:
            told = record.__dict__.pop(_SUMMARY, None)
            bound = {name: value for name, value in _bound.get().items() if name not in record.__dict__}
            record.__dict__.update(bound)
            try:
                line: dict[str, Any] = super().format_to_ecs(record)
            finally:  # other handlers get the record as it was
                for name in bound:
                    del record.__dict__[name]
                if told is not None:
                    record.__dict__[_SUMMARY] = told
            if told is not None:
                line["message"] = told
            return line

    return Ecs(
        extra={"service.name": f"neuroloop-{service}", "event.dataset": f"neuroloop.{service}"},
        exclude_fields=("log.original", "process", "taskName"),
    )


def _uncaught(kind: type[BaseException], fault: BaseException, trace: TracebackType | None) -> None:
    """The last words of a process or thread, as a line like the others."""
    if issubclass(kind, KeyboardInterrupt | SystemExit):
        return
    _LOG.critical("not caught: %s", kind.__name__, exc_info=(kind, fault, trace))
