"""The inference API over HTTP: one method a route, answers as records, every failure one `ApiProblem` in words."""

import copy
import logging
import secrets
import time
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
from pydantic import Base64Bytes, BaseModel, ConfigDict, ValidationError

from neuroloop.core import logs
from neuroloop.core.credentials import Role
from neuroloop.core.schemas import ExplainedGate, Feedback, Mail, ModelVersion, Monitoring, Promotion, Verdict

Record = TypeVar("Record", bound=BaseModel)
_LOG = logging.getLogger("neuroloop.frontend.api_client")


class ApiProblem(Exception):
    """A request that brought no answer: what happened, why, and how to mend it. `status` is 0 where nobody answered."""

    def __init__(
        self,
        title: str,
        *,
        detail: str = "",
        fix: str = "",
        status: int = 0,
        gate: ExplainedGate | None = None,
        prediction_id: str = "",
        frames: int = 1,
        frame: int = 1,
        request_id: str = "",
    ) -> None:
        self.title, self.detail, self.fix = title, detail, fix
        self.status, self.gate, self.prediction_id = status, gate, prediction_id
        self.frames, self.frame = frames, frame
        self.request_id = request_id
        super().__init__(title)

    @property
    def passing(self) -> bool:
        """Whether the same request may succeed later: nobody answered, or the service could not for now.

        To send it again is safe: a prediction has its key, a verdict replaces itself.
        """
        return self.status in (0, 408, 429, 500, 502, 503, 504, 507)


class _Answer(BaseModel):
    """An answer of the API: fields that a newer API adds are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class _Prediction(_Answer):
    """What the API says of a prediction both at once and later."""

    id: str
    probabilities: dict[str, float]
    gate: ExplainedGate
    model_version: str
    data_version: str
    simulated_model: bool
    seconds: float
    width: int
    height: int
    prediction_sets: dict[str, tuple[str, ...]] = {}
    refer: bool = False
    refer_reason: str = ""


class Answer(_Prediction):
    """What `POST /v1/predictions` says of an accepted image. `image` and `heatmap` are grey PNGs of one frame."""

    label: str
    tumour: bool
    image: Base64Bytes
    heatmap: Base64Bytes | None = None
    frames: int = 1
    frame: int = 1


class Recorded(_Prediction):
    """What `GET /v1/predictions/{id}` says; `label` is None for an image that the gate refused."""

    label: str | None
    created_at: datetime
    owner: str = ""
    consent: str = "unstated"
    feedback: tuple[Feedback, ...] = ()


class Receipt(_Answer):
    """What the API noted of a reader's verdict."""

    prediction_id: str
    verdict: Verdict
    label: str | None = None
    corrections_waiting: int
    may_train: bool = True


class Champion(_Answer):
    """The model that answers now."""

    version: str
    data_version: str
    simulated: bool
    image_size: int
    metrics: dict[str, float] = {}
    loaded_at: datetime | None = None


class Card(_Answer):
    """The model card of the model that answers now."""

    version: str
    markdown: str


class Models(_Answer):
    """All registered versions and the promotion ledger, both newest first."""

    versions: tuple[ModelVersion, ...] = ()
    promotions: tuple[Promotion, ...] = ()
    mlflow_url: str = ""


class Me(_Answer):
    """Whose key it is."""

    name: str
    role: Role
    delegate: bool = False


