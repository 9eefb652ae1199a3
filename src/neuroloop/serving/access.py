"""Who may call what: one rule a route, keys instead of sessions, and a limit on how often.

`RULES` is the whole of it. The check stands in front of the application, before a body is read, and looks the route up
itself: a route that nobody wrote a rule for takes an admin, it is never open by oversight. Without any key in the
database nobody gets in.
"""

import asyncio
import hmac
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from urllib.parse import unquote

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

from neuroloop.core.credentials import ApiKey, Role, parted, recorded, valid_name
from neuroloop.core.errors import AlreadyExists, Busy, NamesNobody, NeuroLoopError, Unavailable
from neuroloop.core.ports import ApiKeys
from neuroloop.core.rates import Rate, network
from neuroloop.core.schemas import Record
from neuroloop.serving import problems
from neuroloop.serving.origin import is_local

OPEN = None
RULES: dict[str, Role | None] = {
    "GET /health/live": OPEN,
    "GET /health/ready": OPEN,
    "GET /docs": OPEN,
    "GET /openapi.json": OPEN,
    "GET /ping": OPEN,
    "GET /v1/me": Role.UPLOADER,
    "POST /v1/predictions": Role.UPLOADER,
    "POST /v1/predictions:batch": Role.UPLOADER,
    "POST /invocations": Role.UPLOADER,
    "GET /v1/predictions/{prediction_id}": Role.UPLOADER,
    "GET /v1/predictions/{prediction_id}/image": Role.UPLOADER,
    "GET /v1/model": Role.UPLOADER,
    "GET /v1/model/card": Role.UPLOADER,
    "POST /v1/predictions/{prediction_id}/feedback": Role.READER,
    "GET /v1/data/audit": Role.READER,
    "GET /v1/data/audit.json": Role.READER,
    "GET /v1/models": Role.READER,
    "GET /v1/monitoring": Role.READER,
    "GET /metrics": Role.READER,
    "DELETE /v1/predictions/{prediction_id}": Role.ADMIN,
    "POST /v1/models/{version}/champion": Role.ADMIN,
    "GET /v1/mails": Role.ADMIN,
    "GET /v1/keys": Role.ADMIN,
    "POST /v1/keys": Role.ADMIN,
    "DELETE /v1/keys/{key_id}": Role.ADMIN,
}
"""`METHOD /path` -> the least role that may call it; `docs/access.md` says the same in words."""
LOCAL = frozenset({"GET /metrics"})
"""Open to this machine too, where no proxy stands between, and to whoever has `METRICS_KEY`."""

MANAGED = frozenset({"POST /invocations"})
"""Open to all where the setting `SAGEMAKER` says that only SageMaker, which asks IAM, reaches the port."""

PERSON_HEADER, ROLE_HEADER = "X-NeuroLoop-Person", "X-NeuroLoop-Role"
"""A key that delegates names with these the person it acts for (percent-encoded UTF-8) and that person's role."""
FRONTEND = "frontend"
"""Name of the key that stands in the settings."""

FRESH_SECONDS = 2.0
"""For so long a key is believed without asking the database: a revocation is heard of within it."""
STALE_SECONDS = 60.0
"""For so long a known key still counts while the database is away, where nobody can revoke it either."""
LOOK_UP_SECONDS = 2.0
"""Longest wait for the database to tell a key; the request then goes on for up to `api.ANSWER_SECONDS`."""
_LOG = logging.getLogger(__name__)


class Caller(Record):
    """Who makes a request."""

    name: str
    role: Role
    key_id: str
    delegate: bool = False
    """The key may speak for others, and this request does not say for whom."""

    @property
    def sees_only(self) -> str | None:
        """The owner whose predictions are all that this caller may see; None: everybody's."""
        return None if self.role.covers(Role.READER) else self.name

    def speaks_as(self, named: str | None) -> str:
        """The person in whose name a verdict or another act counts: the caller, or whom a key that delegates names.

        Raises `HTTPException` 403 where the request names somebody else, `NamesNobody` where such a key names nobody.
        """
        if self.delegate:
            if not named:
                raise NamesNobody(
                    "The request names nobody who says so",
                    why="this key speaks for others",
                    fix=f"send the name, or {PERSON_HEADER} and {ROLE_HEADER}",
                )
            return named
        if named and named != self.name:
            raise HTTPException(403, f"This key is {self.name}'s, the request is in another name; leave that out")
        return self.name


@dataclass
class _Known:
    key: ApiKey
    asked_at: float


