"""Every error a client sees: a problem document (RFC 9457) that says what is wrong, why, and how to mend it."""

import http
import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from neuroloop.core.credentials import Role
from neuroloop.core.errors import (
    Busy,
    Erased,
    ImageTooLarge,
    InvalidImage,
    KeyReused,
    NamesNobody,
    NeuroLoopError,
    NotFound,
    OutOfSpace,
    Unavailable,
    UnsupportedImage,
)
from neuroloop.serving.feedback import InvalidFeedback
from neuroloop.serving.inference import Rejection
from neuroloop.serving.keyring import InvalidKey
from neuroloop.serving.origin import is_local
from neuroloop.serving.rollback import LedgerBehind, NotPromotable

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_SECONDS = 5
_LOG = logging.getLogger(__name__)


class Problem(BaseModel):
    """RFC 9457; further members (such as `gate` and `id` of a rejected image) depend on `type`."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(description="urn:neuroloop:problem:<name>, stable; a client may branch on it")
    title: str = Field(description="The kind of problem, the same for every occurrence")
    status: int = Field(description="The HTTP status")
    detail: str = Field(description="What happened here, and why")
    fix: str = Field(description="What to do about it; may be empty")


_KINDS: tuple[tuple[type[NeuroLoopError], int, str, str], ...] = (  # the first that fits
    (ImageTooLarge, 413, "image-too-large", "The image is too large"),
    (UnsupportedImage, 415, "unsupported-image", "The file is not an image that can be read"),
    (InvalidImage, 400, "invalid-image", "The image cannot be read"),
    (InvalidFeedback, 422, "invalid-feedback", "The feedback contradicts itself"),
    (NamesNobody, 422, "names-nobody", "The request names nobody"),
    (NotPromotable, 409, "not-promotable", "The version cannot become the champion"),
    (LedgerBehind, 500, "ledger-behind", "The change was made, but could not be written down"),
    (KeyReused, 422, "idempotency-key-reused", "The Idempotency-Key belongs to another request"),
    (InvalidKey, 422, "invalid-key", "The key cannot be made"),
    (NotFound, 404, "not-found", "There is no such thing"),
    (Erased, 410, "erased", "This was erased"),
    (OutOfSpace, 507, "out-of-space", "There is no room left to store it"),
    (Unavailable, 503, "unavailable", "The service cannot answer for now"),
)

_STATUS_FIXES = {
    401: "send a valid key as `Authorization: Bearer nl_...`; an operator makes one with `neuroloop keys create`",
    403: "use a key of that role, in the name of its holder; an operator makes one",
    429: "wait as long as Retry-After says, then go on more slowly",
    400: "send multipart/form-data with a field named file, under a short name, or the image itself",
    404: "see /docs for the paths there are",
    405: "see /docs for the methods of this path",
    408: "send it again, over a faster connection",
    413: "upload a single slice, such as a JPEG or PNG",
    415: "send multipart/form-data with a field named file, or the image itself as image/png or image/jpeg",
    422: "see /docs for what this path expects",
    503: "try again as Retry-After says",
}

_AWAY = {
    OutOfSpace: ("The store or the database has no room left", "try again later; an operator has to make room"),
    Unavailable: (
        "A part that the service needs does not answer",
        "try again as Retry-After says; the log tells an operator more, by the X-Request-Id of this answer",
    ),
}
"""What strangers are told of faults whose own words name hosts, folders and buckets."""


def problem(
    status: int,
    name: str,
    title: str,
    detail: str,
    fix: str = "",
    *,
    headers: dict[str, str] | None = None,
    **more: Any,
) -> JSONResponse:
    """A problem document as a response; `more` are further members."""
    document = Problem(type=f"urn:neuroloop:problem:{name}", title=title, status=status, detail=detail, fix=fix, **more)
    headers = dict(headers or {})
    if status in (429, 503, 507):
        headers.setdefault("Retry-After", str(RETRY_AFTER_SECONDS))
    return JSONResponse(document.model_dump(mode="json"), status, headers=headers, media_type=MEDIA_TYPE)


def from_error(error: NeuroLoopError, *, inside: bool = False) -> JSONResponse:
    """The problem document of one of our own errors; a kind that is no client's business becomes a bare 500.

    What a store or a database says of itself is for the log and for whoever is `inside`: an admin on this machine.
    """
    for kind, status, name, title in _KINDS:
        if isinstance(error, kind):
            detail, fix = ": ".join(part for part in (error.what, error.why) if part), error.fix
            if isinstance(error, Unavailable) and not isinstance(error, Busy) and not inside:
                _LOG.warning("%s", error)
                detail, fix = _AWAY[OutOfSpace if isinstance(error, OutOfSpace) else Unavailable]
            return problem(status, name, title, detail, fix)
    _LOG.error("unexpected fault", exc_info=error)
    return internal_error()


def refusal(rejection: Rejection) -> JSONResponse:
    """The problem document of an image that the gate did not take for a brain MRI."""
    return problem(
        422,
        "not-a-brain-mri",
        "The image is not taken for a brain MRI",
        rejection.gate.reason,
        "upload one slice of a brain MRI; if this is one, a reader may say so with feedback on this id "
        "(verdict brain_mri or correct)",
        id=rejection.id,
        gate=rejection.gate.model_dump(mode="json"),
        model_version=rejection.model_version,
        frames=rejection.frames,
        frame=rejection.frame,
    )


def from_status(status: int, detail: str | None = None, headers: dict[str, str] | None = None) -> JSONResponse:
    """The problem document of a plain HTTP status."""
    title = http.HTTPStatus(status).phrase
    return problem(
        status,
        title.lower().replace(" ", "-"),
        title,
        detail or title,
        _STATUS_FIXES.get(status, ""),
        headers=headers,
    )


def internal_error() -> JSONResponse:
    """A fault of ours: the log has the details, the client none."""
    return problem(
        500,
        "internal-error",
        "Something broke on our side",
        "The request could not be completed because of an unexpected fault; it has been logged",
        "try again; if it stays, give the operator the X-Request-Id of this answer",
    )


def install(app: FastAPI) -> None:
    """Make every error of `app` a problem document."""

    @app.exception_handler(NeuroLoopError)
    async def ours(request: Request, error: NeuroLoopError) -> JSONResponse:
        caller = getattr(request.state, "caller", None)  # the frontend is on this machine too, its people are not
        return from_error(error, inside=is_local(request) and caller is not None and caller.role is Role.ADMIN)

    @app.exception_handler(RequestValidationError)
    async def validation(request: Request, error: RequestValidationError) -> JSONResponse:
        # The offending input itself is not sent back: it may be long, or a secret in the wrong field.
        return problem(
            422,
            "invalid-request",
            "The request is not valid",
            "; ".join(_complaint(item) for item in error.errors()),
            "see /docs for what this path expects",
        )

    @app.exception_handler(HTTPException)
    async def status(request: Request, error: HTTPException) -> JSONResponse:
        # Starlette's words for "no such path" and "no such method" are only the status' own phrase
        unknown = error.status_code in (404, 405)
        detail = f"{request.method} {request.url.path} does not exist" if unknown else error.detail
        return from_status(error.status_code, detail, dict(error.headers or {}))


def document(app: FastAPI) -> None:
    """Let OpenAPI name the media type that errors really have."""
    schema = app.openapi()
    for path in schema["paths"].values():
        for operation in path.values():
            for code, response in operation["responses"].items():
                if code >= "400" and "application/json" in response.get("content", {}):
                    response["content"] = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
                    if code == "422" and response["description"] == "Validation Error":
                        response["description"] = "The request is not valid"
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)


def responses(*codes: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's `responses` of a route that may answer with these problems."""
    return {code: {"model": Problem, "description": http.HTTPStatus(code).phrase} for code in codes}


def _complaint(item: dict[str, Any] | Any) -> str:
    where: Sequence[object] = [part for part in item["loc"] if part != "body"]
    return f"{'.'.join(map(str, where)) or 'body'}: {item['msg']}"
