"""The two routes that Amazon SageMaker asks of a container, beside those of the API.

SageMaker lets nobody in whom IAM does not, and passes no header of the caller on, so with the setting `SAGEMAKER` these
take no key (`access.MANAGED`). It gives `GET /ping` two seconds, and a prediction sixty.
"""

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Annotated, Any

from fastapi import FastAPI, Header, Request, Response
from fastapi.responses import JSONResponse

from neuroloop.core.errors import Busy
from neuroloop.core.schemas import Consent
from neuroloop.core.settings import Settings
from neuroloop.serving import inference, intake, problems
from neuroloop.serving.access import caller_of
from neuroloop.serving.readiness import Readiness

PING_SECONDS = 1.5
Run = Callable[..., Coroutine[Any, Any, Any]]
"""Runs work on an upload in a thread: `await run(work, data)`."""
Attributes = Annotated[
    Consent | None,
    Header(
        alias="X-Amzn-SageMaker-Custom-Attributes",
        description="The consent, as in X-Consent: the one header of a caller that SageMaker passes on",
    ),
]


def install(
    app: FastAPI,
    settings: Settings,
    service: inference.InferenceService,
    *,
    run: Run,
    ready: Readiness,
    upload: dict[str, Any],
) -> None:
    """Give `app` both routes; `upload` is OpenAPI's description of a body that is an image."""

    @app.get("/ping", tags=["health"], response_class=Response, responses=problems.responses(503))
    async def ping() -> Response:
        """Whether a prediction would be answered: 200 without a body, else 503; see `GET /health/ready`."""
        try:
            faults = await asyncio.wait_for(ready.faults(), PING_SECONDS)
        except TimeoutError:
            raise Busy("not ready", why=f"this could not be told within {PING_SECONDS} s") from None
        if faults:
            raise Busy("not ready", why=f"not usable: {', '.join(faults)}")
        return Response(status_code=200)

    @app.post(
        "/invocations",
        tags=["predictions"],
        openapi_extra={"requestBody": upload},
        responses=problems.responses(400, 408, 410, 413, 415, 422, 503, 507),
        response_model=inference.Answer,
    )
    async def invocations(request: Request, consent: Attributes = None) -> Any:
        """Classify one slice, as `POST /v1/predictions` does."""
        agreed = intake.consent(consent, settings)
        data = await intake.read_image(request)
        answer = await run(partial(service.predict, data, owner=caller_of(request).name, consent=agreed), data)
        request.state.prediction, request.state.version = answer.id, answer.model_version
        if isinstance(answer, inference.Answer):
            return JSONResponse(answer.model_dump(mode="json"))
        return problems.refusal(answer)
