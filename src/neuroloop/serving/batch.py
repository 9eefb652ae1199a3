"""Several files in one request: an answer or a problem each, in their order."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from neuroloop.core.errors import NeuroLoopError, Unavailable
from neuroloop.core.schemas import Record
from neuroloop.serving import intake, problems
from neuroloop.serving.inference import Answer, Rejection

FILES = 32
BODY_UPLOADS = 5
"""The body of a batch may be as large as this many of the largest uploads."""
_AT_ONCE = 2  # half of the predicting threads: a batch must not keep single uploads waiting
_LOG = logging.getLogger(__name__)

REQUEST_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file"],
                "properties": {
                    "file": {
                        "type": "array",
                        "minItems": 1,
                        "maxItems": FILES,
                        "items": {"type": "string", "format": "binary"},
                    }
                },
            }
        }
    },
}


class Item(Record):
    """What came of one file: `answer` with status 201, else `problem` as the single route would give it."""

    status: int
    answer: Answer | None = None
    problem: dict[str, Any] | None = None


class BatchAnswer(Record):
    """One item a file, in the order of the form."""

    results: tuple[Item, ...] = Field(max_length=FILES)


async def read_files(request: Request) -> list[bytes]:
    """The bytes of every field `file` of the form. Raises `HTTPException` with status 400 or 415."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise HTTPException(415, "The request is no form, going by its Content-Type")
    return await intake.files_of(request, await intake.body_of(request), most=FILES)


async def answer(
    files: list[bytes], ask: Callable[[int, bytes], Awaitable[Answer | Rejection]]
) -> BatchAnswer | JSONResponse:
    """Ask for each file, a few at a time. Where nobody can answer any, the problem of a single request, 503 or 507.

    As soon as the service cannot answer one, the rest is not tried: each would wait as long again. With an
    Idempotency-Key the same request again gets what there is and the rest. An unexpected fault is the problem of its
    file alone, for the others are recorded either way.
    """
    items: list[Item | None] = [None] * len(files)
    waiting = iter(range(len(files)))
    away: list[JSONResponse] = []

    async def work() -> None:
        for index in waiting:
            if away:
                items[index] = _item(away[0])
                continue
            try:
                said = await ask(index, files[index])
            except Unavailable as error:
                away.append(problems.from_error(error))
                items[index] = _item(away[-1])
            except NeuroLoopError as error:
                items[index] = _item(problems.from_error(error))
            except Exception:
                _LOG.exception("unexpected fault in file %d of a batch", index + 1)
                items[index] = _item(problems.internal_error())
            else:
                if isinstance(said, Rejection):
                    items[index] = _item(problems.refusal(said))
                else:
                    items[index] = Item(status=201, answer=said)

    await asyncio.gather(*(work() for _ in range(_AT_ONCE)))
    results = tuple(item for item in items if item is not None)
    if away and all(item.status in (503, 507) for item in results):
        return away[0]
    return BatchAnswer(results=results)


def _item(response: JSONResponse) -> Item:
    return Item(status=response.status_code, problem=json.loads(bytes(response.body)))
