"""The inference API. `uvicorn neuroloop.serving.api:app --factory` serves it with the settings of the environment."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from neuroloop import __version__, bootstrap
from neuroloop.core.errors import NeuroLoopError, Unavailable
from neuroloop.core.schemas import RESEARCH_NOTICE, Label, Mail, Monitoring, Verdict
from neuroloop.imaging.decode import FORMATS
from neuroloop.serving import inference, intake, problems
from neuroloop.serving.champion import Champion
from neuroloop.serving.metrics import Metrics
from neuroloop.serving.request_log import RequestLog

ANSWER_SECONDS = 15.0
"""Longest wait of a request for a thread, the store and the database together; then it is a 503."""
CHECK_SECONDS = 3.0
"""Longest wait of a readiness probe for each part."""
PREDICTING_THREADS = 4
"""Predictions at a time. Bounds memory too: a 40-megapixel upload takes some 500 MB while it is worked on."""

_LOG = logging.getLogger(__name__)
T = TypeVar("T")
Reader = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f]+$")
]
Frame = Annotated[
    int | None,
    Query(ge=1, le=2**31 - 1, description="Frame, slice or page to read, from 1; the middle one where none is named"),
]

_DESCRIPTION = f"""
Classifies slices of brain MRI into glioma, meningioma, no tumour and pituitary tumour, explains, records every answer
before it is given, and collects what readers say of it.

**{RESEARCH_NOTICE}** Every answer carries this in the header `X-Research-Use-Only`.

Errors are problem documents (RFC 9457): `title`, `detail` (what and why) and `fix`.
"""
_SANDBOX = {
    # The page holds names that came with the data. They are escaped; should one slip through, nothing of it runs.
    "Content-Security-Policy": "sandbox; default-src 'none'; img-src data:; style-src 'unsafe-inline'",
    "X-Content-Type-Options": "nosniff",
}
_UPLOAD = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file"],
                "properties": {"file": {"type": "string", "format": "binary", "description": ", ".join(FORMATS)}},
            }
        },
        "image/*": {"schema": {"type": "string", "format": "binary"}},
        "application/dicom": {"schema": {"type": "string", "format": "binary"}},
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
    },
}


class FeedbackRequest(BaseModel):
    """A reader's verdict; `label` with `correct`, always and only."""

    model_config = ConfigDict(extra="forbid")

    verdict: Verdict
    label: Label | None = None
    reader: Reader = Field(description="Who says so; a second verdict by the same reader replaces the first")


class Ready(BaseModel):
    """What the readiness probe looked at."""

    status: str
    checks: dict[str, str] = Field(description="part -> ok, or what is wrong with it")


