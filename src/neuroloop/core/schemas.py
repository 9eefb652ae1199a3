"""The records that cross rooms: immutable, validated, JSON-ready."""

import math
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_serializer

LABELS: tuple[str, ...] = ("glioma", "meningioma", "notumor", "pituitary")
"""The four classes in the order of every probability vector."""

NO_TUMOUR = "notumor"

Label = Literal["glioma", "meningioma", "notumor", "pituitary"]
Part = Literal["train", "validation", "calibration", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "calibration", "test")
SplitName = Literal["grouped", "legacy"]

ArchitectureName = Literal["compact", "tiny", "plain64", "conv224", "xception", "inceptionv3", "resnet101v2"]
"""The selectable networks; `model.architectures` describes them."""

Distribution = Literal["auto", "one", "mirrored", "multi_worker"]
"""What trains: one device, or several at once; `model.devices` describes them."""

Consent = Literal["training", "record", "unstated", "simulated"]
"""To what an uploader agreed: the image may be kept and, once corrected, trained on; kept only; nothing was said; or it
is of nobody, a simulated scan, which only models of simulated scans learn from."""

ErasureReason = Literal["consent_withdrawn", "requested", "mistake", "retention"]
"""Why something was erased: consent was withdrawn, the person asked for it, it should not be here, its time was up."""

RESEARCH_NOTICE = "For research only. Not a medical device; not for diagnosis."


def now() -> datetime:
    """The current time, UTC and aware."""
    return datetime.now(UTC)


class Record(BaseModel):
    """Base of every record: frozen, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


# --- data ---------------------------------------------------------------------------------------


class SourceFile(Record):
    """One file of a training source, before it is fetched."""

    path: str = Field(description="Path in the source, as the source spells it")
    label: Label
    part: str = Field(default="", description="The source's own part (e.g. Training), empty if none")


class ImageEntry(Record):
    """One image of a frozen snapshot. `path` is `[part/]class/name` below the snapshot's `data/`."""

    path: str
    label: Label
    part: str = Field(default="", description="The source's own part, empty if it has none")
    md5: str = Field(description="Content hash DVC stores the file under")
    sha256: str
    size: int = Field(ge=0, description="bytes")
    source_path: str = Field(default="", description="Path in the source, as the source spells it; empty: not recorded")
    licence: str = Field(default="", description="Under which it may be used; empty: unknown")
    origin: str = Field(default="", description="The set it was first published in, see `data.provenance`")


class Snapshot(Record):
    """What `download_data` froze: the images of one data version."""

    version: str = Field(description="DVC's hash of the directory, without the .dir suffix")
    source: str = Field(description="The data URL it came from")
    simulated: bool
    images: tuple[ImageEntry, ...]


class Quarantined(Record):
    """An image kept out of every part, with the reason in words."""

    path: str
    reason: str


class SplitEntry(Record):
    """Where one image stands after the audit."""

    path: str
    label: Label
    md5: str
    sha256: str
    group: int = Field(description="Images of one group are identical, near-identical or mirrored twins")
    part: Part
    origin: str = Field(default="", description="The set it was first published in, see `data.provenance`")


class Split(Record):
    """A split of one data version. In the grouped one no group stands in two parts.

    The legacy one has the test part that the source itself declares, to compare with what others report; `leaked` are
    the paths of its test images that have an identical or mirrored twin in another of the source's own parts.
    """

    version: str
    simulated: bool
    name: SplitName = "grouped"
    entries: tuple[SplitEntry, ...]
    quarantined: tuple[Quarantined, ...] = ()
    leaked: tuple[str, ...] = ()

    def of(self, *parts: Part) -> list[SplitEntry]:
        """The entries of the named parts, in manifest order."""
        return [entry for entry in self.entries if entry.part in parts]


class Opening(Record):
    """One look at a test part. The more there are, the less its scores say about unseen images."""

    run_id: str
    number: int = Field(ge=1, description="the how-manieth of its run")
    version: str = Field(description="data version")
    split: SplitName
    why: str
    subject: str = Field(default="", description="sha256 of what was scored: scoring it once more is the same look")
    at: datetime = Field(default_factory=now)


