"""Where a request comes from."""

import re

from starlette.requests import Request

_LOOPBACK = ("127.0.0.1", "::1", "[::1]", "localhost")
_FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip", "via")


def is_local(request: Request) -> bool:
    """Whether the request comes from this machine, by a name of it, and through no proxy that says so.

    The name counts because a web page elsewhere can let its own name point here.
    """
    client = request.client.host if request.client else ""
    named = re.sub(r":\d+$", "", request.headers.get("host", ""))
    proxied = any(header in request.headers for header in _FORWARDED)
    return client in _LOOPBACK and named in _LOOPBACK and not proxied