class Access:
    """Tells callers by their keys.

    `first` is the key of the settings: recorded at its first use, so that a new database needs no other way in. A key
    that follows it in the settings takes its place, and the one before is revoked. `scraper` is a key that opens the
    routes of `LOCAL` to a program on another machine, and nothing else; it stands in no database.
    """

    def __init__(
        self,
        keys: Callable[[], ApiKeys],
        *,
        first: str = "",
        scraper: str = "",
        per_minute: int = 6000,
        strangers_per_minute: int = 120,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keys, self._clock = keys, clock
        self._first = recorded(first, name=FRONTEND, role=Role.ADMIN, delegates=True) if first else None
        self._scraper = scraper
        self._known: dict[str, _Known] = {}
        self._asking: dict[str, asyncio.Task[ApiKey | None]] = {}
        self._callers, self._strangers = Rate(per_minute, clock), Rate(strangers_per_minute, clock)

    async def admit(self, request: Request, needed: Role) -> Caller:
        """Who calls, if they may. Raises `HTTPException` 401, 403 or 429, and `Unavailable`."""
        key = await self._key(request)
        caller = _caller(key, request)
        seconds = self._callers.spend(f"{key.id} {caller.name}" if key.delegates else key.id)
        if seconds:
            raise _too_many("with this key", seconds)
        if not caller.role.covers(needed):
            raise HTTPException(403, f"This takes the role {needed}; {caller.name} is {caller.role}")
        return caller

    def scrapes(self, request: Request) -> bool:
        """Whether the request shows the scraper's key."""
        shown = request.headers.get("authorization", "").partition(" ")[2].strip()
        return bool(self._scraper) and hmac.compare_digest(shown.encode(), self._scraper.encode())

    def knows(self, scope: Scope) -> bool:
        """Whether the request shows a key that was seen valid; asks nobody, so that strangers cost nothing."""
        parts = _shown(Headers(scope=scope))
        known = self._known.get(parts[0]) if parts else None
        return bool(parts and known and known.key.matches(parts[1]) and known.key.standing() == "valid")

    def forget(self, key_id: str) -> None:
        """Ask the database about this key at its next use."""
        self._known.pop(key_id, None)

    async def _key(self, request: Request) -> ApiKey:
        """The valid key that the request shows."""
        address = network(request.client.host if request.client else "")
        parts = _shown(request.headers)
        if parts is None:
            shown = "authorization" in request.headers
            raise self._refused(address, "What was sent is no key" if shown else "No key was sent")
        key_id, secret = parts
        known = self._known.get(key_id)
        if known is None and (seconds := self._strangers.wait(address)):
            raise _too_many("without a valid key", seconds)  # an id that nobody has seen is not worth a look-up then
        # Paid before the database is asked, or a thousand at once would all ask; given back to whoever has a key.
        asks = known is None and key_id not in self._asking
        if asks:
            self._strangers.spend(address)
        try:
            key = await self._looked_up(key_id, known)
            matches = key is not None and key.matches(secret)
        finally:
            if asks:
                self._strangers.refund(address)
        if key is None or not matches:
            raise self._refused(address, "This key is not known")
        if key.standing() != "valid":
            raise self._refused(address, f"This key is {key.standing()}")
        return key

    async def _looked_up(self, key_id: str, known: _Known | None) -> ApiKey | None:
        """The row of a key, at most `FRESH_SECONDS` old while the database answers; of requests at once, one asks."""
        if known and self._clock() - known.asked_at < FRESH_SECONDS:
            return known.key
        asking = self._asking.get(key_id)
        if asking is None:
            asking = asyncio.ensure_future(asyncio.to_thread(self._find, key_id))
            self._asking[key_id] = asking
            asking.add_done_callback(partial(self._heard, key_id, self._clock()))
        at = self._clock()
        counts = known if known and at - known.asked_at < STALE_SECONDS else None
        try:
            return await asyncio.wait_for(asyncio.shield(asking), LOOK_UP_SECONDS)
        except (Unavailable, TimeoutError) as error:
            if counts:
                return counts.key
            raise Busy("Keys cannot be checked", why="the database does not answer", fix="try again shortly") from error

    def _heard(self, key_id: str, asked_at: float, asking: "asyncio.Task[ApiKey | None]") -> None:
        """Note what a look-up found, also where nobody waits for it any more: the next request then need not ask."""
        self._asking.pop(key_id, None)
        if asking.cancelled() or asking.exception() is not None:
            return
        key = asking.result()
        if key is None:
            self._known.pop(key_id, None)
        else:
            self._known[key_id] = _Known(key, asked_at)

    def _find(self, key_id: str) -> ApiKey | None:
        keys, first = self._keys(), self._first
        found = keys.api_key(key_id)
        if found is None and first is not None and first.id == key_id:
            for other in keys.api_keys():
                if other.name == FRONTEND and other.delegates:
                    keys.revoke_api_key(other.id)
            try:
                keys.record_api_key(first)
            except AlreadyExists:  # another server was first
                return keys.api_key(key_id)
            return first
        return found

    def _refused(self, address: str, why: str) -> HTTPException:
        seconds = self._strangers.spend(address)
        if seconds:
            return _too_many("without a valid key", seconds)
        return HTTPException(401, why, {"WWW-Authenticate": 'Bearer realm="neuroloop"'})


SAGEMAKER = Caller(name="sagemaker", role=Role.UPLOADER, key_id="")
"""Whose the predictions of `MANAGED` routes are."""


class Guard:
    """ASGI middleware that lets a request pass if the rule of its route does; `routes` are the application's.

    With `managed`, the routes of `MANAGED` take no key.
    """

    def __init__(
        self, app: ASGIApp, access: Access, routes: Callable[[], Sequence[BaseRoute]], managed: bool = False
    ) -> None:
        self._app, self._access, self._routes = app, access, routes
        self._managed = MANAGED if managed else frozenset()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on with its caller in the state, or answer with a problem.

        A path or method that no route takes passes: the application says that it does not exist.
        """
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        route = next((route for route in self._routes() if route.matches(scope)[0] is Match.FULL), None)
        if route is not None:
            request = Request(scope)
            rule = _rule(scope["method"], getattr(route, "path", ""))
            needed = RULES.get(rule, Role.ADMIN)
            open_here = rule in LOCAL and (is_local(request) or self._access.scrapes(request))
            if rule in self._managed:
                request.state.caller = SAGEMAKER
            elif needed is not OPEN and not open_here:
                try:
                    request.state.caller = await self._access.admit(request, needed)
                except (HTTPException, NeuroLoopError) as error:
                    scope["route"] = route  # for the log and the metrics, as if it had been reached
                    answer = (
                        problems.from_status(error.status_code, error.detail, dict(error.headers or {}))
                        if isinstance(error, HTTPException)
                        else problems.from_error(error)
                    )
                    if "transfer-encoding" in request.headers:  # it may have no end, and nobody will read it
                        answer.headers["Connection"] = "close"
                    return await answer(scope, receive, send)
        await self._app(scope, receive, send)


def caller_of(request: Request) -> Caller:
    """Who makes this request; only on routes that are not open."""
    caller: Caller = request.state.caller
    return caller


def holder(scope: Scope) -> str | None:
    """Whom a request is from, for limits; None where it shows no key."""
    caller: Caller | None = scope.get("state", {}).get("caller")
    return f"{caller.key_id} {caller.name}" if caller and caller.key_id else None


def document(app: FastAPI) -> None:
    """Let OpenAPI say which key each route takes, and how it is refused."""
    schema = app.openapi()
    schema["components"].setdefault("securitySchemes", {})["key"] = {
        "type": "http",
        "scheme": "bearer",
        "description": "An API key: `neuroloop keys create NAME --role reader`",
    }
    content = {problems.MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    refusals = {"401": "No valid key", "403": "The key's role is not enough", "429": "Too many requests"}
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            needed = RULES.get(_rule(method.upper(), path), Role.ADMIN)
            operation["security"] = [] if needed is OPEN else [{"key": []}]
            if needed is not OPEN:
                operation["description"] = f"{operation.get('description', '')}\n\nRole: **{needed}**.".strip()
                for status, words in refusals.items():
                    operation["responses"][status] = {"description": words, "content": content}


def allow_head(app: FastAPI) -> None:
    """Let probes ask `HEAD` where they may `GET`; behind `document`, for OpenAPI would list each such route twice."""
    for route in app.routes:
        rule = f"GET {getattr(route, 'path', '')}"
        if isinstance(route, APIRoute) and (RULES.get(rule, Role.ADMIN) is OPEN or rule in LOCAL):
            route.methods.add("HEAD")


def _shown(headers: Headers) -> tuple[str, str] | None:
    """Id and secret of the key that a request shows; None where it shows none."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return parted(token.strip()) if scheme.lower() == "bearer" else None


def _rule(method: str, path: str) -> str:
    return f"{'GET' if method == 'HEAD' else method} {path}"


def _caller(key: ApiKey, request: Request) -> Caller:
    """The key's holder, or the person whom a key that delegates names."""
    person, role = request.headers.get(PERSON_HEADER), request.headers.get(ROLE_HEADER)
    if person is None and role is None:
        return Caller(name=key.name, role=key.role, key_id=key.id, delegate=key.delegates)
    if not key.delegates:
        raise HTTPException(403, f"This key may not speak for others; leave out {PERSON_HEADER} and {ROLE_HEADER}")
    name = unquote(person or "")
    if not valid_name(name):
        raise HTTPException(403, f"{PERSON_HEADER} names nobody")
    if role not in list(Role):
        raise HTTPException(403, f"{ROLE_HEADER} is none of {', '.join(Role)}")
    return Caller(name=name, role=key.role.lowered(Role(role)), key_id=key.id)


def _too_many(how: str, seconds: float) -> HTTPException:
    return HTTPException(429, f"Too many requests {how}", {"Retry-After": str(math.ceil(seconds))})