# --- predictions --------------------------------------------------------------------------------


class GateResult(Record):
    """Whether an image is taken for a brain MRI: `score` in [0, 1], accepted at or above `threshold`.

    `novelty` is another question: a brain MRI beyond what was learned is accepted, but left to a reader.
    """

    accepted: bool
    score: float = Field(ge=0, le=1)
    threshold: float = Field(ge=0, le=1)
    reason: str = Field(description="In words; empty when accepted")
    novelty: float = Field(
        default=0.0, ge=0, description="How far beyond what was learned; 1 is the limit. 0 in records of before it was"
    )


class ExplainedGate(GateResult):
    """The same in an answer."""

    threshold_origin: str = Field(
        default="",
        description="Where the threshold and the limit of the novelty come from; empty where it was not kept",
    )


class Prediction(Record):
    """One row of the prediction log. `label` and `probabilities` are empty for a rejected image."""

    id: str = Field(description="uuid4, made by the server")
    created_at: datetime
    sha256: str = Field(description="of the uploaded bytes")
    object_key: str
    label: Label | None
    probabilities: dict[str, float]
    gate: GateResult
    model_version: str
    data_version: str
    simulated_model: bool = Field(description="The model was trained on simulated scans")
    seconds: float = Field(ge=0, description="From decoded request to stored object")
    width: int = Field(gt=0, description="pixels of the uploaded image")
    height: int = Field(gt=0)
    prediction_sets: dict[str, tuple[Label, ...]] = Field(
        default={}, description="coverage (0.90, 0.95) -> the classes an answer leaves open at it, most probable first"
    )
    refer: bool = Field(default=False, description="Too uncertain to answer: a reader should look")
    refer_reason: str = Field(default="", description="In words; empty when not referred")
    consent: Consent = Field(default="unstated", description="To what the uploader agreed, see `Consent`")
    owner: str = Field(default="", description="Who uploaded it: the name of the key or of the person signed in")


class Claim(Record):
    """To which prediction an idempotency key belongs; of several requests with one key all get the same claim."""

    prediction_id: str
    answered: bool = Field(description="The prediction has been recorded: the answer is known")
    explanation: dict[str, Any] | None = Field(
        default=None, description="What its heat map is drawn from, and what else its answer said"
    )


class Erasure(Record):
    """The mark that stays of an erased prediction: that it was there, and who removed it when and why. No content."""

    prediction_id: str
    requested_at: datetime = Field(default_factory=now)
    reason: ErasureReason
    by: str = Field(min_length=1, max_length=100, description="Who asked for it")
    finished_at: datetime | None = Field(default=None, description="When nothing was left; null: still being removed")


class Verdict(StrEnum):
    """What a reader says of a prediction."""

    AGREE = "agree"
    CORRECT = "correct"
    NOT_SURE = "not_sure"
    NOT_BRAIN_MRI = "not_brain_mri"
    BRAIN_MRI = "brain_mri"
    """Of an image that the gate refused: it is one, of whatever class"""


class Feedback(Record):
    """One reader's verdict on one prediction; a later one by the same reader replaces it."""

    prediction_id: str
    reader: Annotated[str, Field(min_length=1, max_length=100)]
    verdict: Verdict
    label: Label | None = Field(default=None, description="The corrected class, only with verdict `correct`")
    created_at: datetime = Field(default_factory=now)


class ClassMonitoring(Record):
    """Live figures of one predicted class."""

    predictions: int
    mean_probability: float
    mean_seconds: float
    p95_seconds: float
    referred: int = Field(default=0, description="Of the predictions, those too uncertain to answer")


class GatePoint(Record):
    """One answered request on the gate-score time line."""

    at: datetime
    score: float
    accepted: bool


MONITORING_DAYS = 30
"""The figures of Monitoring are of what was answered, and said, within so many days: what they cost has a bound."""


