"""What the use cases ask of the outside world. Adapters implement these; one contract suite per port."""

from collections.abc import Callable, Collection, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from neuroloop.core.credentials import ApiKey
from neuroloop.core.schemas import (
    Claim,
    DatabaseDump,
    Erasure,
    Feedback,
    LoopFigures,
    ModelVersion,
    Monitoring,
    PipelineEnd,
    Prediction,
    Promotion,
    SourceFile,
)


class ObjectStore(Protocol):
    """Named bytes. Keys are relative, `/`-separated, never absolute, never with `..`."""

    def put(self, key: str, data: bytes, *, content_type: str = "application/octet-stream") -> None:
        """Store `data` under `key`, replacing what was there; atomic: a reader sees old or new."""

    def create(self, key: str, data: bytes, *, content_type: str = "application/octet-stream") -> None:
        """Store `data` only if `key` is free. Raises `AlreadyExists`; of n concurrent calls one wins."""

    def get(self, key: str) -> bytes:
        """The bytes under `key`. Raises `NotFound`."""

    def exists(self, key: str) -> bool:
        """Whether `key` is taken."""

    def list(self, prefix: str) -> list[str]:
        """All keys that start with `prefix`, sorted."""

    def delete(self, key: str) -> None:
        """Remove `key`, for good; nothing happens where it is not there."""

    def modified(self, key: str) -> datetime:
        """When `key` was last written, UTC. Raises `NotFound`."""

    def discard_unfinished(self, before: datetime) -> int:
        """Remove what killed writers left half-written before this time; how many pieces."""

    def check(self) -> None:
        """Raise `Unavailable` unless the store can be reached."""


class PredictionLog(Protocol):
    """The database: predictions, feedback, idempotency keys, erasures, the promotion ledger.

    Every call is one transaction. A write whose outcome is not known raises `Uncertain`, any other `Unavailable` means
    that nothing was written.
    """

    def claim(self, request: str, prediction_id: str, fingerprint: str) -> Claim:
        """The prediction an idempotency key belongs to: `prediction_id` if the key is new, else the first one's.

        `request` identifies the key, `fingerprint` what was asked. A claim that was never answered is given up after
        ten minutes and made anew with `prediction_id`. Raises `KeyReused` where the fingerprint is another one.
        """

    def claimed(self, prediction_id: str) -> Claim:
        """The claim of a prediction. Raises `NotFound`."""

    def forget_claims(self, before: datetime) -> int:
        """Remove the claims made before this time that were never answered; how many there were."""

    def record_prediction(
        self, prediction: Prediction, *, request: str = "", explanation: Mapping[str, Any] | None = None
    ) -> None:
        """Append one row and, with `request`, mark its claim as answered.

        Raises `AlreadyExists` on a repeated id, and where another request has answered the claim or taken it over.
        """

    def prediction(self, prediction_id: str) -> Prediction:
        """One row. Raises `NotFound`, `Erased`."""

    def known(self, prediction_ids: Collection[str]) -> dict[str, Prediction]:
        """The rows of those that are recorded and not being erased, by id."""

    def older(self, before: datetime, limit: int = 1000) -> list[str]:
        """Ids of predictions made before this time, oldest first."""

    def corrected(self, after: str = "", limit: int = 1000) -> list[str]:
        """Ids of predictions not being erased that some reader corrects, by id: those that come after this one."""

    def record_feedback(self, feedback: Feedback) -> bool:
        """Insert or replace this reader's verdict; whether it was news.

        Raises `NotFound` on an unknown prediction, `Erased` on an erased one.
        """

    def feedback(self, prediction_id: str) -> list[Feedback]:
        """All readers' verdicts on one prediction, oldest first. Raises `Erased`."""

    def mark_erased(self, erasure: Erasure) -> Erasure:
        """Mark a prediction as erased, for ever, and return the mark; the first one stands. Raises `NotFound`."""

    def finish_erasure(self, prediction_id: str) -> Erasure:
        """Remove all content of a marked prediction from the database; a repeat changes nothing. Raises `NotFound`."""

    def erasures(self, *, unfinished: bool = False, limit: int = 1000) -> list[Erasure]:
        """The marks, newest first; those that are `unfinished` alone, oldest first: who waits longest comes first."""

    def erased(self, prediction_ids: Collection[str]) -> set[str]:
        """Those of the ids that are marked as erased."""

    def record_promotion(self, promotion: Promotion) -> None:
        """Append a ledger row; a repeat of the same `run_id` changes nothing."""

    def promotions_since(self, run_id: str) -> list[Promotion]:
        """The ledger from the row of this pipeline run on, newest first; empty where it has none."""

    def promotions(self, limit: int = 100) -> list[Promotion]:
        """The ledger, newest first."""

    def monitoring(self) -> Monitoring:
        """Live figures of the last `MONITORING_DAYS`."""

    def record_end(self, end: PipelineEnd) -> None:
        """Note how a run of a DAG ended, in place of the DAG's earlier run that ended so."""

    def loop_figures(self) -> LoopFigures:
        """How the loop stands, at a cost that does not grow with the number of predictions."""

    def clock(self) -> datetime:
        """The database's time, UTC: one for all servers."""

    def check(self) -> None:
        """Raise `Unavailable` unless the database answers and can be written to."""


