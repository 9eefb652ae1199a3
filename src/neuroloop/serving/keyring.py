"""Making, listing and revoking API keys: what the command line and the admin's routes both do."""

import logging
from datetime import datetime, timedelta

from pydantic import Field

from neuroloop.core.credentials import ApiKey, Role, new_key, recorded
from neuroloop.core.errors import NeuroLoopError
from neuroloop.core.ports import ApiKeys
from neuroloop.core.schemas import Record, now

_LOG = logging.getLogger(__name__)


class KeyShown(Record):
    """A key as it is listed; nothing in it opens anything."""

    id: str
    name: str
    role: Role
    delegates: bool = Field(description="May name the person it acts for, as the frontend's does")
    standing: str = Field(description="valid, revoked or expired")
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None

    @classmethod
    def of(cls, key: ApiKey) -> "KeyShown":
        """The key without its digest."""
        return cls(**key.model_dump(exclude={"digest"}), standing=key.standing())


MOST_DAYS = 3650
"""Longest life of a key that is to end."""


class KeyMade(KeyShown):
    """A key that was just made."""

    key: str = Field(description="The key itself. It is shown this once; only its hash is kept")


class InvalidKey(NeuroLoopError):
    """A key that cannot be made as asked."""


def create(keys: ApiKeys, name: str, role: Role, *, days: float | None = None, by: str) -> KeyMade:
    """Make and record a key. Raises `InvalidKey`, `Unavailable`."""
    if days is not None and not 0 < days <= MOST_DAYS:
        raise InvalidKey(f"A key cannot last {days:g} days", fix=f"give it more than 0 and at most {MOST_DAYS}")
    plain = new_key()
    expires_at = None if days is None else now() + timedelta(days=days)
    try:
        key = recorded(plain, name=name, role=role, expires_at=expires_at)
    except ValueError as error:
        raise InvalidKey("The key cannot be made", why=str(error)) from None
    keys.record_api_key(key)
    _LOG.info("key %s was made by %s, role %s", key.id, by, role)
    return KeyMade(**dict(KeyShown.of(key)), key=plain)


def listed(keys: ApiKeys) -> list[KeyShown]:
    """All keys, newest first, those no longer valid included. Raises `Unavailable`."""
    return [KeyShown.of(key) for key in keys.api_keys()]


def revoke(keys: ApiKeys, key_id: str, *, by: str) -> KeyShown:
    """Make a key worthless, within seconds on every server. Raises `NotFound`, `Unavailable`."""
    key = keys.revoke_api_key(key_id)
    _LOG.info("key %s was revoked by %s", key.id, by)
    return KeyShown.of(key)
