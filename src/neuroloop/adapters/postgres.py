"""Predictions, feedback, idempotency keys, erasures and the promotion ledger in PostgreSQL, through psycopg2."""

import contextlib
import os
import queue
import select
import socket
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import psycopg2
import psycopg2.extras
from psycopg2 import errors
from psycopg2.extensions import parse_dsn

from neuroloop.core.credentials import ApiKey
from neuroloop.core.errors import (
    AlreadyExists,
    Erased,
    KeyReused,
    NeuroLoopError,
    NotFound,
    OutOfSpace,
    Unavailable,
    Uncertain,
    unknown_prediction,
)
from neuroloop.core.schemas import (
    MONITORING_DAYS,
    Claim,
    Erasure,
    Feedback,
    GateResult,
    LoopFigures,
    Monitoring,
    PipelineEnd,
    Prediction,
    Promotion,
    Verdict,
)
from neuroloop.core.settings import database_place

_MIGRATIONS = Path(__file__).parent / "migrations"
_MIGRATION_LOCK = 0x6E6575726F  # "neuro": any number that nothing else in this database locks
_MIGRATION_SECONDS = 120
_GATE_SCORES = 500
_TRUSTED_SECONDS = 5.0
"""Idle connections are asked whether they still answer after this."""
_CLAIM_MINUTES = 10
"""After which an idempotency key that was never answered gets another id: long after its request ended, and long before
the sweep of objects without a row (`records.orphans`) may remove what that request left."""

_CLAIM = f"""
INSERT INTO requests AS known (key, prediction_id, fingerprint, claimed_at)
VALUES (%(key)s, %(prediction_id)s, %(fingerprint)s, now())
ON CONFLICT (key) DO UPDATE SET (prediction_id, claimed_at) = (
    SELECT excluded.prediction_id, excluded.claimed_at
    WHERE known.answered_at IS NULL AND known.claimed_at < now() - interval '{_CLAIM_MINUTES} minutes'
    UNION ALL SELECT known.prediction_id, known.claimed_at LIMIT 1
)
RETURNING prediction_id, fingerprint, answered_at IS NOT NULL AS answered, explanation
"""

_KNOWN = """SELECT * FROM predictions
WHERE NOT EXISTS (SELECT FROM erasures WHERE prediction_id = predictions.id)"""

_MONITORING = """
WITH recent AS NOT MATERIALIZED (
    SELECT * FROM predictions WHERE created_at > now() - make_interval(days => %(days)s)
)
SELECT json_build_object(
    'predictions', count(*),
    'accepted', count(*) FILTER (WHERE gate_accepted),
    'rejected', count(*) FILTER (WHERE NOT gate_accepted),
    'contested', (
        SELECT count(DISTINCT prediction_id) FROM feedback JOIN recent ON recent.id = prediction_id
        WHERE NOT gate_accepted AND verdict IN ('correct', 'brain_mri')
    ),
    'referred', count(*) FILTER (WHERE refer),
    'per_class', (
        SELECT coalesce(json_object_agg(label, json_build_object(
            'predictions', n, 'mean_probability', probability, 'mean_seconds', mean, 'p95_seconds', p95,
            'referred', referred)), '{}')
        FROM (
            SELECT label, count(*) AS n, count(*) FILTER (WHERE refer) AS referred,
                avg((probabilities ->> label)::float8) AS probability,
                avg(seconds) AS mean, percentile_cont(0.95) WITHIN GROUP (ORDER BY seconds) AS p95
            FROM recent WHERE label IS NOT NULL GROUP BY label
        ) AS classes
    ),
    'gate_scores', (
        SELECT coalesce(json_agg(json_build_object('at', at, 'score', score, 'accepted', accepted) ORDER BY at), '[]')
        FROM (
            SELECT created_at AS at, gate_score AS score, gate_accepted AS accepted
            FROM recent ORDER BY created_at DESC LIMIT %(points)s
        ) AS latest
    ),
    'feedback', (
        SELECT coalesce(json_object_agg(verdict, n), '{}')
        FROM (
            SELECT verdict, count(*) AS n FROM feedback
            WHERE created_at > now() - make_interval(days => %(days)s) GROUP BY verdict
        ) AS verdicts
    )
)::text
FROM recent
"""

_ANSWER = """json_build_object('label', label, 'gate_score', gate_score, 'largest_probability',
    (SELECT max(value::float8) FROM jsonb_each_text(probabilities)))"""

