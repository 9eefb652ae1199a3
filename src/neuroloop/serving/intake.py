"""What comes in: bounded bodies, and the image in them."""

import asyncio
from collections import Counter
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

SHARE = 0.25
"""Of the bytes of all bodies together, the part that one holder of a key may take, though always one whole body."""

_CHARSETS = (b"utf-8", b"utf8", b"iso-8859-1", b"latin-1", b"us-ascii")  # of forms; some clients name the second
_BINARY = (b"application/dicom", b"application/gzip", b"application/x-gzip", b"application/octet-stream")


class BodyLimit:
    """ASGI middleware that refuses a body beyond `limit(path)` bytes with 413: by its announced length where there is
    one, else as soon as more has arrived; and with 408 one that has not arrived after `UPLOAD_SECONDS`.

    Nothing beyond the limit is kept in memory. A few senders of large batches would fill the machine all the same:
    beyond `together` bytes of all bodies that are being worked on the one that comes last gets 503, and beyond `SHARE`
    of that one `holder(scope)` gets 429, so that nobody keeps the others out. None holds no share.
    """

    def __init__(
        self,
        app: ASGIApp,
        limit: Callable[[str], int],
        together: int,
        holder: Callable[[Scope], str | None] = lambda _: None,
    ) -> None:
        self._app, self._limit, self._together, self._holder = app, limit, together, holder
        self._held: Counter[str | None] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on, counted."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        limit = self._limit(scope["path"])
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced) > limit:
            return await problems.from_status(413, _too_large(limit))(scope, receive, send)
        received, whole = 0, False
        until: float | None = None
        holder: str | None = None

        async def counted() -> Message:
            nonlocal received, whole, until, holder
            if whole:  # behind it comes only the end of the connection
                return await receive()
            if until is None:
                until, holder = asyncio.get_running_loop().time() + UPLOAD_SECONDS, self._holder(scope)
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                raise _refused(408, f"The body had not arrived after {UPLOAD_SECONDS:.0f} s") from None
            whole = not message.get("more_body", False)
            size = len(message.get("body", b""))
            received += size
            self._held[holder] += size
            if received > limit:
                raise _refused(413, _too_large(limit))
            if holder is not None and self._held[holder] > max(limit, self._together * SHARE):
                raise _refused(429, "Other large uploads with this key are still being worked on")
            if self._held.total() > self._together:
                raise _refused(503, "The service is busy with other large uploads")
            return message

        try:
            await self._app(scope, counted, send)
        finally:
            self._held[holder] -= received
            self._held += Counter()  # forgets who holds nothing


def consent(stated: Consent | None, settings: Settings) -> Consent:
    """The consent to record with an upload. Raises `HTTPException` with status 422 where it has to be stated."""
    if stated in (None, "unstated") and settings.require_consent:
        raise HTTPException(422, "This service takes no upload without X-Consent: training, record or simulated")
    return stated or "unstated"


async def read_image(request: Request) -> bytes:
    """The bytes of the uploaded image: the form's field `file`, or the body itself where its type says an image.

    Which kind of image it is, is for the bytes to say. Kept in memory throughout, an upload never touches the server's
    disk, and its file name is not looked at. Raises `HTTPException` with status 400 or 415.
    """
    content_type = request.headers.get("content-type", "")
    kind = parse_options_header(content_type)[0]
    form = kind == b"multipart/form-data"
    if not form and not kind.startswith(b"image/") and kind not in _BINARY:
        raise HTTPException(415, "The request is neither a form nor an image, going by its Content-Type")
    body = await body_of(request)
    return (await files_of(request, body, most=1))[0] if form else body


async def body_of(request: Request) -> bytes:
    """The whole body."""
    return b"".join([part async for part in request.stream()])  # request.body() would keep it to the end


async def files_of(request: Request, body: bytes, *, most: int) -> list[bytes]:
    """The bytes of every file in the form's field `file`, in their order: one to `most`.

    Raises `HTTPException` with status 400 for a form that is cut off, that has files elsewhere too, or that names a
    rare charset: Python decodes some, such as punycode, in quadratic time, and none of the text is of use.
    """
    charset = parse_options_header(request.headers["content-type"])[1].get(b"charset", b"utf-8")
    if charset.lower() not in _CHARSETS:
        raise HTTPException(400, "The form names a charset other than utf-8, iso-8859-1 and us-ascii")

    async def once() -> AsyncGenerator[bytes, None]:
        yield body

    parser = _InMemory(request.headers, once(), max_files=most, max_fields=10, max_part_size=ENVELOPE_BYTES)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise HTTPException(400, f"The form cannot be read, or has more than {most} files: {error.message}") from None
    if not parser.ended:  # what is missing may have been another file
        raise HTTPException(400, "The form is cut off: it lacks its closing boundary")
    files = []
    for name, value in form.multi_items():
        if isinstance(value, UploadFile) and name == "file":
            files.append(await value.read())
        elif isinstance(value, UploadFile) or name == "file":
            raise HTTPException(400, f"The form has a part {name[:50]!r} that is not a file in the field 'file'")
    if not files:
        raise HTTPException(400, "The form has no file in a field 'file'")
    return files


class _InMemory(MultiPartParser):
    """A form parser that keeps every file in memory and tells whether it saw the closing boundary."""

    spool_max_size = 2**40
    ended = False

    def on_end(self) -> None:
        self.ended = True


def _refused(status: int, detail: str) -> HTTPException:
    """A refusal in the midst of a body, whose rest nobody will read."""
    return HTTPException(status, detail, {"Connection": "close"})


def _too_large(limit: int) -> str:
    return f"The body is larger than the {limit:,} bytes that are read"
