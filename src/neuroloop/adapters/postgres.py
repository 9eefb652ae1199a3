"""Predictions, feedback and the promotion ledger in PostgreSQL, through psycopg2."""

import contextlib
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import psycopg2
import psycopg2.extras
from psycopg2 import errors

from neuroloop.core.credentials import ApiKey
from neuroloop.core.errors import AlreadyExists, NeuroLoopError, NotFound, Unavailable
from neuroloop.core.schemas import Feedback, GateResult, Monitoring, Prediction, Promotion, Verdict

_MIGRATIONS = Path(__file__).parent / "migrations"
_MIGRATION_LOCK = 0x6E6575726F  # "neuro": any number that nothing else in this database locks
_MIGRATION_SECONDS = 120
_GATE_SCORES = 500

_MONITORING = """
SELECT json_build_object(
    'predictions', (SELECT count(*) FROM predictions),
    'accepted', (SELECT count(*) FROM predictions WHERE gate_accepted),
    'rejected', (SELECT count(*) FROM predictions WHERE NOT gate_accepted),
    'referred', (SELECT count(*) FROM predictions WHERE refer),
    'per_class', (
        SELECT coalesce(json_object_agg(label, json_build_object(
            'predictions', n, 'mean_probability', probability, 'mean_seconds', mean, 'p95_seconds', p95,
            'referred', referred)), '{}')
        FROM (
            SELECT label, count(*) AS n, count(*) FILTER (WHERE refer) AS referred,
                avg((probabilities ->> label)::float8) AS probability,
                avg(seconds) AS mean, percentile_cont(0.95) WITHIN GROUP (ORDER BY seconds) AS p95
            FROM predictions WHERE label IS NOT NULL GROUP BY label
        ) AS classes
    ),
    'gate_scores', (
        SELECT coalesce(json_agg(json_build_object('at', at, 'score', score, 'accepted', accepted) ORDER BY at), '[]')
        FROM (
            SELECT created_at AS at, gate_score AS score, gate_accepted AS accepted
            FROM predictions ORDER BY created_at DESC LIMIT %(points)s
        ) AS latest
    ),
    'feedback', (
        SELECT coalesce(json_object_agg(verdict, n), '{}')
        FROM (SELECT verdict, count(*) AS n FROM feedback GROUP BY verdict) AS verdicts
    )
)::text
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
        parts = urlsplit(url)
        self._name = f"{parts.hostname or 'localhost'}:{parts.port or 5432}{parts.path}"  # for messages: no password
        self._timeout = timeout
        self._slots = threading.BoundedSemaphore(connections)
        self._idle: queue.LifoQueue[Any] = queue.LifoQueue()
        self._migrating = threading.Lock()
        self._migrated = False

    def record_prediction(self, prediction: Prediction) -> None:
        """Append one row. Raises `AlreadyExists` on a repeated id."""
        row = prediction.model_dump(exclude={"gate", "probabilities", "prediction_sets"})
        row |= {f"gate_{name}": value for name, value in prediction.gate.model_dump().items()}
        row["probabilities"] = psycopg2.extras.Json(prediction.probabilities)
        row["prediction_sets"] = psycopg2.extras.Json(prediction.prediction_sets)
        try:
            with self._transaction() as cursor:
                cursor.execute(
                    f"INSERT INTO predictions ({', '.join(row)}) VALUES ({', '.join(f'%({name})s' for name in row)})",
                    row,
                )
        except errors.UniqueViolation:
            raise AlreadyExists(f"prediction {prediction.id} is recorded already") from None

    def prediction(self, prediction_id: str) -> Prediction:
        """One row. Raises `NotFound`."""
        with self._transaction() as cursor:
            cursor.execute("SELECT * FROM predictions WHERE id = %s", (_lookup(prediction_id),))
            row = cursor.fetchone()
        if row is None:
            raise NotFound(f"there is no prediction {prediction_id!r}")
        gate = {name: row.pop(f"gate_{name}") for name in GateResult.model_fields}
        return Prediction(**row, gate=GateResult(**gate))

    def record_feedback(self, feedback: Feedback) -> None:
        """Insert or replace this reader's verdict. Raises `NotFound` on an unknown prediction."""
        if not _storable(feedback.reader):
            raise NeuroLoopError("this reader's name cannot be recorded", why="it holds characters that are no text")
        try:
            with self._transaction() as cursor:
                cursor.execute(
                    "INSERT INTO feedback (prediction_id, reader, verdict, label, created_at)"
                    " VALUES (%(prediction_id)s, %(reader)s, %(verdict)s, %(label)s, %(created_at)s)"
                    " ON CONFLICT (prediction_id, reader) DO UPDATE SET"
                    " verdict = excluded.verdict, label = excluded.label, created_at = excluded.created_at",
                    feedback.model_dump()
                    | {"verdict": feedback.verdict.value, "prediction_id": _lookup(feedback.prediction_id)},
                )
        except errors.ForeignKeyViolation:
            raise NotFound(f"there is no prediction {feedback.prediction_id!r}") from None
        except errors.CheckViolation:
            raise NeuroLoopError(
                "this feedback cannot be recorded", why="a class goes with the verdict `correct`, always and only"
            ) from None

    def feedback(self, prediction_id: str) -> list[Feedback]:
        """All readers' verdicts on one prediction, oldest first."""
        with self._transaction() as cursor:
            cursor.execute(
                "SELECT * FROM feedback WHERE prediction_id = %s ORDER BY created_at, reader",
                (_lookup(prediction_id),),
            )
            return [Feedback(**row) for row in cursor.fetchall()]

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

    def monitoring(self) -> Monitoring:
        """Live figures over all rows, from one snapshot of the database."""
        with self._transaction() as cursor:
            cursor.execute(_MONITORING, {"points": _GATE_SCORES})
            figures = Monitoring.model_validate_json(cursor.fetchone()["json_build_object"])
        return figures.model_copy(update={"feedback": dict.fromkeys(map(str, Verdict), 0) | figures.feedback})

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
        """Raise `Unavailable` unless the database answers."""
        with self._transaction() as cursor:
            cursor.execute("SELECT 1")

    def close(self) -> None:
        """Close the idle connections; a later call opens new ones."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._idle.get_nowait().close()

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
            with connection.cursor(cursor_factory=psycopg2.extras.RealDictCursor) as cursor:
                yield cursor
            connection.commit()
        except (psycopg2.OperationalError, psycopg2.InterfaceError) as error:
            self._fail(error)
        finally:
            if connection is not None:
                with contextlib.suppress(psycopg2.Error):
                    connection.rollback()  # does nothing after a commit
                if not connection.closed:
                    self._idle.put(connection)
            self._slots.release()

    def _connection(self) -> Any:
        """An idle connection that still answers, or a new one; a restarted server leaves dead ones behind."""
        with contextlib.suppress(queue.Empty):
            while True:
                connection = self._idle.get_nowait()
                try:
                    with connection.cursor() as cursor:
                        cursor.execute("SELECT 1")
                    return connection
                except psycopg2.Error:
                    connection.close()
        return self._connect(self._timeout)

    def _connect(self, statement_seconds: float) -> Any:
        return psycopg2.connect(self._url, **_session(statement_seconds))

    def _migrate(self) -> None:
        """Apply the SQL files not applied yet, once per database however many processes start at once."""
        with self._migrating:
            if self._migrated:
                return
            import yoyo

            with contextlib.closing(self._connect(_MIGRATION_SECONDS)) as holder, holder.cursor() as cursor:
                # yoyo's own lock is a row, which a killed process leaves behind; this one ends with the connection.
                cursor.execute("SELECT pg_advisory_lock(%s)", (_MIGRATION_LOCK,))
                with yoyo.get_backend(_with_session(self._url, _MIGRATION_SECONDS)) as backend:
                    backend.apply_migrations(backend.to_apply(yoyo.read_migrations(str(_MIGRATIONS))))
            self._migrated = True

    def _fail(self, error: psycopg2.Error) -> NoReturn:
        raise Unavailable(
            f"the database {self._name} cannot be used",
            why=" ".join(str(error).split()),
            fix="check that PostgreSQL runs and that NEUROLOOP_DATABASE_URL names it",
        ) from error


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
        raise NotFound(f"there is no prediction {prediction_id!r}")
    return prediction_id