_LOOP_FIGURES = f"""
WITH answering AS (SELECT model_version FROM predictions ORDER BY created_at DESC LIMIT 1),
firsts AS (
    SELECT id, label, gate_score, probabilities FROM predictions
    WHERE model_version = (SELECT model_version FROM answering) ORDER BY created_at LIMIT 1000
),
latest AS (
    SELECT id, label, gate_score, probabilities FROM predictions
    WHERE model_version = (SELECT model_version FROM answering) ORDER BY created_at DESC LIMIT 500
),
last_words AS (
    SELECT DISTINCT ON (prediction_id) prediction_id, verdict FROM feedback
    WHERE verdict <> 'not_sure' AND created_at > now() - interval '30 days'
    ORDER BY prediction_id, created_at DESC
)
SELECT json_build_object(
    'ends', (SELECT coalesce(json_agg(pipeline_ends ORDER BY dag, outcome), '[]') FROM pipeline_ends),
    'accuracy', (
        SELECT coalesce(json_agg(json_build_object(
            'model_version', model_version, 'reviewed', n, 'right', agreed)), '[]')
        FROM (
            SELECT model_version, count(*) AS n, count(*) FILTER (WHERE verdict = 'agree') AS agreed
            FROM last_words JOIN predictions ON id = prediction_id
            WHERE label IS NOT NULL AND NOT refer GROUP BY model_version
        ) AS versions
    ),
    'first_answers', (SELECT coalesce(json_agg({_ANSWER}), '[]') FROM firsts),
    'latest_answers', (
        SELECT coalesce(json_agg({_ANSWER}), '[]') FROM latest WHERE id NOT IN (SELECT id FROM firsts)
    ),
    'ledger_macro_f1', (
        SELECT coalesce(json_object_agg(key, (value ->> 'macro_f1')::float8), '{{}}')
        FROM (SELECT metrics FROM promotions ORDER BY created_at DESC LIMIT 1) AS row, jsonb_each(metrics)
        WHERE key IN ('candidate', 'champion') AND jsonb_typeof(value -> 'macro_f1') = 'number'
    ),
    'erasures_unfinished', (SELECT count(*) FROM erasures WHERE finished_at IS NULL)
)::text AS figures
"""


