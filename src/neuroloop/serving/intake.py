"""What comes in: bounded bodies, and the image in them."""

import asyncio
from collections.abc import AsyncGenerator, Callable

from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from neuroloop.core.schemas import Consent
from neuroloop.core.settings import Settings
from neuroloop.serving import problems

ENVELOPE_BYTES = 64_000
"""Allowed beyond the image for boundaries and part headers, and for bodies that carry no image."""

UPLOAD_SECONDS = 60.0
"""Within which a body must have arrived; 20 MB then need 2.7 Mbit/s."""

_BINARY = (b"application/dicom", b"application/gzip", b"application/x-gzip", b"application/octet-stream")


class BodyLimit:
    """ASGI middleware that refuses a body beyond `limit(path)` bytes with 413: by its announced length where there is
    one, else as soon as more has arrived. Nothing beyond the limit is kept in memory, and beyond `together` bytes of
    all bodies that are being worked on the one that comes last gets 503: a few senders of large batches would otherwise
    fill the machine.
    """

    def __init__(self, app: ASGIApp, limit: Callable[[str], int], together: int) -> None:
        self._app, self._limit, self._together = app, limit, together
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on, counted."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        limit = self._limit(scope["path"])
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced) > limit:
            return await problems.from_status(413, _too_large(limit))(scope, receive, send)
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            size = len(message.get("body", b""))
            received += size
            self._held += size
            if received > limit:
                raise HTTPException(413, _too_large(limit), {"Connection": "close"})
            if self._held > self._together:
                raise HTTPException(503, "The service is busy with other large uploads", {"Connection": "close"})
            return message

        try:
            await self._app(scope, counted, send)
        finally:
            self._held -= received


def consent(stated: Consent | None, settings: Settings) -> Consent:
    """The consent to record with an upload. Raises `HTTPException` with status 422 where it has to be stated."""
    if stated in (None, "unstated") and settings.require_consent:
        raise HTTPException(422, "This service takes no upload without X-Consent: training, record or simulated")
    return stated or "unstated"


async def read_image(request: Request) -> bytes:
    """The bytes of the uploaded image: the form's field `file`, or the body itself where its type says an image.

    Which kind of image it is, is for the bytes to say. Kept in memory throughout, an upload never touches the server's
    disk, and its file name is not looked at. Raises `HTTPException` with status 400, 408 or 415.
    """
    content_type = request.headers.get("content-type", "")
    kind = parse_options_header(content_type)[0]
    form = kind == b"multipart/form-data"
    if not form and not kind.startswith(b"image/") and kind not in _BINARY:
        raise HTTPException(415, "The request is neither a form nor an image, going by its Content-Type")
    body = await body_of(request)
    return await _field(request.headers, body) if form else body


async def body_of(request: Request) -> bytes:
    """The whole body, waited for `UPLOAD_SECONDS` at most; then it is an `HTTPException` with status 408."""
    try:
        async with asyncio.timeout(UPLOAD_SECONDS):
            return b"".join([part async for part in request.stream()])  # request.body() would keep it to the end
    except TimeoutError:
        message = f"The body had not arrived after {UPLOAD_SECONDS:.0f} s"
        raise HTTPException(408, message, {"Connection": "close"}) from None


class InMemory(MultiPartParser):
    """A form parser that keeps every file in memory."""

    spool_max_size = 2**40


async def _field(headers: Headers, body: bytes) -> bytes:
    async def once() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        form = await InMemory(headers, once(), max_files=1, max_fields=10).parse()
    except MultiPartException as error:
        raise HTTPException(400, f"The form cannot be read: {error.message}") from None
    file = form.get("file")
    if not isinstance(file, UploadFile):
        raise HTTPException(400, "The form has no file in its field 'file'")
    return await file.read()


def _too_large(limit: int) -> str:
    return f"The body is larger than the {limit:,} bytes that are read"
