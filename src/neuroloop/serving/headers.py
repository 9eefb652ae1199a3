"""Headers that keep a browser from doing anything with an answer but show it."""

import base64
import hashlib
import re

from fastapi.openapi.docs import get_swagger_ui_html
from starlette.datastructures import MutableHeaders
from starlette.responses import HTMLResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_NOTHING = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
_DOCS_FROM = "https://cdn.jsdelivr.net"  # where FastAPI's page takes Swagger UI from
_ALWAYS = {
    "Content-Security-Policy": _NOTHING,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class SecurityHeaders:
    """ASGI middleware, the outermost; a route's own header of the same name stands.

    Everything under `/v1/` is somebody's: no cache keeps it. No answer lets another origin read it (CORS): the
    frontend asks from its server, and a key does not belong into a web page.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on and complete the headers of its answer."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        private = scope["path"].startswith("/v1/")

        async def completed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _ALWAYS.items():
                    headers.setdefault(name, value)
                if private:
                    headers.setdefault("Cache-Control", "no-store")
            await send(message)

        await self._app(scope, receive, completed)


def docs_page(title: str) -> HTMLResponse:
    """Swagger UI, allowed to load itself, to run its one inline script and to call this API."""
    page = get_swagger_ui_html(openapi_url="/openapi.json", title=title, swagger_favicon_url="data:,")
    scripts = re.findall(rb"<script>(.*?)</script>", bytes(page.body), re.DOTALL)
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'" for text in scripts)
    page.headers["Content-Security-Policy"] = (
        f"default-src 'none'; script-src {_DOCS_FROM} {hashes}; style-src {_DOCS_FROM} 'unsafe-inline'; "
        "img-src data: 'self'; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )
    return page