class PostgresLog:
    """`ports.PredictionLog` and `ports.ApiKeys` on PostgreSQL.

    Thread-safe; one transaction a call; survives a server restart.

    `url` is `postgresql://user:password@host:port/name`. The schema is brought up to date at the first call, by
    whichever process comes first. At most `connections` are open; a call that finds none free, or a statement that
    takes longer than `timeout` seconds, raises `Unavailable`.
    """

    def __init__(self, url: str, *, connections: int = 8, timeout: float = 10.0) -> None:
        self._url = url
        self._name = database_place(url, "NEUROLOOP_DATABASE_URL", parse_dsn)
        self._timeout = timeout
        self._slots = threading.BoundedSemaphore(connections)
        self._idle: queue.LifoQueue[tuple[Any, float]] = queue.LifoQueue()  # and since when
        self._migrating = threading.Lock()
        self._migrated = False
        self._watch = _Watch(timeout + 1)  # the server's own time limit comes first where the server still works

    def claim(self, request: str, prediction_id: str, fingerprint: str) -> Claim:
        """The prediction an idempotency key belongs to: `prediction_id` if the key is new, else the first one's.

        The row decides, so all servers agree. A claim that was never answered is given up after `_CLAIM_MINUTES` and
        made anew with `prediction_id`. Raises `KeyReused` where the fingerprint is another one.
        """
        with self._transaction() as cursor:
            cursor.execute(_CLAIM, {"key": request, "prediction_id": prediction_id, "fingerprint": fingerprint})
            row = cursor.fetchone()
        if row.pop("fingerprint") not in (fingerprint, ""):  # empty: erased, which the caller learns from the id
            raise KeyReused(
                "This Idempotency-Key was used for another request",
                why="the image or what was said with it differs",
                fix="send a new key with a new request, the same one only to repeat a request",
            )
        return Claim(**row)

    def claimed(self, prediction_id: str) -> Claim:
        """The claim of a prediction. Raises `NotFound`."""
        with self._transaction() as cursor:
            cursor.execute(
                "SELECT prediction_id, answered_at IS NOT NULL AS answered, explanation FROM requests"
                " WHERE prediction_id = %s",
                (prediction_id,),
            )
            row = cursor.fetchone()
        if row is None:
            raise NotFound(f"no request has claimed prediction {prediction_id!r}")
        return Claim(**row)

    def forget_claims(self, before: datetime) -> int:
        """Remove the claims made before this time that were never answered; how many there were.

        Each holds the hash of a file of which nothing else was kept.
        """
        with self._transaction() as cursor:
            cursor.execute("DELETE FROM requests WHERE answered_at IS NULL AND claimed_at < %s", (before,))
            return int(cursor.rowcount)

    def record_prediction(
        self, prediction: Prediction, *, request: str = "", explanation: Mapping[str, Any] | None = None
    ) -> None:
        """Append one row and, with `request`, mark its claim as answered.

        Raises `AlreadyExists` on a repeated id, and where another request has answered the claim or taken it over.
        """
        row = prediction.model_dump(exclude={"gate", "probabilities", "prediction_sets"})
        row |= {f"gate_{name}": value for name, value in prediction.gate.model_dump().items()}
        row["probabilities"] = psycopg2.extras.Json(prediction.probabilities)
        row["prediction_sets"] = psycopg2.extras.Json(prediction.prediction_sets)
        taken = AlreadyExists(f"prediction {prediction.id} is recorded already")
        try:
            with self._transaction() as cursor:
                if request:
                    cursor.execute(
                        "UPDATE requests SET answered_at = now(), explanation = %s"
                        " WHERE key = %s AND prediction_id = %s AND answered_at IS NULL",
                        (explanation and psycopg2.extras.Json(dict(explanation)), request, prediction.id),
                    )
                    if cursor.rowcount != 1:
                        raise taken
                cursor.execute(
                    f"INSERT INTO predictions ({', '.join(row)}) VALUES ({', '.join(f'%({name})s' for name in row)})",
                    row,
                )
        except errors.UniqueViolation:
            raise taken from None

    def prediction(self, prediction_id: str) -> Prediction:
        """One row. Raises `NotFound`, `Erased`."""
        with self._transaction() as cursor:
            cursor.execute(f"{_KNOWN} AND id = %s", (_lookup(prediction_id),))
            row = cursor.fetchone()
            if row is None:
                _refuse_erased(cursor, prediction_id)
        if row is None:
            raise unknown_prediction(prediction_id)
        return _prediction(row)

    def known(self, prediction_ids: Collection[str]) -> dict[str, Prediction]:
        """The rows of those that are recorded and not being erased, by id."""
        with self._transaction() as cursor:
            cursor.execute(f"{_KNOWN} AND id = ANY(%s)", (list(prediction_ids),))
            return {row["id"]: _prediction(row) for row in cursor.fetchall()}

    def older(self, before: datetime, limit: int = 1000) -> list[str]:
        """Ids of predictions made before this time, oldest first."""
        with self._transaction() as cursor:
            cursor.execute(f"{_KNOWN} AND created_at < %s ORDER BY created_at LIMIT %s", (before, limit))
            return [row["id"] for row in cursor.fetchall()]

    def corrected(self, after: str = "", limit: int = 1000) -> list[str]:
        """Ids of predictions not being erased that some reader corrects, by id: those that come after this one."""
        with self._transaction() as cursor:
            cursor.execute(
                "SELECT DISTINCT prediction_id FROM feedback WHERE verdict = 'correct' AND prediction_id > %s"
                " AND NOT EXISTS (SELECT FROM erasures WHERE prediction_id = feedback.prediction_id)"
                " ORDER BY prediction_id LIMIT %s",
                (after, limit),
            )
            return [row["prediction_id"] for row in cursor.fetchall()]

    def clock(self) -> datetime:
        """The database's time, one for all servers."""
        with self._transaction() as cursor:
            cursor.execute("SELECT clock_timestamp() AS now")
            return cursor.fetchone()["now"]

    def record_feedback(self, feedback: Feedback) -> bool:
        """Insert or replace this reader's verdict; whether it was news. An older one never replaces a newer one.

        The same again is news where it denies a correction that has come since.

        Raises `NotFound` on an unknown prediction, `Erased` on an erased one.
        """
        if not _storable(feedback.reader):
            raise NeuroLoopError("this reader's name cannot be recorded", why="it holds characters that are no text")
        try:
            with self._transaction() as cursor:
                _refuse_erased(cursor, feedback.prediction_id)
                cursor.execute(
                    "INSERT INTO feedback AS known (prediction_id, reader, verdict, label, created_at)"
                    " VALUES (%(prediction_id)s, %(reader)s, %(verdict)s, %(label)s, %(created_at)s)"
                    " ON CONFLICT (prediction_id, reader) DO UPDATE SET"
                    " verdict = excluded.verdict, label = excluded.label, created_at = excluded.created_at"
                    " WHERE known.created_at <= excluded.created_at"
                    " AND ((known.verdict, known.label) IS DISTINCT FROM (excluded.verdict, excluded.label)"
                    "      OR excluded.verdict IN ('agree', 'not_brain_mri') AND EXISTS ("
                    "          SELECT 1 FROM feedback AS other WHERE other.prediction_id = known.prediction_id"
                    "          AND other.verdict = 'correct' AND other.created_at > known.created_at))",
                    feedback.model_dump()
                    | {"verdict": feedback.verdict.value, "prediction_id": _lookup(feedback.prediction_id)},
                )
                return bool(cursor.rowcount)
        except errors.ForeignKeyViolation:
            raise unknown_prediction(feedback.prediction_id) from None
        except errors.CheckViolation:
            raise NeuroLoopError(
                "this feedback cannot be recorded", why="a class goes with the verdict `correct`, always and only"
            ) from None

    def feedback(self, prediction_id: str) -> list[Feedback]:
        """All readers' verdicts on one prediction, oldest first. Raises `Erased`."""
        with self._transaction() as cursor:
            _refuse_erased(cursor, prediction_id)
            cursor.execute(
                "SELECT * FROM feedback WHERE prediction_id = %s ORDER BY created_at, reader",
                (_lookup(prediction_id),),
            )
            return [Feedback(**row) for row in cursor.fetchall()]

    def mark_erased(self, erasure: Erasure) -> Erasure:
        """Mark a prediction as erased, for ever, and return the mark; the first one stands. Raises `NotFound`."""
        if not _storable(erasure.by):
            raise NeuroLoopError("this name cannot be recorded", why="it holds characters that are no text")
        with self._transaction() as cursor:
            cursor.execute(
                "INSERT INTO erasures (prediction_id, requested_at, reason, by)"
                " SELECT id, %(requested_at)s, %(reason)s, %(by)s FROM predictions WHERE id = %(prediction_id)s"
                " ON CONFLICT (prediction_id) DO NOTHING",
                erasure.model_dump() | {"prediction_id": _lookup(erasure.prediction_id)},
            )
            return _mark(cursor, erasure.prediction_id)

    def finish_erasure(self, prediction_id: str) -> Erasure:
        """Remove all content of a marked prediction from the database; a repeat changes nothing. Raises `NotFound`.

        Its idempotency key stays, as a hash, so that a retry does not bring the image back.
        """
        with self._transaction() as cursor:
            _mark(cursor, prediction_id)
            cursor.execute("DELETE FROM predictions WHERE id = %s", (prediction_id,))  # and its feedback, by the schema
            cursor.execute(
                "UPDATE requests SET fingerprint = '', explanation = NULL WHERE prediction_id = %s", (prediction_id,)
            )
            cursor.execute(
                "UPDATE erasures SET finished_at = now() WHERE prediction_id = %s AND finished_at IS NULL",
                (prediction_id,),
            )
            return _mark(cursor, prediction_id)

    def erasures(self, *, unfinished: bool = False, limit: int = 1000) -> list[Erasure]:
        """The marks, newest first; those that are `unfinished` alone, oldest first: who waits longest comes first."""
        which = "WHERE finished_at IS NULL ORDER BY requested_at" if unfinished else "ORDER BY requested_at DESC"
        with self._transaction() as cursor:
            cursor.execute(f"SELECT * FROM erasures {which}, prediction_id LIMIT %s", (limit,))
            return [Erasure(**row) for row in cursor.fetchall()]

    def erased(self, prediction_ids: Collection[str]) -> set[str]:
        """Those of the ids that are marked as erased."""
        with self._transaction() as cursor:
            cursor.execute("SELECT prediction_id FROM erasures WHERE prediction_id = ANY(%s)", (list(prediction_ids),))
            return {row["prediction_id"] for row in cursor.fetchall()}

    def record_promotion(self, promotion: Promotion) -> None:
        """Append a ledger row; a repeat of the same `run_id` changes nothing."""
        with self._transaction() as cursor:
            cursor.execute(
                "INSERT INTO promotions (run_id, created_at, version, previous, promoted, checks, metrics)"
                " SELECT * FROM json_to_record(%s) AS row (run_id text, created_at timestamptz, version text,"
                " previous text, promoted boolean, checks jsonb, metrics jsonb) ON CONFLICT (run_id) DO NOTHING",
                (promotion.model_dump_json(),),  # pydantic writes NaN, which JSON has not, as null
            )

    def promotions(self, limit: int = 100) -> list[Promotion]:
        """The ledger, newest first."""
        with self._transaction() as cursor:
            cursor.execute("SELECT * FROM promotions ORDER BY created_at DESC, run_id LIMIT %s", (limit,))
            return [Promotion(**row) for row in cursor.fetchall()]

    def promotions_since(self, run_id: str) -> list[Promotion]:
        """The ledger from the row of this pipeline run on, newest first; empty where it has none."""
        with self._transaction() as cursor:
            cursor.execute(
                "SELECT * FROM promotions WHERE created_at >= (SELECT created_at FROM promotions WHERE run_id = %s)"
                " ORDER BY created_at DESC, run_id",
                (run_id,),
            )
            return [Promotion(**row) for row in cursor.fetchall()]

    def monitoring(self) -> Monitoring:
        """Live figures of the last `MONITORING_DAYS`, from one snapshot of the database."""
        with self._transaction() as cursor:
            cursor.execute(_MONITORING, {"points": _GATE_SCORES, "days": MONITORING_DAYS})
            figures = Monitoring.model_validate_json(cursor.fetchone()["json_build_object"])
        return figures.model_copy(update={"feedback": dict.fromkeys(map(str, Verdict), 0) | figures.feedback})

    def record_end(self, end: PipelineEnd) -> None:
        """Note how a run of a DAG ended, in place of the DAG's earlier run that ended so."""
        with self._transaction() as cursor:
            cursor.execute(
                "INSERT INTO pipeline_ends AS known (dag, outcome, run_id, task, ended_at)"
                " VALUES (%(dag)s, %(outcome)s, %(run_id)s, %(task)s, %(ended_at)s)"
                " ON CONFLICT (dag, outcome) DO UPDATE SET"
                " run_id = excluded.run_id, task = excluded.task, ended_at = excluded.ended_at"
                " WHERE known.ended_at < excluded.ended_at",
                end.model_dump(),
            )

    def loop_figures(self) -> LoopFigures:
        """How the loop stands, at a cost that does not grow with the number of predictions."""
        with self._transaction() as cursor:
            cursor.execute(_LOOP_FIGURES)
            return LoopFigures.model_validate_json(cursor.fetchone()["figures"])

    def record_api_key(self, key: ApiKey) -> None:
        """Append one key. Raises `AlreadyExists` on a repeated id."""
        row = key.model_dump() | {"role": key.role.value}
        try:
            with self._transaction() as cursor:
                cursor.execute(
                    f"INSERT INTO api_keys ({', '.join(row)}) VALUES ({', '.join(f'%({name})s' for name in row)})", row
                )
        except errors.UniqueViolation:
            raise AlreadyExists(f"the key {key.id} is recorded already") from None

    def api_key(self, key_id: str) -> ApiKey | None:
        """One key, None where there is none of this id."""
        with self._transaction() as cursor:
            cursor.execute("SELECT * FROM api_keys WHERE id = %s", (key_id,))
            row = cursor.fetchone()
        return None if row is None else ApiKey(**row)

    def api_keys(self) -> list[ApiKey]:
        """All keys, newest first, those no longer valid included."""
        with self._transaction() as cursor:
            cursor.execute("SELECT * FROM api_keys ORDER BY created_at DESC, id")
            return [ApiKey(**row) for row in cursor.fetchall()]

    def revoke_api_key(self, key_id: str) -> ApiKey:
        """Make a key worthless; a second time changes nothing. Raises `NotFound`."""
        with self._transaction() as cursor:
            cursor.execute(
                "UPDATE api_keys SET revoked_at = coalesce(revoked_at, now()) WHERE id = %s RETURNING *",
                (_lookup(key_id),),
            )
            row = cursor.fetchone()
        if row is None:
            raise NotFound(f"there is no key {key_id!r}", fix="use an id that `neuroloop keys list` shows")
        return ApiKey(**row)

    def check(self) -> None:
        """Raise `Unavailable` unless the database answers and can be written to."""
        with self._transaction() as cursor:
            cursor.execute("SHOW transaction_read_only")
            if cursor.fetchone()["transaction_read_only"] == "on":
                raise Unavailable(
                    f"the database {self._name} takes no writes",
                    why="it is read-only, as a standby is, or one whose disk is full",
                    fix="check which server NEUROLOOP_DATABASE_URL leads to, and its disk",
                )

    def close(self) -> None:
        """Close the idle connections; a later call opens new ones."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._idle.get_nowait()[0].close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Any]:
        """A cursor whose rows are dicts; committed at the end, rolled back on an exception."""
        if not self._slots.acquire(timeout=self._timeout):
            raise Unavailable(
                f"the database {self._name} is busy", why="all connections of this process are in use", fix="try again"
            )
        connection = None
        try:
            self._migrate()
            connection = self._connection()
            with self._watch.over(connection):
                with connection.cursor(cursor_factory=psycopg2.extras.RealDictCursor) as cursor:
                    yield cursor
                try:
                    connection.commit()
                except (psycopg2.OperationalError, psycopg2.InterfaceError) as error:
                    self._fail(error, Uncertain)  # the server may have committed before its answer was lost
        except (psycopg2.OperationalError, psycopg2.InterfaceError, errors.ReadOnlySqlTransaction) as error:
            self._fail(error)
        finally:
            if connection is not None:
                with contextlib.suppress(psycopg2.Error):
                    connection.rollback()  # does nothing after a commit
                if not connection.closed:
                    self._idle.put((connection, time.monotonic()))
            self._slots.release()

    def _connection(self) -> Any:
        """An idle connection that still answers, or a new one; a restarted server leaves dead ones behind.

        Of one that was used a moment ago the socket says as much: nothing is to be read from it unless the other side
        has gone.
        """
        with contextlib.suppress(queue.Empty):
            while True:
                connection, since = self._idle.get_nowait()
                try:
                    if time.monotonic() - since < _TRUSTED_SECONDS and not _to_be_read(connection):
                        return connection
                    with self._watch.over(connection), connection.cursor() as cursor:
                        cursor.execute("SELECT 1")
                    return connection
                except (psycopg2.Error, OSError):
                    connection.close()
        return self._connect(self._timeout)

    def _connect(self, statement_seconds: float) -> Any:
        return psycopg2.connect(self._url, **_session(statement_seconds))

    def migrate(self) -> list[str]:
        """Bring the schema up to date now; the names of the SQL files that were missing. Raises `Unavailable`."""
        try:
            return self._migrate()
        except psycopg2.Error as error:
            self._fail(error)

    def _migrate(self) -> list[str]:
        """Apply the SQL files not applied yet, once per database however many processes start at once."""
        with self._migrating:
            if self._migrated:
                return []
            if self._is_up_to_date():
                self._migrated = True
                return []
            import yoyo  # slow to load, and seldom needed

            with contextlib.closing(self._connect(_MIGRATION_SECONDS)) as holder, holder.cursor() as cursor:
                # yoyo's own lock, while it makes its tables, is a row, which a killed process leaves behind. This one
                # ends with the connection, so whoever holds it may break that one.
                cursor.execute("SELECT pg_advisory_lock(%s)", (_MIGRATION_LOCK,))
                with yoyo.get_backend(_with_session(self._url, _MIGRATION_SECONDS)) as backend:
                    backend.break_lock()
                    missing = backend.to_apply(yoyo.read_migrations(str(_MIGRATIONS)))
                    for migration in missing:
                        # yoyo alone commits the mark after the steps: a process killed in between would leave a
                        # database on which every later one tries the same steps, in vain.
                        with backend.transaction():
                            migration.process_steps(backend, "apply")
                            backend.mark_one(migration)
            self._migrated = True
            return [str(migration.id) for migration in missing]

    def _is_up_to_date(self) -> bool:
        """Whether yoyo has noted every SQL file as applied; its connection is kept."""
        files = {file.stem for file in _MIGRATIONS.glob("*.sql") if not file.stem.endswith(".rollback")}
        connection = self._connection()
        try:
            with self._watch.over(connection), connection.cursor() as cursor:
                cursor.execute("SELECT to_regclass('_yoyo_migration') IS NOT NULL")
                if not cursor.fetchone()[0]:
                    return False
                cursor.execute("SELECT migration_id FROM _yoyo_migration")
                return files <= {name for (name,) in cursor.fetchall()}
        finally:
            with contextlib.suppress(psycopg2.Error):
                connection.rollback()
            if not connection.closed:
                self._idle.put((connection, time.monotonic()))

    def _fail(self, error: psycopg2.Error, kind: type[Unavailable] = Unavailable) -> NoReturn:
        if isinstance(error, errors.DiskFull):
            kind = OutOfSpace
        raise kind(
            f"the database {self._name} cannot be used",
            why=" ".join(str(error).split()),
            fix="check that PostgreSQL runs and that NEUROLOOP_DATABASE_URL names it",
        ) from error


class _Watch:
    """Cuts connections whose server has fallen silent.

    PostgreSQL's own time limit needs a server that works. Of one that hangs, or whose machine does, a client hears
    nothing and would wait for ever, and its thread with it; cutting the socket ends the wait with an error.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._deadlines: dict[Any, float] = {}
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def over(self, connection: Any) -> Iterator[None]:
        """Allow the block `seconds` on this connection."""
        with self._changed:
            if self._thread is None or not self._thread.is_alive():  # also in a forked child
                self._thread = threading.Thread(target=self._cut, name="postgres-watch", daemon=True)
                self._thread.start()
            if not self._deadlines:
                self._changed.notify()
            self._deadlines[connection] = time.monotonic() + self._seconds
        try:
            yield
        finally:
            with self._changed:
                self._deadlines.pop(connection, None)

    def _cut(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._deadlines)
                late = [each for each, deadline in self._deadlines.items() if deadline < time.monotonic()]
                for connection in late:
                    del self._deadlines[connection]
                    with (
                        contextlib.suppress(psycopg2.Error, OSError),
                        socket.socket(fileno=os.dup(connection.fileno())) as wire,
                    ):
                        wire.shutdown(socket.SHUT_RDWR)
            time.sleep(0.5)


