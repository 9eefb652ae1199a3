"""The online use cases: predict, explain, record, take feedback, report. One object a server process."""

import base64
import contextlib
import hashlib
import logging
import time
import uuid
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from neuroloop.bootstrap import Services
from neuroloop.core import keys
from neuroloop.core.errors import AlreadyExists, Erased, NotFound, Unavailable, Uncertain, unknown_prediction
from neuroloop.core.mail import parse_mail
from neuroloop.core.schemas import (
    LABELS,
    NO_TUMOUR,
    RESEARCH_NOTICE,
    Claim,
    Consent,
    Erasure,
    ErasureReason,
    ExplainedGate,
    Feedback,
    Label,
    Mail,
    ModelVersion,
    Monitoring,
    Prediction,
    Promotion,
    Record,
    Verdict,
    now,
)
from neuroloop.imaging.canonical import Box, canonical_and_box, head_box, place
from neuroloop.imaging.decode import Decoded, encode_png, objection
from neuroloop.model.bundle import Bundle
from neuroloop.model.card import Card, as_markdown
from neuroloop.model.explanation import heat_map
from neuroloop.model.gate import declared
from neuroloop.records import corrections, erasure
from neuroloop.serving import feedback as verdicts
from neuroloop.serving.champion import Champion, Served
from neuroloop.serving.decoding import Decoder
from neuroloop.serving.metrics import Metrics

SHOWN_SIDE = 512  # pixels of the longer side of the images in an answer
MAILS = 100
_LOG = logging.getLogger(__name__)


class Answer(Record):
    """What a client gets for an accepted image. The images are base64 PNGs, 8-bit grey, in the same frame."""

    id: str
    label: Label
    probabilities: dict[str, float] = Field(description="class -> calibrated probability; they sum to 1")
    tumour: bool
    gate: ExplainedGate
    model_version: str
    data_version: str
    simulated_model: bool = Field(description="The model was trained on simulated scans")
    seconds: float
    width: int = Field(description="pixels of the uploaded image")
    height: int
    prediction_sets: dict[str, tuple[Label, ...]] = Field(
        description="coverage (0.90, 0.95) -> the classes the answer leaves open at it, most probable first: of the "
        "images of each class, this share has its class in the set. May be empty: no class fits well enough"
    )
    refer: bool = Field(description="Too uncertain to answer: let a reader decide, whatever `label` says")
    refer_reason: str = Field(description="Why, in words; empty when `refer` is false")
    heatmap: str | None = Field(
        description="Where the network found what speaks for the class, 0..255; null for notumor, where nothing is "
        "shown that a reader could take for a finding"
    )
    image: str | None = Field(
        description=f"The upload as the platform read it, at most {SHOWN_SIDE} px a side; null with `images=false`"
    )
    frames: int = Field(description="How many frames, slices or pages the upload has")
    frame: int = Field(description="Which of them this is, from 1")
    notice: str = RESEARCH_NOTICE


class Rejection(Record):
    """What a client gets for an image that the gate refused. It is recorded, but no class is given."""

    id: str
    gate: ExplainedGate
    model_version: str
    frames: int = Field(description="How many frames, slices or pages the upload has")
    frame: int = Field(description="Which of them this is, from 1")


class RecordedPrediction(Prediction):
    """A prediction with what readers said of it."""

    feedback: tuple[Feedback, ...]


class FeedbackReceipt(Record):
    """A verdict as it was recorded."""

    prediction_id: str
    verdict: Verdict
    label: Label | None
    corrections_waiting: int = Field(description="Corrected images that no retraining has used yet")
    may_train: bool = Field(description="Whether a correction of it is trained on: consent and model allow it")


class ServedModel(Record):
    """The model being served."""

    version: str
    data_version: str
    simulated: bool
    image_size: int
    labels: tuple[str, ...]
    metrics: dict[str, float]
    loaded_at: datetime
    sha256: str


class ServedCard(Record):
    """The model card of the model being served."""

    version: str
    markdown: str
    card: Card