@dataclass(frozen=True)
class Identity:
    """A key, and where it is the frontend's own, the person it is used for."""

    key: str
    person: str = ""
    role: str = ""

    def headers(self) -> dict[str, str]:
        """What a request in this identity carries."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        if self.person:
            headers |= {"X-NeuroLoop-Person": quote(self.person), "X-NeuroLoop-Role": self.role}
        return headers


class ApiClient:
    """One pooled HTTP client of the API at `url`; thread-safe, shared by all browser sessions.

    It knows nobody: `acting_for` gives the same client in somebody's name.
    """

    def __init__(self, url: str, *, read_seconds: float = 60.0) -> None:
        self.url = url
        # trust_env=False: a proxy meant for the internet must not stand between two parts of one platform.
        self._headers: dict[str, str] = {}
        self._http = httpx.Client(base_url=url, timeout=httpx.Timeout(read_seconds, connect=3.0), trust_env=False)

    def acting_for(self, identity: Identity) -> "ApiClient":
        """This client, asking as `identity`; the connections are shared."""
        acting = copy.copy(self)
        acting._headers = identity.headers()
        return acting

    def prediction(self, prediction_id: str) -> Recorded:
        """One recorded prediction and what readers have said of it."""
        return self._read(Recorded, self._send("GET", f"/v1/predictions/{quote(prediction_id, safe='')}"))

    def image(self, prediction_id: str) -> bytes:
        """The image of a prediction as the platform read it: a grey PNG."""
        return self._respond("GET", f"/v1/predictions/{prediction_id}/image").content

    def me(self) -> Me:
        """Whom the API takes us for."""
        return self._read(Me, self._send("GET", "/v1/me"))

    def predict(
        self, data: bytes, media_type: str, *, frame: int | None = None, key: str = "", consent: str = "unstated"
    ) -> Answer:
        """Classify one image, or the named frame of it; with `key`, a repeat gets the same answer and no second record.

        The reader's file name stays here: it may name a patient.
        """
        headers = {"X-Consent": consent} | ({"Idempotency-Key": key} if key else {})
        files, chosen = {"file": ("upload", data, media_type)}, {} if frame is None else {"frame": frame}
        with logs.about(trace__id=secrets.token_hex(16)):
            sent = self._send("POST", "/v1/predictions", files=files, params=chosen, headers=headers)
            answer = self._read(Answer, sent)
            fields = {logs.PREDICTION: answer.id, logs.MODEL: answer.model_version}
            _LOG.info("prediction %s, by version %s", *fields.values(), extra=fields)
        return answer

    def feedback(self, prediction_id: str, verdict: Verdict, label: str | None = None) -> Receipt:
        """Record the verdict of whoever this client acts for; a later one of theirs replaces it."""
        body = {"verdict": str(verdict)} | ({"label": label} if label else {})
        return self._read(Receipt, self._send("POST", f"/v1/predictions/{prediction_id}/feedback", json=body))

    def champion(self) -> Champion:
        """The model that answers now; a problem with status 503 where there is none yet."""
        return self._read(Champion, self._send("GET", "/v1/model"))

    def card(self) -> Card | None:
        """The card of the model that answers now; None where it has none."""
        try:
            return self._read(Card, self._send("GET", "/v1/model/card"))
        except ApiProblem as fault:
            if fault.status in (404, 503):
                return None
            raise

    def audit_page(self, *, latest: bool = False) -> str:
        """What the audit found in the data of the model that answers now: a whole HTML page without scripts.

        With `latest`, in the data that was audited last.
        """
        return self._respond("GET", "/v1/data/audit", params={"latest": latest}).text

    def models(self) -> Models:
        """Versions, ledger and where MLflow shows them."""
        return self._read(Models, self._send("GET", "/v1/models"))

    def make_champion(self, version: str, reason: str) -> Promotion:
        """Make a version the champion in the name of whoever this client acts for; the ledger's row."""
        said = {"reason": reason}
        return self._read(Promotion, self._send("POST", f"/v1/models/{version}/champion", json=said))

    def monitoring(self) -> Monitoring:
        """Live figures."""
        return self._read(Monitoring, self._send("GET", "/v1/monitoring"))

    def mails(self) -> list[Mail]:
        """The mails the local sink kept, newest first."""
        answer = self._send("GET", "/v1/mails")
        return [self._read(Mail, mail) for mail in answer]

    def _send(self, method: str, path: str, **request: Any) -> Any:
        try:
            return self._respond(method, path, **request).json()
        except ValueError:
            raise self._unreadable() from None

    def _respond(
        self, method: str, path: str, *, headers: dict[str, str] | None = None, **request: Any
    ) -> httpx.Response:
        """One request and one line about it, which the API's own line shares `trace.id` and `http.request.id` with."""
        trace = logs.bound(logs.TRACE) or secrets.token_hex(16)
        started, response = time.perf_counter(), None
        try:
            response = self._request(
                method, path, (headers or {}) | {"traceparent": f"00-{trace}-{secrets.token_hex(8)}-01"}, **request
            )
        finally:
            status = response.status_code if response is not None else 0
            fields: dict[str, Any] = {
                "event.action": "call",
                "event.outcome": "failure" if status == 0 or status >= 500 else "success",
                "event.duration": round((time.perf_counter() - started) * 1e9),
                "http.request.method": method,
                "http.response.status_code": status,
                logs.TRACE: trace,
            }
            if response is not None:
                fields[logs.REQUEST] = response.headers.get("X-Request-Id", "")
            _LOG.info("%s to the API: %s", method, status or "no answer", extra=fields)
        if response.is_error:
            raise _problem(response)
        return response

    def _request(self, method: str, path: str, headers: dict[str, str], **request: Any) -> httpx.Response:
        try:
            return self._http.request(method, path, headers=self._headers | headers, **request)
        except httpx.ConnectError:
            raise ApiProblem(
                "The inference service cannot be reached",
                detail=f"Nothing answers at {self.url}. It may still be starting, or it has stopped.",
                fix="Wait a moment and try again. If it stays like this, run `make status`, then `make up`.",
            ) from None
        except httpx.TimeoutException:
            raise ApiProblem(
                "The inference service takes too long",
                detail=f"{self.url} did not answer in time. It may be busy, for instance with a training run.",
                fix="Try again in a minute. `make status` shows whether all parts run.",
            ) from None
        except httpx.HTTPError:
            raise ApiProblem(
                "The connection to the inference service broke off",
                detail=f"{self.url} ended the connection before its answer was complete.",
                fix="Try again.",
            ) from None

    def _read(self, record: type[Record], answer: Any) -> Record:
        try:
            return record.model_validate(answer, extra="ignore")  # a newer API may say more
        except ValidationError:
            raise self._unreadable() from None

    def _unreadable(self) -> ApiProblem:
        return ApiProblem(
            "The answer of the inference service cannot be read",
            detail=f"What {self.url} answered does not have the expected fields.",
            fix="Check that NEUROLOOP_API_URL names the NeuroLoop API, and that frontend and API are of one version.",
            status=200,
        )