def _to_be_read(connection: Any) -> bool:
    """Whether an idle connection's socket has something to read, such as its end."""
    poll = select.poll()  # not select(), which takes no descriptor beyond 1,023
    poll.register(connection.fileno(), select.POLLIN)
    return bool(poll.poll(0))


def _prediction(row: dict[str, Any]) -> Prediction:
    gate = {name: row.pop(f"gate_{name}") for name in GateResult.model_fields}
    return Prediction(**row, gate=GateResult(**gate))


def _refuse_erased(cursor: Any, prediction_id: str) -> None:
    """Raise `Erased` where the prediction is marked so."""
    cursor.execute("SELECT * FROM erasures WHERE prediction_id = %s", (_lookup(prediction_id),))
    row = cursor.fetchone()
    if row is not None:
        raise Erased(
            f"Prediction {prediction_id} was erased",
            why=f"at {row['requested_at']:%Y-%m-%d %H:%M} UTC ({row['reason']})",
            fix="to upload the image again, send another Idempotency-Key",
        )


def _mark(cursor: Any, prediction_id: str) -> Erasure:
    cursor.execute("SELECT * FROM erasures WHERE prediction_id = %s", (_lookup(prediction_id),))
    row = cursor.fetchone()
    if row is None:
        raise unknown_prediction(prediction_id)
    return Erasure(**row)


def _session(statement_seconds: float) -> dict[str, str | int]:
    """Connection parameters: no wait without an end, and times in UTC."""
    milliseconds = int(statement_seconds * 1000)
    return {
        "connect_timeout": 5,
        "tcp_user_timeout": milliseconds,
        "keepalives_idle": 30,
        "application_name": "neuroloop",
        "options": f"-c statement_timeout={milliseconds} -c TimeZone=UTC",
    }


def _with_session(url: str, statement_seconds: float) -> str:
    parts = urlsplit(url)
    parameters = dict(parse_qsl(parts.query)) | {k: str(v) for k, v in _session(statement_seconds).items()}
    return urlunsplit(parts._replace(query=urlencode(parameters)))


def _storable(text: str) -> bool:
    """Whether PostgreSQL can hold `text`: neither NUL nor half a surrogate pair."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


def _lookup(prediction_id: str) -> str:
    """The id, unless nothing can be recorded under it."""
    if not _storable(prediction_id):
        raise unknown_prediction(prediction_id)
    return prediction_id
