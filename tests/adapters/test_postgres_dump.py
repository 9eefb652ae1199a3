"""A database as bytes and back, on a real PostgreSQL."""

from datetime import UTC, datetime

import psycopg2
import pytest

from adapters.test_prediction_log import prediction, promotion
from neuroloop.adapters.postgres import PostgresLog
from neuroloop.adapters.postgres_dump import PostgresDump
from neuroloop.core.errors import AlreadyExists, InvalidSetting, NeuroLoopError, Unavailable
from neuroloop.core.schemas import DatabaseDump, Erasure, Feedback, PipelineEnd, Verdict

AWKWARD = "tab\t, line\nfeed, back\\slash, \\N, \\., 'quotes', ünïcode \U0001f9e0"
TABLES = """
CREATE TABLE "Odd Name" (id serial PRIMARY KEY, text text DEFAULT 'x''y', up integer REFERENCES "Odd Name" (id));
CREATE TABLE b (
    id bigint GENERATED ALWAYS AS IDENTITY, at timestamptz NOT NULL DEFAULT now(), price numeric(12, 3), raw bytea,
    doc jsonb, real float8, odd integer NOT NULL REFERENCES "Odd Name" (id) ON DELETE CASCADE,
    state text, short varchar(9),
    CONSTRAINT states CHECK (state IN ('on', 'off')), UNIQUE (id, state)
);
CREATE TABLE empty (a boolean);
CREATE TABLE made (n integer, doubled integer GENERATED ALWAYS AS (n * 2) STORED, after text);
INSERT INTO made (n, after) VALUES (21, 'z');
CREATE FUNCTION never() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION 'rows of % stay', TG_TABLE_NAME; END; $$;
CREATE TRIGGER kept BEFORE INSERT OR UPDATE OR DELETE ON made FOR EACH ROW EXECUTE FUNCTION never();
CREATE SEQUENCE free INCREMENT 5 START 7;
CREATE INDEX partial ON b (price DESC) WHERE state = 'on';
CREATE UNIQUE INDEX lowered ON "Odd Name" (lower(text));
"""


def execute(url: str, *statements: str, values: tuple = ()) -> list:
    with psycopg2.connect(url) as connection, connection.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement, values or None)
        return cursor.fetchall() if cursor.description else []


def dumped(url: str, part_bytes: int = 16_000_000) -> tuple[DatabaseDump, dict[str, bytes]]:
    parts: dict[str, bytes] = {}
    return PostgresDump(url, part_bytes=part_bytes).dump(parts.__setitem__), parts


@pytest.fixture
def full(postgres_url: str) -> str:
    execute(postgres_url, TABLES)
    execute(postgres_url, 'INSERT INTO "Odd Name" (text, up) VALUES (%s, NULL), (NULL, 1)', values=(AWKWARD,))
    execute(postgres_url, 'INSERT INTO "Odd Name" (text, up) SELECT n::text, 1 FROM generate_series(1, 2000) n')
    row = (datetime(2026, 3, 4, 5, 6, 7, 891234, UTC), "12.300", b"\0\\\xff", '{"a": [1, null]}', 0.1 + 0.2)
    execute(
        postgres_url,
        "INSERT INTO b (at, price, raw, doc, real, odd, state) VALUES (%s, %s, %s, %s, %s, 2, 'on')",
        values=row,
    )
    execute(postgres_url, "SELECT nextval('free'), nextval('free')")
    return postgres_url


def test_everything_comes_back_and_a_second_dump_is_the_same(full: str, postgres_server):
    dump, parts = dumped(full, 1000)  # so that a few rows are several parts
    assert len(parts) > 5
    other = postgres_server.new_database()
    assert PostgresDump(other).empty()
    PostgresDump(other).load(dump, parts.__getitem__)
    again, same = dumped(other, 1000)
    assert again.before == dump.before
    assert again.after == dump.after
    assert again == dump
    assert same == parts
    assert not PostgresDump(other).empty()
    assert execute(other, 'SELECT text FROM "Odd Name" WHERE id = 1') == [(AWKWARD,)]


def test_what_counts_and_what_constrains_goes_on_where_it_was(full: str, postgres_server):
    dump, parts = dumped(full)
    other = postgres_server.new_database()
    PostgresDump(other).load(dump, parts.__getitem__)
    assert execute(other, """INSERT INTO "Odd Name" (text) VALUES ('new') RETURNING id""") == [(2003,)]
    assert execute(other, "INSERT INTO b (odd) VALUES (1) RETURNING id") == [(2,)]
    assert execute(other, "SELECT nextval('free')") == [(17,)]
    assert execute(other, "SELECT * FROM made") == [(21, 42, "z")]
    with pytest.raises(psycopg2.errors.RaiseException, match="rows of made stay"):
        execute(other, "DELETE FROM made")
    for wrong, error in (
        ("INSERT INTO b (odd) VALUES (-1)", psycopg2.errors.ForeignKeyViolation),
        ("INSERT INTO b (odd, state) VALUES (1, 'none')", psycopg2.errors.CheckViolation),
        ("""INSERT INTO "Odd Name" (text) VALUES ('NEW')""", psycopg2.errors.UniqueViolation),
        ("INSERT INTO b (odd) VALUES (NULL)", psycopg2.errors.NotNullViolation),
    ):
        with pytest.raises(error):
            execute(other, wrong)
    execute(other, """DROP TABLE "Odd Name" CASCADE""")
    assert execute(other, "SELECT 1 FROM pg_class WHERE relname = 'Odd Name_id_seq'") == []  # it was owned