class Models(Record):
    """Everything that has been registered, and why it was promoted or not."""

    serving: str | None = Field(description="The version this server answers with")
    versions: tuple[ModelVersion, ...]
    promotions: tuple[Promotion, ...]
    mlflow_url: str


class InferenceService:
    """Predictions and everything around them. Thread-safe; every method may block on the store or the database."""

    def __init__(self, services: Services, champion: Champion, metrics: Metrics) -> None:
        self._services, self._champion, self._metrics = services, champion, metrics
        self.decoder = Decoder.of(services.settings)
        self._batches: dict[str, bytes] = {}  # read once each, for every verdict is told how many wait

    def predict(
        self,
        data: bytes,
        *,
        frame: int | None = None,
        owner: str = "",
        consent: Consent = "unstated",
        request: str = "",
        images: bool = True,
    ) -> Answer | Rejection:
        """Classify the bytes of an uploaded image, or the one of its frames that is named, counted from 1.

        Stored and recorded before it returns. What is stored is a PNG made of the decoded pixels, so metadata, names in
        it included, ends here. `request` is the client's idempotency key: however often and wherever it comes, also at
        once and after a crash, there is one prediction and one answer to it. Raises `InvalidImage` (nothing is stored),
        `KeyReused`, `Erased` and `Unavailable` (no model, store or database; what was done is not answered, and a retry
        ends it).
        """
        read = self.decoder.read(data, frame)
        pixels = read.pixels
        started = time.perf_counter()
        served = self._champion.require()
        claim, sha256 = None, hashlib.sha256(data).hexdigest()
        if request:
            # Hashed, for a client may put a name into its key; with the owner, whose keys are nobody else's business.
            request = hashlib.sha256(f"{owner}\0{request}".encode()).hexdigest()
            claim = self._services.log.claim(request, str(uuid.uuid4()), f"{sha256} {read.frame} {consent}")
            if claim.answered:
                return self._again(claim, read, images)
        bundle = served.bundle
        canonical, box = canonical_and_box(pixels, bundle.image_size)
        outputs = bundle.predict(canonical[None])
        judged = bundle.gate.judge(canonical, float(outputs.novelty[0]))
        gate = declared(judged, objection(read))
        prediction_id = claim.prediction_id if claim else str(uuid.uuid4())
        index = int(outputs.probabilities[0].argmax())
        label = LABELS[index] if gate.accepted else None
        key = keys.prediction(label, prediction_id) if label else keys.invalid(prediction_id)
        png = encode_png(pixels)
        self._services.store.put(key, png, content_type="image/png")
        probabilities = outputs.probabilities[0].astype(float).tolist()
        sets = {level: _open_classes(found[0], probabilities) for level, found in outputs.sets.items()}
        refer = bool(outputs.refer[0]) and label is not None
        prediction = Prediction.model_validate(
            {
                "id": prediction_id,
                "created_at": now(),
                "sha256": sha256,
                "object_key": key,
                "label": label,
                "probabilities": dict(zip(LABELS, probabilities, strict=True)) if label else {},
                "gate": gate,
                "model_version": served.version.version,
                "data_version": bundle.manifest.data_version,
                "simulated_model": bundle.manifest.simulated,
                "seconds": time.perf_counter() - started,
                "width": pixels.shape[1],
                "height": pixels.shape[0],
                "prediction_sets": sets if label else {},
                "refer": refer,
                "refer_reason": bundle.refer_reason(max(probabilities), gate.novelty) if refer else "",
                "consent": consent,
                "owner": owner,
            }
        )
        explained = label not in (None, NO_TUMOUR)
        facts = bundle.gate.facts
        explanation: dict[str, object] = {"threshold_origin": f"{facts.threshold_origin} {facts.far_origin}".strip()}
        if explained:
            explanation |= _explanation(bundle, outputs.cam[0], box)
        try:
            self._record(prediction, request, explanation if request else None)
        except AlreadyExists:
            if claim is None:
                raise
            return self._again(claim, read, images, mine=key)
        if label is None:
            return _rejection(prediction, _gate(prediction, explanation), read)
        drawn = (bundle.heat(outputs.cam[0], index), box) if explained and images else None
        return _answer(prediction, _gate(prediction, explanation), read, drawn, images=images, png=png)

    def erase(self, prediction_id: str, *, reason: ErasureReason, by: str) -> Erasure:
        """Erase a prediction, see `records.erasure`. Raises `NotFound`, `Unavailable`."""
        _known_form(prediction_id)
        return erasure.erase(self._services.log, self._services.store, prediction_id, reason=reason, by=by)

    def give_feedback(self, prediction_id: str, verdict: Verdict, label: Label | None, reader: str) -> FeedbackReceipt:
        """Record a reader's verdict (see `serving.feedback`). Raises `NotFound`, `InvalidFeedback`, `Unavailable`.

        After `Unavailable` it may be recorded all the same; to give it again is safe.
        """
        log, store = self._services.log, self._services.store
        at = log.clock()  # of a reader's verdicts the last one given counts, whichever server it is given to
        prediction = self._prediction(prediction_id)
        verdict, label = verdicts.normalise(prediction, verdict, label)
        given = Feedback(prediction_id=prediction.id, reader=reader, verdict=verdict, label=label, created_at=at)
        verdicts.record(log, store, prediction, given, news=self._metrics.feedback.labels(verdict.value).inc)
        return FeedbackReceipt(
            prediction_id=prediction.id,
            verdict=verdict,
            label=label,
            corrections_waiting=len(corrections.waiting(store, self._batches)),
            may_train=corrections.may_train(prediction),
        )

    def prediction(self, prediction_id: str, owner: str | None = None) -> RecordedPrediction:
        """One row with its feedback; with `owner`, only one of theirs. Raises `NotFound`, `Unavailable`."""
        row = self._prediction(prediction_id, owner)
        return RecordedPrediction(**dict(row), feedback=tuple(self._services.log.feedback(row.id)))

    def image(self, prediction_id: str, owner: str | None = None) -> bytes:
        """The stored PNG of one prediction; with `owner`, only of theirs. Raises `NotFound`, `Unavailable`."""
        row = self._prediction(prediction_id, owner)
        try:
            return self._services.store.get(row.object_key)
        except NotFound as error:
            _LOG.warning("%s", error)
            raise NotFound(f"The image of {prediction_id} is not there any more") from None

    def model(self) -> ServedModel:
        """The model being served. Raises `Unavailable` before the first one."""
        served = self._champion.require()
        manifest = served.bundle.manifest
        return ServedModel(
            version=served.version.version,
            data_version=manifest.data_version,
            simulated=manifest.simulated,
            image_size=manifest.image_size,
            labels=manifest.labels,
            metrics=manifest.metrics,
            loaded_at=served.loaded_at,
            sha256=served.bundle.sha256,
        )

    def card(self) -> ServedCard:
        """The card of the model being served. Raises `NotFound` where it has none, `Unavailable` before the first."""
        served = self._champion.require()
        card = served.bundle.card
        if card is None:
            raise NotFound(
                f"Version {served.version.version} has no model card",
                why="it was registered without an evaluation",
                fix="build the model again; every build writes one",
            )
        return ServedCard(version=served.version.version, markdown=as_markdown(card), card=card)

    def audit(self, *, page: bool, latest: bool = False) -> bytes:
        """The audit of the data that the served model was trained on, as HTML page or as JSON.

        With `latest`, of the data that was audited last, be it that the audit stopped the run. Raises `NotFound` where
        that version, or nothing, was ever audited, `Unavailable` before the first model unless it is the latest.
        """
        if latest:
            try:
                version = self._services.store.get(keys.LATEST_AUDIT).decode()
            except NotFound:
                raise NotFound("No data has been audited yet", fix="start a build; it audits its data") from None
        else:
            version = self._champion.require().bundle.manifest.data_version
        try:
            return self._services.store.get(keys.audit_page(version) if page else keys.audit(version))
        except NotFound:
            raise NotFound(
                f"Data version {version} has no audit report",
                why="the model was built without one, or the report was deleted",
                fix="build the model again; every build audits its data",
            ) from None

    def models(self) -> Models:
        """All registered versions and the promotion ledger. Raises `Unavailable`."""
        served = self._champion.served
        return Models(
            serving=served.version.version if served else None,
            versions=tuple(self._services.registry.versions()),
            promotions=tuple(self._services.log.promotions()),
            mlflow_url=f"{self._services.settings.mlflow_page}/#/models",
        )

    def monitoring(self) -> Monitoring:
        """Live figures. Raises `Unavailable`."""
        return self._services.log.monitoring().model_copy(
            update={
                "corrections_waiting": len(corrections.waiting(self._services.store, self._batches)),
                "feedback_threshold": self._services.settings.feedback_threshold,
            }
        )

    def mails(self) -> list[Mail]:
        """The latest mails that the local sink kept, newest first. Raises `Unavailable`."""
        store = self._services.store
        latest = store.list(keys.MAIL)[-MAILS:]  # keys begin with the time
        return [parse_mail(store.get(key)) for key in reversed(latest)]

    def check_database(self) -> None:
        """Raise `Unavailable` unless the database answers."""
        self._services.log.check()

    def check_store(self) -> None:
        """Raise `Unavailable` unless the store can be reached."""
        self._services.store.check()

    def check_model(self) -> Served:
        """The served model. Raises `Unavailable` unless there is one."""
        return self._champion.require()

    def _prediction(self, prediction_id: str, owner: str | None = None) -> Prediction:
        """The row. With `owner`, a row of somebody else is as good as none: not even that it exists is said.

        Nor that it was erased: the mark of an erasure does not say whose it was.
        """
        _known_form(prediction_id)
        try:
            row = self._services.log.prediction(prediction_id)
        except Erased:
            if owner is None:
                raise
            row = None
        if row is None or (owner is not None and row.owner != owner):
            raise unknown_prediction(prediction_id)
        return row

    def _again(self, claim: Claim, read: Decoded, images: bool, *, mine: str = "") -> Answer | Rejection:
        """The recorded answer to a request that came before, or at once on another thread or server.

        `read` is what was uploaded, then as now. `mine` is the key of an object that this request has stored: it goes
        unless it is the recorded one.
        """
        log, store = self._services.log, self._services.store
        try:
            prediction = log.prediction(claim.prediction_id)
        except Unavailable:
            raise
        except Exception:  # erased, or the claim was given up: nothing will ever speak of this object
            if mine:
                store.delete(mine)
            raise
        if mine and mine != prediction.object_key:  # the model changed in between, and with it the class
            store.delete(mine)
        if mine:  # what the other request left to draw the heat map from
            claim = log.claimed(claim.prediction_id)
        gate = _gate(prediction, claim.explanation)
        if prediction.label is None:
            return _rejection(prediction, gate, read)
        drawn = _drawn(claim.explanation, prediction.label, read.pixels) if images else None
        return _answer(prediction, gate, read, drawn, images=images)

    def _record(self, prediction: Prediction, request: str, explanation: dict[str, object] | None) -> None:
        """Write the row of a stored object; where it certainly has none, the object goes too.

        Another request with the same key may have stored the same object, so with a key it stays: a retry gives it
        its row, or `records.orphans` removes it.
        """
        log, store = self._services.log, self._services.store
        try:
            log.record_prediction(prediction, request=request, explanation=explanation)
        except AlreadyExists:
            raise
        except Uncertain:
            with contextlib.suppress(Exception):
                if log.known([prediction.id]):
                    return self._count(prediction)
            raise
        except Exception:
            if not request:
                try:
                    store.delete(prediction.object_key)
                except Exception as error:
                    _LOG.warning("%s could not be removed after its row failed: %s", prediction.object_key, error)
            raise
        self._count(prediction)

    def _count(self, prediction: Prediction) -> None:
        self._metrics.predictions.labels(prediction.label or "rejected").inc()
        if prediction.refer:
            self._metrics.referrals.labels(prediction.label).inc()
        self._metrics.prediction_seconds.observe(prediction.seconds)
        self._metrics.gate_score.observe(prediction.gate.score)