class _Threads:
    """A few threads for blocking work, and an end to waiting for them.

    Work that is still queued when its request gives up is dropped, so a backlog does not outlive its clients.
    """

    def __init__(self, count: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=name)

    async def run(self, function: Callable[..., T], *args: Any, seconds: float = ANSWER_SECONDS) -> T:
        """`function(*args)`. Raises `Unavailable` after `seconds`."""
        work = asyncio.get_running_loop().run_in_executor(self._pool, function, *args)
        try:
            return await asyncio.wait_for(work, seconds)
        except TimeoutError:
            raise Unavailable(
                "The answer took too long",
                why=f"the store, the database or a free thread could not be had within {seconds:.0f} s",
                fix="try again shortly",
            ) from None

    def close(self) -> None:
        """Drop what is queued; running work ends by its own time limits."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def create_app(services: bootstrap.Services) -> FastAPI:
    """The API on these services; its lifespan watches the registry for the champion."""
    metrics = Metrics()
    champion = Champion(services, metrics)
    service = inference.InferenceService(services, champion, metrics)
    # Apart from one another: slow predictions delay neither the other pages nor the probes.
    predicting = _Threads(PREDICTING_THREADS, "predict")
    asking = _Threads(8, "ask")
    probing = _Threads(4, "probe")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        champion.start()
        service.decoder.warm()
        yield
        await asyncio.to_thread(champion.stop)
        await asyncio.to_thread(service.decoder.close)
        for threads in (predicting, asking, probing):
            threads.close()

    app = FastAPI(title="NeuroLoop", version=__version__, description=_DESCRIPTION, lifespan=lifespan)
    upload_limit = services.settings.max_upload_bytes + intake.ENVELOPE_BYTES
    app.add_middleware(
        intake.BodyLimit,
        limit=lambda path: upload_limit if path == "/v1/predictions" else intake.ENVELOPE_BYTES,
    )
    app.add_middleware(RequestLog, metrics=metrics)
    problems.install(app)

    @app.post(
        "/v1/predictions",
        status_code=201,
        tags=["predictions"],
        openapi_extra={"requestBody": _UPLOAD},
        responses=problems.responses(400, 408, 413, 415, 422, 503),
        response_model=inference.Answer,
    )
    async def predict(request: Request, frame: Frame = None) -> Any:
        """Classify one slice. 422 where the gate does not take it for a brain MRI; the problem says why."""
        data = await intake.read_image(request)
        answer = await predicting.run(service.predict, data, frame)
        request.state.prediction, request.state.version = answer.id, answer.model_version
        if isinstance(answer, inference.Answer):
            return JSONResponse(answer.model_dump(mode="json"), 201, {"Location": f"/v1/predictions/{answer.id}"})
        return problems.problem(
            422,
            "not-a-brain-mri",
            "The image is not taken for a brain MRI",
            answer.gate.reason,
            "upload one slice of a brain MRI; if this is one, say so with feedback on this id",
            id=answer.id,
            gate=answer.gate.model_dump(mode="json"),
            model_version=answer.model_version,
            frames=answer.frames,
            frame=answer.frame,
        )

    @app.get("/v1/predictions/{prediction_id}", tags=["predictions"], responses=problems.responses(404, 503))
    async def prediction(prediction_id: str) -> inference.RecordedPrediction:
        """One recorded prediction with its feedback."""
        return await asking.run(service.prediction, prediction_id)

    @app.get(
        "/v1/predictions/{prediction_id}/image",
        tags=["predictions"],
        response_class=Response,
        responses=problems.responses(404, 503) | {200: {"content": {"image/png": {}}}},
    )
    async def image(prediction_id: str) -> Response:
        """The image of one prediction, as the platform read it: grey, without metadata."""
        return Response(await asking.run(service.image, prediction_id), media_type="image/png")

    @app.post(
        "/v1/predictions/{prediction_id}/feedback", tags=["feedback"], responses=problems.responses(404, 413, 422, 503)
    )
    async def feedback(prediction_id: str, said: FeedbackRequest) -> inference.FeedbackReceipt:
        """Agree with a prediction, correct it, or say that you are not sure or that it shows no brain."""
        return await asking.run(service.give_feedback, prediction_id, said.verdict, said.label, said.reader)

    @app.get("/v1/model", tags=["models"], responses=problems.responses(503))
    async def model() -> inference.ServedModel:
        """The model that answers."""
        return service.model()

    @app.get("/v1/model/card", tags=["models"], responses=problems.responses(404, 503))
    async def card() -> inference.ServedCard:
        """The model card of the model that answers: Markdown for people, and all its figures."""
        return service.card()

    @app.get(
        "/v1/data/audit",
        tags=["data"],
        response_class=Response,
        responses=problems.responses(404, 503) | {200: {"content": {"text/html": {}}}},
    )
    async def audit_page() -> Response:
        """What the audit found in the data of the model that answers, as one page for people."""
        page = await asking.run(lambda: service.audit(page=True))
        return Response(page, media_type="text/html; charset=utf-8", headers=_SANDBOX)

    @app.get(
        "/v1/data/audit.json",
        tags=["data"],
        response_class=Response,
        responses=problems.responses(404, 503) | {200: {"content": {"application/json": {}}}},
    )
    async def audit_document() -> Response:
        """The same for programs; `definitions` in it says what each figure means."""
        return Response(await asking.run(lambda: service.audit(page=False)), media_type="application/json")

    @app.get("/v1/models", tags=["models"], responses=problems.responses(503))
    async def models() -> inference.Models:
        """All registered versions, and the ledger of promotions with their reasons."""
        return await asking.run(service.models)

    @app.get("/v1/monitoring", tags=["monitoring"], responses=problems.responses(503))
    async def monitoring() -> Monitoring:
        """Live figures over all recorded predictions."""
        return await asking.run(service.monitoring)

    @app.get("/v1/mails", tags=["monitoring"], responses=problems.responses(503))
    async def mails() -> list[Mail]:
        """What the platform sent, where the local mail sink is used; newest first."""
        return await asking.run(service.mails)

    @app.get("/health/live", tags=["health"])
    async def live() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "live"}

    @app.get("/health/ready", tags=["health"], responses=problems.responses(503))
    async def ready() -> Ready:
        """Whether a prediction would be answered: database, store and model, each by name."""

        async def look(check: Callable[[], object]) -> str:
            try:
                await probing.run(check, seconds=CHECK_SECONDS)
            except NeuroLoopError as error:
                return str(error)
            except Exception:
                _LOG.exception("a readiness check failed unexpectedly")
                return "unexpected fault, see the server's log"
            return "ok"

        parts = {"database": service.check_database, "store": service.check_store, "model": service.check_model}
        checks = dict(zip(parts, await asyncio.gather(*map(look, parts.values())), strict=True))
        missing = [part for part, state in checks.items() if state != "ok"]
        if not missing:
            return Ready(status="ready", checks=checks)
        return problems.problem(  # type: ignore[return-value]
            503,
            "not-ready",
            "The service is not ready",
            f"Not usable: {', '.join(missing)}",
            "see checks",
            checks=checks,
        )

    @app.get("/metrics", tags=["health"], response_class=Response)
    async def prometheus() -> Response:
        """Figures for Prometheus."""
        return Response(metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    problems.document(app)
    return app


def app() -> FastAPI:
    """The API of the current settings; the factory that uvicorn calls."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    for chatty in ("urllib3.connectionpool", "httpx"):  # each of their retries would be a line; the metric counts them
        logging.getLogger(chatty).setLevel(logging.ERROR)
    services = bootstrap.services()
    services.settings.require("database_url")
    return create_app(services)
