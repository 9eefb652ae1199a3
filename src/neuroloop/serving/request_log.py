"""One line and one count for every request, and the headers that every answer carries."""

import json
import logging
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from neuroloop.core import logs
from neuroloop.core.schemas import RESEARCH_NOTICE
from neuroloop.serving import problems
from neuroloop.serving.metrics import Metrics

_LOG = logging.getLogger(__name__)
_CLIENT_GONE = 499  # nginx' number for a client that left before its answer
_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")
"""W3C Trace Context, as the frontend sends it. Anything else that comes in this header is the client's words."""


class RequestLog:
    """ASGI middleware around all that can fail.

    The line names the route's template, never the path itself or a file name: both are the client's words. A fault that
    nothing else caught ends here, as a 500 without details.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on and log it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request_id = str(uuid.uuid4())
        given = _TRACEPARENT.fullmatch(Headers(scope=scope).get("traceparent", ""))
        trace = given[1] if given else request_id.replace("-", "")
        with logs.about(trace__id=trace, http__request__id=request_id):
            await self._traced(scope, receive, send, request_id)

    async def _traced(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        state = scope.setdefault("state", {})
        started, status = time.perf_counter(), 0

        async def labelled(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                headers["X-Research-Use-Only"] = RESEARCH_NOTICE
            await send(message)

        try:
            await self._app(scope, receive, labelled)
        except ClientDisconnect:
            status = status or _CLIENT_GONE
        except Exception:
            _LOG.exception("request %s failed", request_id)
            if status:
                raise
            await problems.internal_error()(scope, receive, labelled)
        finally:
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.requests.labels(scope["method"], route, str(status)).inc()
            self._metrics.request_seconds.labels(route).observe(seconds)
            line = {"request": request_id, "method": scope["method"], "route": route, "status": status}
            line |= {key: state[key] for key in ("prediction", "version") if key in state}
            text = json.dumps(line | {"milliseconds": round(seconds * 1000, 1)})
            _LOG.info(text, extra=_ecs(scope["method"], route, status, seconds, state))


def _ecs(method: str, route: str, status: int, seconds: float, state: dict[str, Any]) -> dict[str, Any]:
    """The same in the fields of the Elastic Common Schema; the request's ids are bound already."""
    fields = {
        "event.action": "request",
        "event.outcome": "failure" if status >= 500 else "success",
        "event.duration": round(seconds * 1e9),
        "http.request.method": method,
        "http.response.status_code": status,
        "http.route": route,
    }
    for name, key in ((logs.PREDICTION, "prediction"), (logs.MODEL, "version")):
        if key in state:
            fields[name] = state[key]
    return logs.summary(f"{method} {route} {status}", fields)
