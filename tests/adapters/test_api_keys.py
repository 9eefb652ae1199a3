"""The contract of `ports.ApiKeys`, on a real PostgreSQL."""

from datetime import timedelta

import pytest

from neuroloop.adapters.postgres import PostgresLog
from neuroloop.core.credentials import Role, new_key, recorded
from neuroloop.core.errors import AlreadyExists, NotFound
from neuroloop.core.schemas import now


@pytest.fixture
def keys(postgres_url: str) -> PostgresLog:
    return PostgresLog(postgres_url)


def key(name: str = "ann", **more):
    return recorded(new_key(), name=name, role=Role.READER, **more)


def test_a_key_comes_back_as_it_was_recorded(keys: PostgresLog):
    rows = key(), key("Zoë", expires_at=now() + timedelta(days=1)), key(delegates=True)
    for row in rows:
        keys.record_api_key(row)
    assert [keys.api_key(row.id) for row in rows] == list(rows)
    assert keys.api_keys() == list(reversed(rows))


def test_an_unknown_key_is_none_and_cannot_be_revoked(keys: PostgresLog):
    assert keys.api_key("000000000000") is None
    for unknown in ("000000000000", "a\0b"):
        with pytest.raises(NotFound):
            keys.revoke_api_key(unknown)


def test_a_repeated_id_is_refused(keys: PostgresLog):
    first = key()
    keys.record_api_key(first)
    with pytest.raises(AlreadyExists):
        keys.record_api_key(first.model_copy(update={"name": "eve"}))
    assert keys.api_key(first.id) == first


def test_a_revoked_key_stays_revoked_since_the_first_time(keys: PostgresLog):
    row = key()
    keys.record_api_key(row)
    revoked = keys.revoke_api_key(row.id)
    assert revoked.standing() == "revoked"
    assert keys.revoke_api_key(row.id) == revoked == keys.api_key(row.id)