def _gate(prediction: Prediction, explanation: Mapping[str, object] | None) -> ExplainedGate:
    """What the gate said of an image, and where its limits come from, as it was kept for a repeat."""
    origin = (explanation or {}).get("threshold_origin", "")
    return ExplainedGate(**prediction.gate.model_dump(), threshold_origin=str(origin))


def _rejection(prediction: Prediction, gate: ExplainedGate, read: Decoded) -> Rejection:
    return Rejection(
        id=prediction.id,
        gate=gate,
        model_version=prediction.model_version,
        frames=read.frames,
        frame=read.frame,
    )


def _answer(
    prediction: Prediction,
    gate: ExplainedGate,
    read: Decoded,
    drawn: tuple[NDArray[np.float32], Box] | None,
    *,
    images: bool = True,
    png: bytes | None = None,
) -> Answer:
    """The answer, its images reduced to `SHOWN_SIDE`; the heat map is placed in that size, which is what is seen.

    `drawn` is the heat map and the head that it covers, `png` the PNG of the pixels where that was made on the way.
    """
    image, heatmap = _shown(read.pixels, drawn, png) if images else (None, None)
    return Answer(
        **prediction.model_dump(include=set(Answer.model_fields) & set(Prediction.model_fields) - {"gate"}),
        gate=gate,
        tumour=prediction.label != NO_TUMOUR,
        heatmap=heatmap,
        image=image,
        frames=read.frames,
        frame=read.frame,
    )