_OWN_KEY = {"title": "Your key is no longer valid", "detail": "It was revoked, or has expired", "fix": "Sign in again"}
_FRONTENDS_KEY = {
    "title": "The frontend's own key is not accepted",
    "detail": "The inference service does not know the key that this frontend asks it with",
    "fix": "Tell the operator: NEUROLOOP_UI_API_KEY has to be the same for both",
}


def _problem(response: httpx.Response) -> ApiProblem:
    """A problem document (RFC 9457) as `ApiProblem`; any other error body gives only its status."""
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict) or "title" not in body:
        body = {"title": f"The inference service answered with an error ({response.status_code})"}
        body["fix"] = "Try again. If it stays like this, `make logs` tells more."
    if response.status_code == 401:
        body |= _FRONTENDS_KEY if "X-NeuroLoop-Person" in response.request.headers else _OWN_KEY
    try:
        gate = ExplainedGate.model_validate(body["gate"], extra="ignore")
    except (KeyError, ValidationError):
        gate = None
    return ApiProblem(
        str(body["title"]),
        detail=str(body.get("detail") or ""),
        fix=_followable(str(body.get("fix") or ""), response.headers.get("Retry-After", "")),
        status=response.status_code,
        gate=gate,
        prediction_id=str(body.get("id") or ""),
        frames=_number(body.get("frames")),
        frame=_number(body.get("frame")),
        request_id=response.headers.get("X-Request-Id", ""),
    )


def _followable(fix: str, retry_after: str) -> str:
    """Advice that the API gives to programs, for people, who see no headers."""
    seconds = f"{retry_after} s" if retry_after.isdigit() else "a moment"
    return (
        fix.replace("as long as Retry-After says", seconds)
        .replace("as Retry-After says", f"in {seconds}")
        .replace("the X-Request-Id of this answer", "the id of this request")
    )


def _number(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 1