class Monitoring(Record):
    """What the Monitoring page shows: figures of the last 30 days, and the corrections that wait, however old.

    `corrections_waiting` is filled in by the use case, not the log.
    """

    predictions: int
    accepted: int
    rejected: int
    contested: int = Field(default=0, description="Of the rejected, those that a reader says are a brain MRI")
    referred: int = Field(default=0, description="Of the accepted, those too uncertain to answer")
    per_class: dict[str, ClassMonitoring]
    gate_scores: tuple[GatePoint, ...] = Field(description="The latest 500 of those days, oldest first")
    feedback: dict[str, int] = Field(description="verdict -> count of those given in those days")
    corrections_waiting: int = Field(default=0, description="Of any age: not used by a retraining yet")
    feedback_threshold: int = 50


# --- models -------------------------------------------------------------------------------------


class ModelVersion(Record):
    """One registered version of the model."""

    version: str
    run_id: str = Field(description="MLflow run")
    aliases: tuple[str, ...] = ()
    metrics: dict[str, float] = {}
    tags: dict[str, str] = {}
    created_at: datetime

    @field_serializer("metrics", when_used="json")
    def _numbers(self, metrics: dict[str, float]) -> dict[str, float]:
        """JSON has no word for what is no number; a metric that is none is left out."""
        return {name: value for name, value in metrics.items() if math.isfinite(value)}


class Check(Record):
    """One reason for or against a promotion, in words."""

    name: str
    passed: bool
    reason: str


class Promotion(Record):
    """One row of the promotion ledger; one per pipeline run."""

    run_id: str = Field(description="The pipeline run, unique in the ledger")
    created_at: datetime = Field(default_factory=now)
    version: str
    previous: str | None = Field(description="The champion before")
    promoted: bool
    checks: tuple[Check, ...]
    metrics: dict[str, Any] = {}

    @property
    def reason(self) -> str:
        """All checks in one sentence each."""
        return " ".join(check.reason for check in self.checks)


Outcome = Literal["promoted", "not_promoted", "nothing_to_do", "done", "failed"]


class PipelineEnd(Record):
    """How a run of a DAG ended."""

    dag: str
    outcome: Outcome
    run_id: str
    task: str = Field(description="The task it ended in; of a failure, the one that failed")
    ended_at: datetime = Field(default_factory=now)


class LiveAnswer(Record):
    """What of one recorded prediction counts for drift."""

    label: Label | None
    largest_probability: float | None
    gate_score: float


class LiveAccuracy(Record):
    """What readers said within 30 days of the answers of one model version; the last word on each counts.

    A refused or referred scan has no answer, so what readers say of it is not counted here.
    """

    model_version: str
    reviewed: int = Field(description="answers that were confirmed or corrected")
    right: int = Field(description="of these, the confirmed ones")


class LoopFigures(Record):
    """How the loop stands, as far as the database knows."""

    ends: tuple[PipelineEnd, ...] = Field(description="the latest of each DAG and outcome")
    accuracy: tuple[LiveAccuracy, ...]
    first_answers: tuple[LiveAnswer, ...] = Field(description="of the model that answered last, at most a thousand")
    latest_answers: tuple[LiveAnswer, ...] = Field(description="of the same model, at most 500, none of the first")
    ledger_macro_f1: dict[str, float] = Field(description="candidate and champion of the ledger's latest row")
    erasures_unfinished: int


class Mail(Record):
    """A mail the platform sent, as the local sink keeps it."""

    at: datetime
    to: str
    subject: str
    body: str


# --- backups ------------------------------------------------------------------------------------


class DumpedPart(Record):
    """Some rows of a table, as PostgreSQL's COPY writes them."""

    name: str
    sha256: str
    size: int = Field(ge=0, description="bytes")


class DumpedTable(Record):
    """One table of a dumped database."""

    name: str
    quoted: str = Field(description="the name and the columns, as SQL wants them")
    columns: tuple[str, ...] = Field(description="those that are written; generated ones are made anew")
    rows: int
    sha256: str = Field(description="of all its rows, in the order of the parts")
    parts: tuple[DumpedPart, ...]


class DatabaseDump(Record):
    """A database as of one moment, but for the rows, which lie in the parts."""

    before: tuple[str, ...] = Field(description="statements that make the tables")
    after: tuple[str, ...] = Field(
        description="statements for when the rows are there: sequences, indexes, constraints"
    )
    tables: tuple[DumpedTable, ...]
