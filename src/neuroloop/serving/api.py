"""The inference API; `neuroloop.serving.server` starts it."""

import asyncio
import contextlib
import contextvars
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Header, Query, Request, Response
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from neuroloop import __version__, bootstrap
from neuroloop.core import logs
from neuroloop.core.credentials import Role
from neuroloop.core.errors import Unavailable
from neuroloop.core.schemas import (
    RESEARCH_NOTICE,
    Consent,
    Erasure,
    ErasureReason,
    Label,
    Mail,
    Monitoring,
    Promotion,
    Verdict,
)
from neuroloop.imaging import decode
from neuroloop.serving import (
    access,
    admission,
    batch,
    headers,
    inference,
    intake,
    keyring,
    loop_metrics,
    problems,
    rollback,
    sagemaker,
)
from neuroloop.serving.access import caller_of
from neuroloop.serving.champion import Champion
from neuroloop.serving.metrics import Metrics
from neuroloop.serving.origin import is_local
from neuroloop.serving.readiness import CHECK_SECONDS, Readiness
from neuroloop.serving.request_log import RequestLog

ANSWER_SECONDS = 12.0
"""Longest wait of a request for a thread, the store and the database together; then it is a 503."""
UPLOADS_TOGETHER = 20
"""As many of the largest uploads may be held in memory at once, those of batches included."""
CHAMPION_SECONDS = 45.0
"""Longest wait of a person who moves the champion until its bundle is fetched and verified; later it is not moved."""
MOVING_SECONDS = 12.0
"""Longest wait for the move itself. Both together are less than the frontend waits."""
PREDICTING_THREADS = 4
"""Predictions at a time of plain uploads. Others have places of their own, as many as images are decoded at a time: a
few slow files must not keep all threads. That bounds memory too, for 40 megapixels take 500 MB while worked on."""

_LOG = logging.getLogger(__name__)
T = TypeVar("T")
Reader = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f]+$")
]
IdempotencyKey = Annotated[
    str,
    Header(
        alias="Idempotency-Key",
        max_length=255,
        pattern=r"^[!-~]*$",
        description="Any text of your own, new for each upload, such as a uuid. A repeat with the same key, be it "
        "after a time-out or at once, gets the same prediction and the same answer; another upload with it is a 422",
    ),
]
LatestAudit = Annotated[
    bool, Query(description="Of the data that was audited last, whether or not a model was made of it")
]
StatedConsent = Annotated[
    Consent | None,
    Header(
        alias="X-Consent",
        description="To what the person the image is of, or who answers for it, agreed: `training`: it may be kept "
        "and, once corrected, trained on; `record`: it may be kept, never trained on; `unstated`: nothing is said; "
        "`simulated`: it is of nobody, and only models of simulated scans may learn from it",
    ),
]
ShownImages = Annotated[bool, Query(description="Whether the answer holds the image and the heat map")]
Frame = Annotated[
    int | None,
    Query(ge=1, le=2**31 - 1, description="Frame, slice or page to read, from 1; the middle one where none is named"),
]

_DESCRIPTION = f"""
Classifies slices of brain MRI into glioma, meningioma, no tumour and pituitary tumour, explains, records every answer
before it is given, and collects what readers say of it.

**{RESEARCH_NOTICE}** Every answer carries this in the header `X-Research-Use-Only`.

Every call but health and these pages takes an API key (`Authorization: Bearer nl_...`), whose role decides what it may.

Errors are problem documents (RFC 9457): `title`, `detail` (what and why) and `fix`.
"""
_SANDBOX = {
    # The page holds names that came with the data. They are escaped; should one slip through, nothing of it runs.
    "Content-Security-Policy": "sandbox; default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    "frame-ancestors 'none'",
}
_BATCH = "/v1/predictions:batch"
_PREDICTING = ("/v1/predictions", _BATCH, "/invocations")
_UPLOAD = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file"],
                "properties": {
                    "file": {"type": "string", "format": "binary", "description": ", ".join(decode.FORMATS)}
                },
            }
        },
        "image/*": {"schema": {"type": "string", "format": "binary"}},
        "application/dicom": {"schema": {"type": "string", "format": "binary"}},
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
    },
}


_WHO = "Who says so: the holder of the key, nobody else; only the frontend's key may name another"


class FeedbackRequest(BaseModel):
    """A reader's verdict; `label` with `correct`, always and only."""

    model_config = ConfigDict(extra="forbid")

    verdict: Verdict
    label: Label | None = None
    reader: Reader | None = Field(
        default=None,
        description=f"{_WHO}. A second verdict by the same reader replaces the first",
    )