def _shown(
    pixels: NDArray[np.uint8], drawn: tuple[NDArray[np.float32], Box] | None, png: bytes | None
) -> tuple[str, str | None]:
    """The image and the heat map as an answer holds them."""
    scale = min(1.0, SHOWN_SIDE / max(pixels.shape))
    height, width = (max(1, round(side * scale)) for side in pixels.shape)
    if scale < 1:
        reduced = Image.fromarray(pixels).resize((width, height), Image.Resampling.BOX)
        png = encode_png(np.asarray(reduced))
    overlay = None
    if drawn is not None:
        heat, (top, left, tall, wide) = drawn
        there = Box(round(top * scale), round(left * scale), max(1, round(tall * scale)), max(1, round(wide * scale)))
        overlay = place(np.rint(np.clip(heat, 0, 1) * 255).astype(np.uint8), there, (height, width))
    return _base64(png or encode_png(pixels)), None if overlay is None else _base64(encode_png(overlay))


def _known_form(prediction_id: str) -> None:
    """Raise `NotFound` for an id that no server of ours can have made: it is not even looked up."""
    known = False
    with contextlib.suppress(ValueError):
        known = str(uuid.UUID(prediction_id)) == prediction_id
    if not known:
        raise unknown_prediction(prediction_id)


def _explanation(bundle: Bundle, cam: NDArray[np.float32], box: Box) -> dict[str, object]:
    """What a heat map is drawn from, to the bit, so that a repeated request gets the same one: some kilobytes."""
    return {
        "cam": base64.b64encode(np.ascontiguousarray(cam, "<f4").tobytes()).decode("ascii"),
        "shape": list(cam.shape),
        "box": list(box),
        "size": bundle.image_size,
        "offset": list(bundle.manifest.map_offset),
    }


def _drawn(
    explanation: dict[str, Any] | None, label: Label, pixels: NDArray[np.uint8]
) -> tuple[NDArray[np.float32], Box] | None:
    """The inverse of `_explanation`: the heat map of the class and its place, None where none was shown.

    What was recorded before places were is placed on the head as it is found now.
    """
    if explanation is None or "cam" not in explanation:
        return None
    cam = np.frombuffer(base64.b64decode(explanation["cam"]), "<f4").reshape(explanation["shape"])
    down, right = explanation["offset"]
    heat = heat_map(cam, LABELS.index(label), explanation["size"], (down, right))
    return heat, Box(*explanation["box"]) if "box" in explanation else head_box(pixels)


def _open_classes(found: NDArray[np.bool_], probabilities: list[float]) -> list[str]:
    """The classes of a prediction set, bool (classes,), most probable first."""
    order = sorted(range(len(LABELS)), key=lambda index: -probabilities[index])
    return [LABELS[index] for index in order if found[index]]


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
