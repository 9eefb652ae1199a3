"""What stands between a browser and Streamlit: headers on every answer, and no upload before somebody has signed in."""

import re
from collections import OrderedDict

from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from streamlit.runtime.scriptrunner import get_script_run_ctx

_HEADERS = {
    # Streamlit draws with inline styles and evaluates its charts; it needs no other site, and none may frame it.
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "frame-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
}
_UPLOAD = re.compile(r"/_stcore/upload_file/([^/]+)/")
_METRICS = "/_stcore/metrics"
_MOST = 10_000  # tabs remembered; beyond it the one that was drawn longest ago is forgotten
_signed_in: OrderedDict[str, None] = OrderedDict()


def note(signed_in: bool) -> None:
    """Say of the tab that is being drawn whether somebody has signed in there."""
    context = get_script_run_ctx()
    if context is None:
        return
    if signed_in:
        _signed_in[context.session_id] = None
        _signed_in.move_to_end(context.session_id)
        while len(_signed_in) > _MOST:
            _signed_in.popitem(last=False)
    else:
        _signed_in.pop(context.session_id, None)


class Guard:
    """ASGI middleware in front of Streamlit, which keeps what a tab uploads in memory before any page is drawn."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on, or not, and complete the headers of its answer."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def completed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        upload = _UPLOAD.search(scope["path"])
        if scope["path"].endswith(_METRICS):
            return await PlainTextResponse("Not here.", 404)(scope, receive, completed)
        if upload and scope["method"] != "OPTIONS" and upload[1] not in _signed_in:
            return await PlainTextResponse("Sign in first.", 401)(scope, receive, completed)
        await self._app(scope, receive, completed)