class KeyRequest(BaseModel):
    """Who gets a key, and what for."""

    model_config = ConfigDict(extra="forbid")

    name: Reader = Field(description="The person or program; verdicts and uploads made with it carry this name")
    role: Role
    days: float | None = Field(
        default=None, gt=0, le=keyring.MOST_DAYS, description="It expires after this; null: never"
    )


class ChampionRequest(BaseModel):
    """Who makes a version the champion, and why; both stand in the ledger."""

    model_config = ConfigDict(extra="forbid")

    by: Reader | None = Field(default=None, description=_WHO)
    reason: Annotated[Reader, Field(max_length=500)]


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
        context = contextvars.copy_context()  # so that lines logged there name the request
        work = asyncio.get_running_loop().run_in_executor(self._pool, partial(context.run, function, *args))
        try:
            return await asyncio.wait_for(work, seconds)
        except TimeoutError:
            raise admission.too_slow(seconds) from None

    def close(self) -> None:
        """Drop what is queued; running work ends by its own time limits."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def create_app(services: bootstrap.Services, *, first_key: str = "") -> FastAPI:
    """The API on these services; its lifespan watches the registry for the champion.

    `first_key` is an admin's key that gets in beside those of the database; empty: `UI_API_KEY` of the settings.
    """
    metrics = Metrics()
    champion = Champion(services, metrics)
    service = inference.InferenceService(services, champion, metrics)
    loop = loop_metrics.LoopMetrics(services, metrics)
    # Apart from one another: slow predictions delay neither the other pages nor the probes.
    cores = len(os.sched_getaffinity(0))
    predicting = admission.Places(PREDICTING_THREADS, "predict", in_a_crowd=1 + cores)
    reading = admission.Places(services.settings.decode_workers, "read")
    asking = _Threads(8, "ask")
    reporting = _Threads(2, "report")  # sums over a month: many open pages must not take all database connections
    registry = _Threads(3, "registry")  # a registry that hangs must not keep verdicts and erasures waiting
    probing = _Threads(4, "probe")
    parts = {"database": service.check_database, "store": service.check_store, "model": service.check_model}
    readiness = Readiness(probing.run, parts)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        champion.start()
        service.decoder.warm()
        yield
        await asyncio.to_thread(champion.stop)
        await asyncio.to_thread(service.decoder.close)
        for places in (predicting, reading):
            places.close()
        for threads in (asking, reporting, registry, probing):
            threads.close()

    async def run(work: Callable[[], T], data: bytes, *, patient: bool = False) -> T:
        """`work()` in a thread of those that suit the upload."""
        places = predicting if decode.is_plain(data) else reading
        return await places.run(work, seconds=ANSWER_SECONDS, patient=patient)

    app = FastAPI(
        title="NeuroLoop",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # below, with headers of its own
        redoc_url=None,
        redirect_slashes=False,  # the way there would be the client's words: another host, and http behind a proxy
    )
    upload_limit = services.settings.max_upload_bytes + intake.ENVELOPE_BYTES
    door = access.Access(
        lambda: services.keys,
        first=first_key or services.settings.ui_api_key,
        scraper=services.settings.metrics_key,
        per_minute=services.settings.rate_limit,
        strangers_per_minute=services.settings.rate_limit_strangers,
    )
    managed = services.settings.sagemaker
    app.add_middleware(access.Guard, access=door, routes=lambda: app.routes, managed=managed)
    app.add_middleware(
        intake.BodyLimit,
        limit=lambda path: {
            "/v1/predictions": upload_limit,
            _BATCH: upload_limit * batch.BODY_UPLOADS,
            "/invocations": upload_limit,
        }.get(path, intake.ENVELOPE_BYTES),
        together=upload_limit * UPLOADS_TOGETHER,
        holder=access.holder,
    )
    app.add_middleware(
        admission.Door,
        places=predicting,
        paths=frozenset(_PREDICTING),
        patient=frozenset({_BATCH}),
        expected=lambda scope: (managed and f"POST {scope['path']}" in access.MANAGED) or door.knows(scope),
    )
    app.add_middleware(RequestLog, metrics=metrics)
    app.add_middleware(headers.SecurityHeaders)
    problems.install(app)

    @app.post(
        "/v1/predictions",
        status_code=201,
        tags=["predictions"],
        openapi_extra={"requestBody": _UPLOAD},
        responses=problems.responses(400, 408, 410, 413, 415, 422, 503, 507),
        response_model=inference.Answer,
    )
    async def predict(
        request: Request,
        frame: Frame = None,
        key: IdempotencyKey = "",
        consent: StatedConsent = None,
        images: ShownImages = True,
    ) -> Any:
        """Classify one slice. 422 where the gate does not take it for a brain MRI; the problem says why."""
        agreed = intake.consent(consent, services.settings)
        data = await intake.read_image(request)
        owner = caller_of(request).name
        ask = partial(service.predict, data, frame=frame, owner=owner, consent=agreed, request=key, images=images)
        answer = await run(ask, data)
        request.state.prediction, request.state.version = answer.id, answer.model_version
        if isinstance(answer, inference.Answer):
            where = {"Location": f"/v1/predictions/{answer.id}"}
            return Response(answer.model_dump_json(), 201, where, media_type="application/json")
        return problems.refusal(answer)

    @app.post(
        _BATCH,
        tags=["predictions"],
        openapi_extra={"requestBody": batch.REQUEST_BODY},
        responses=problems.responses(400, 408, 413, 415, 422, 503, 507),
        response_model=batch.BatchAnswer,
    )
    async def predict_batch(
        request: Request, key: IdempotencyKey = "", consent: StatedConsent = None, images: ShownImages = True
    ) -> Any:
        """Classify several slices: one item each in their order, an answer or a problem."""
        agreed = intake.consent(consent, services.settings)
        files, owner = await batch.read_files(request), caller_of(request).name

        async def ask(index: int, data: bytes) -> inference.Answer | inference.Rejection:
            one = f"{key} {index}" if key else ""
            part = partial(service.predict, data, owner=owner, consent=agreed, request=one, images=images)
            said = await run(part, data, patient=True)
            fields = {logs.PREDICTION: said.id, logs.MODEL: said.model_version}
            _LOG.info("file %d of a batch is prediction %s, by version %s", index + 1, *fields.values(), extra=fields)
            return said

        return await batch.answer(files, ask)

    @app.get("/v1/predictions/{prediction_id}", tags=["predictions"], responses=problems.responses(404, 410, 503))
    async def prediction(prediction_id: str, request: Request) -> inference.RecordedPrediction:
        """One recorded prediction with its feedback; an uploader sees their own only."""
        return await asking.run(service.prediction, prediction_id, caller_of(request).sees_only)

    @app.delete("/v1/predictions/{prediction_id}", tags=["predictions"], responses=problems.responses(404, 422, 503))
    async def erase(
        request: Request,
        response: Response,
        prediction_id: str,
        reason: ErasureReason,
        by: Annotated[Reader | None, Query(description=_WHO)] = None,
    ) -> Erasure:
        """Erase a prediction for good: image, corrected copy, row, verdicts, and every future training on it.

        What stays is a mark without content. A repeat returns the same mark; 202 where it is not all gone yet and the
        platform finishes by itself.
        """
        who = caller_of(request).speaks_as(by)
        mark = await asking.run(partial(service.erase, prediction_id, reason=reason, by=who))
        response.status_code = 200 if mark.finished_at else 202
        return mark

    @app.get(
        "/v1/predictions/{prediction_id}/image",
        tags=["predictions"],
        response_class=Response,
        responses=problems.responses(404, 410, 503) | {200: {"content": {"image/png": {}}}},
    )
    async def image(prediction_id: str, request: Request) -> Response:
        """The image of one prediction, as the platform read it: grey, without metadata."""
        png = await asking.run(service.image, prediction_id, caller_of(request).sees_only)
        return Response(png, media_type="image/png")

    @app.post(
        "/v1/predictions/{prediction_id}/feedback",
        tags=["feedback"],
        responses=problems.responses(404, 408, 410, 413, 422, 503, 507),
    )
    async def feedback(prediction_id: str, said: FeedbackRequest, request: Request) -> inference.FeedbackReceipt:
        """Agree with a prediction, correct it, or say that you are not sure or that it shows no brain."""
        reader = caller_of(request).speaks_as(said.reader)
        return await asking.run(service.give_feedback, prediction_id, said.verdict, said.label, reader)

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
    async def audit_page(latest: LatestAudit = False) -> Response:
        """What the audit found in the data of the model that answers, as one page for people."""
        page = await asking.run(lambda: service.audit(page=True, latest=latest))
        return Response(page, media_type="text/html; charset=utf-8", headers=_SANDBOX)

    @app.get(
        "/v1/data/audit.json",
        tags=["data"],
        response_class=Response,
        responses=problems.responses(404, 503) | {200: {"content": {"application/json": {}}}},
    )
    async def audit_document(latest: LatestAudit = False) -> Response:
        """The same for programs; `definitions` in it says what each figure means."""
        document = await asking.run(lambda: service.audit(page=False, latest=latest))
        return Response(document, media_type="application/json")

    @app.get("/v1/models", tags=["models"], responses=problems.responses(503))
    async def models() -> inference.Models:
        """All registered versions, and the ledger of promotions with their reasons."""
        return await registry.run(service.models)

    @app.post(
        "/v1/models/{version}/champion", tags=["models"], responses=problems.responses(404, 408, 409, 413, 422, 503)
    )
    async def make_champion(version: str, said: ChampionRequest, request: Request) -> Promotion:
        """Make a registered version the champion, by hand: as a rule to go back to the one before.

        It is verified first; every server follows within seconds. The answer is the ledger's new row.
        """
        who = caller_of(request).speaks_as(said.by)
        until = time.monotonic() + CHAMPION_SECONDS
        leaving = asyncio.ensure_future(request.receive())  # behind the body comes only the end of the connection
        move = partial(
            rollback.make_champion,
            services,
            version,
            by=who,
            reason=said.reason,
            wanted=lambda: not leaving.done() and time.monotonic() < until,
        )
        try:
            return await registry.run(move, seconds=CHAMPION_SECONDS + MOVING_SECONDS)
        finally:
            leaving.cancel()

    @app.get("/v1/monitoring", tags=["monitoring"], responses=problems.responses(503))
    async def monitoring() -> Monitoring:
        """Live figures of the last 30 days, and how many corrections wait, however old."""
        return await reporting.run(service.monitoring)

    @app.get("/v1/mails", tags=["monitoring"], responses=problems.responses(503))
    async def mails() -> list[Mail]:
        """What the platform sent, where the local mail sink is used; newest first."""
        return await asking.run(service.mails)

    @app.get("/v1/me", tags=["access"], responses=problems.responses(503))
    async def me(request: Request) -> access.Caller:
        """Whose key this is, and what it may."""
        return caller_of(request)

    @app.get("/v1/keys", tags=["access"], responses=problems.responses(503))
    async def keys() -> list[keyring.KeyShown]:
        """All keys, newest first, those no longer valid included."""
        return await asking.run(lambda: keyring.listed(services.keys))

    @app.post("/v1/keys", status_code=201, tags=["access"], responses=problems.responses(408, 413, 422, 503))
    async def make_key(asked: KeyRequest, request: Request) -> keyring.KeyMade:
        """Make a key. The answer shows it this once."""
        by = caller_of(request).name
        return await asking.run(lambda: keyring.create(services.keys, asked.name, asked.role, days=asked.days, by=by))

    @app.delete("/v1/keys/{key_id}", tags=["access"], responses=problems.responses(404, 503))
    async def revoke_key(key_id: str, request: Request) -> keyring.KeyShown:
        """Make a key worthless: here at once, on other servers within seconds."""
        by = caller_of(request).name
        revoked = await asking.run(lambda: keyring.revoke(services.keys, key_id, by=by))
        door.forget(key_id)
        return revoked

    @app.get("/docs", include_in_schema=False, response_class=HTMLResponse)
    async def docs() -> HTMLResponse:
        """These routes, to read and to try."""
        return headers.docs_page("NeuroLoop")

    @app.get("/health/live", tags=["health"])
    async def live() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "live"}

    @app.get("/health/ready", tags=["health"], responses=problems.responses(503))
    async def ready(request: Request) -> Ready:
        """Whether a prediction would be answered: database, store and model, each by name.

        What is wrong with one is told in words only on the machine itself: the words name hosts and folders.
        """
        faults = await readiness.faults()
        hidden = "" if is_local(request) else "not usable, see the server's log"
        checks = dict.fromkeys(parts, "ok") | {part: hidden or fault for part, fault in faults.items()}
        if not faults:
            return Ready(status="ready", checks=checks)
        return problems.problem(  # type: ignore[return-value]
            503,
            "not-ready",
            "The service is not ready",
            f"Not usable: {', '.join(faults)}",
            "see checks",
            checks=checks,
        )

    @app.get("/metrics", tags=["health"], response_class=Response)
    async def prometheus() -> Response:
        """Figures for Prometheus: of this server, and of the loop as the database has them."""
        with contextlib.suppress(Unavailable):  # the figures of this server are worth having all the same
            await reporting.run(loop.refresh, seconds=CHECK_SECONDS)
        return Response(metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    sagemaker.install(app, services.settings, service, run=run, ready=readiness, upload=_UPLOAD)
    access.document(app)
    problems.document(app)
    access.allow_head(app)
    return app


def app() -> FastAPI:
    """The API of the current settings; the factory that uvicorn calls."""
    services = bootstrap.services()
    logs.configure(services.settings.log_format, "api")
    services.settings.require("database_url")
    return create_app(services)
