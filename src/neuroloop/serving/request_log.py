"""One line and one count for every request, and the headers that every answer carries."""

import json
import logging
import time
import uuid

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from neuroloop.core.schemas import RESEARCH_NOTICE
from neuroloop.serving import problems
from neuroloop.serving.metrics import Metrics

_LOG = logging.getLogger(__name__)
_CLIENT_GONE = 499  # nginx' number for a client that left before its answer


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
            _LOG.info(json.dumps(line | {"milliseconds": round(seconds * 1000, 1)}))