class Database(Protocol):
    """A whole database, to back up and to restore."""

    def empty(self) -> bool:
        """Whether there is no table in it."""

    def dump(self, write: Callable[[str, bytes], None]) -> DatabaseDump:
        """Everything as of one moment: `write` gets the rows in named parts, the rest is returned."""

    def load(self, dump: DatabaseDump, read: Callable[[str], bytes]) -> None:
        """Make all of it again in an empty database, all or nothing; `read` gives the parts. Raises `AlreadyExists`."""


class ApiKeys(Protocol):
    """Who may use the API."""

    def record_api_key(self, key: ApiKey) -> None:
        """Append one key. Raises `AlreadyExists` on a repeated id."""

    def api_key(self, key_id: str) -> ApiKey | None:
        """One key, None where there is none of this id."""

    def api_keys(self) -> list[ApiKey]:
        """All keys, newest first, those no longer valid included."""

    def revoke_api_key(self, key_id: str) -> ApiKey:
        """Make a key worthless; a second time changes nothing. Raises `NotFound`."""


class Registry(Protocol):
    """Experiment tracking and the model registry. `run` is the tracking server's run id."""

    def open_run(self, run_id: str, *, experiment: str, tags: Mapping[str, str] = {}, parent: str | None = None) -> str:
        """The tracking run of a pipeline run; the same `run_id` always gives the same run.

        `parent` is the tracking run below which a new one is shown, as a search's trials are below the search.
        """

    def runs_page(self, run: str) -> str:
        """Where the tracking server's own pages list this run among those to compare it with: a path, `#/...`."""

    def log_params(self, run: str, params: Mapping[str, Any]) -> None:
        """Parameters; a repeated key with the same value is fine."""

    def log_metrics(self, run: str, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        """Metrics, at once (live); `step` counts epochs."""

    def next_step(self, run: str, metric: str) -> int:
        """The step after the last one at which this metric was logged; 0 where it never was."""

    def log_bytes(self, run: str, path: str, data: bytes) -> None:
        """One artifact file at `path` below the run's artifacts."""

    def log_dataset(
        self, run: str, name: str, digest: str, *, context: str, source: str = "", profile: Mapping[str, Any] = {}
    ) -> None:
        """That the run read a data set.

        `digest` identifies its content (36 characters at most), `context` says what for (training, validation, ...),
        `source` where it came from, `profile` has its figures. A repeat changes nothing.
        """

    def set_tags(self, run: str, tags: Mapping[str, str]) -> None:
        """Tags of a run."""

    def close_run(self, run: str, *, failed: bool = False) -> None:
        """Mark the run finished or failed."""

    def register(self, run: str, bundle: Path, *, tags: Mapping[str, str], description: str = "") -> ModelVersion:
        """Register the bundle folder (see `model.bundle`) as a new version; once per run, then the same one.

        `description` is Markdown for people: the model card. It may be cut to what the server takes.
        """

    def by_alias(self, alias: str) -> ModelVersion | None:
        """The version an alias points to, None where the alias or the model does not exist."""

    def set_alias(self, alias: str, version: str) -> None:
        """Point `alias` at `version`, atomically."""

    def versions(self) -> list[ModelVersion]:
        """All versions with metrics and aliases, newest first."""

    def download_bundle(self, version: str, folder: Path) -> Path:
        """Fetch the bundle of `version` into `folder`; returns the folder that holds `bundle.json`."""

    def check(self) -> None:
        """Raise `Unavailable` unless the server answers."""


class Notifier(Protocol):
    """Tells people what happened."""

    def send(self, subject: str, body: str, *, once: str = "") -> None:
        """Send one plain-text mail. Raises `Unavailable`.

        `once` names the occasion, in all the world: a repeat is marked as the same mail, so that receivers show one.
        """


class DataSource(Protocol):
    """Where training images come from."""

    url: str
    simulated: bool
    licence: str
    """As declared: `CC0-1.0`, or by origin, `CC0-1.0, figshare=CC-BY-4.0`; empty: unknown."""
    ignored: dict[str, int]
    """By suffix, how many files the last `files()` passed over because they are no images."""

    def files(self) -> list[SourceFile]:
        """All image files with their class, sorted by path. Raises `InvalidSource`."""

    def read(self, file: SourceFile) -> bytes:
        """The bytes of one file. Raises `InvalidSource`."""


class DataVersions(Protocol):
    """Versions a folder of data."""

    def commit(self, workspace: Path) -> tuple[str, bytes]:
        """Version `workspace/data` and push it to the remote; (version, bytes of `data.dvc`)."""

    def restore(self, data_dvc: bytes, workspace: Path) -> None:
        """Bring back exactly the version that `data_dvc` names into `workspace/data`."""