def test_the_prediction_log_works_on_after_it_was_brought_to_another_server(postgres_url, postgres_server):
    log, row, gone = PostgresLog(postgres_url), prediction(), prediction(None)
    log.claim("key", row.id, "asked")
    log.record_prediction(row, request="key", explanation={"cam": "x"})
    log.record_prediction(gone)
    log.record_feedback(Feedback(prediction_id=row.id, reader=AWKWARD, verdict=Verdict.CORRECT, label="pituitary"))
    log.mark_erased(Erasure(prediction_id=gone.id, reason="mistake", by="ann"))
    log.record_promotion(promotion("one", macro_f1=0.9))
    log.record_end(PipelineEnd(dag="d", outcome="done", run_id="r", task="t"))
    dump, parts = dumped(postgres_url)
    other = postgres_server.new_database()
    PostgresDump(other).load(dump, parts.__getitem__)
    moved = PostgresLog(other)
    assert moved.prediction(row.id) == row
    assert moved.feedback(row.id) == log.feedback(row.id)
    assert moved.claim("key", "another", "asked") == log.claim("key", "another", "asked")
    assert moved.erasures() == log.erasures()
    assert moved.promotions() == log.promotions()
    assert moved.loop_figures() == log.loop_figures()
    moved.finish_erasure(gone.id)
    assert execute(other, "SELECT migration_id FROM _yoyo_migration ORDER BY 1") == execute(
        postgres_url, "SELECT migration_id FROM _yoyo_migration ORDER BY 1"
    )


def test_a_dump_is_of_one_moment_whatever_is_written_meanwhile(postgres_url: str):
    execute(postgres_url, "CREATE TABLE a (n integer)", "CREATE TABLE z (n integer)")
    execute(postgres_url, "INSERT INTO a SELECT generate_series(1, 9)")

    def write(name: str, data: bytes) -> None:
        if name.startswith("a/"):
            execute(postgres_url, "INSERT INTO z VALUES (1)")

    dump = PostgresDump(postgres_url).dump(write)
    assert {table.name: table.rows for table in dump.tables} == {"a": 9, "z": 0}
    assert execute(postgres_url, "SELECT count(*) FROM z") == [(1,)]


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("CREATE VIEW v AS SELECT 1", "view v"),
        ("CREATE TYPE mood AS ENUM ('good')", "type mood"),
        ("CREATE AGGREGATE total (integer) (SFUNC = int4pl, STYPE = integer)", "aggregate total"),
        ("CREATE TABLE p (n integer) PARTITION BY RANGE (n)", "partitioned table p"),
        ("CREATE SCHEMA other CREATE TABLE t (n integer)", "schema other"),
    ],
)
def test_what_cannot_be_carried_over_is_refused_by_name(postgres_url: str, statement: str, named: str):
    execute(postgres_url, statement)
    with pytest.raises(NeuroLoopError, match=named):
        dumped(postgres_url)


def test_a_damaged_part_or_a_full_database_stops_a_restore_and_leaves_nothing(full: str, postgres_server):
    dump, parts = dumped(full)
    other = postgres_server.new_database()
    broken = {name: data.replace(b"2000", b"2001") for name, data in parts.items()}
    with pytest.raises(NeuroLoopError, match="damaged"):
        PostgresDump(other).load(dump, broken.__getitem__)
    assert PostgresDump(other).empty()
    assert execute(other, "SELECT 1 FROM pg_class WHERE relkind = 'S'") == []
    PostgresDump(other).load(dump, parts.__getitem__)
    with pytest.raises(AlreadyExists, match="not empty"):
        PostgresDump(other).load(dump, parts.__getitem__)


def test_an_unreachable_database_is_unavailable_and_its_password_stays_secret(free_port):
    with pytest.raises(Unavailable) as caught:
        PostgresDump(f"postgresql://user:hunter2@127.0.0.1:{free_port()}/name").empty()  # pragma: allowlist secret
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("rest", ["S3cr%et@host/name", "S3c/ret@host/name", "S3cret@[]/name", "S3cret@host/name?x=1"])
def test_a_url_that_the_client_cannot_read_is_refused_and_its_password_stays_secret(rest):
    with pytest.raises(InvalidSetting, match="percent-encoded") as caught:
        PostgresDump(f"postgresql://user:{rest}")
    assert "S3c" not in str(caught.value)
