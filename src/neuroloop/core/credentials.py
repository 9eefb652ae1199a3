"""API keys: what one is, how it is made, and how it is told from a wrong one.

A key is `nl_<id>_<secret>`. The id finds the row, the secret proves the holder; only the secret's SHA-256 is kept. A
fast hash is right here, unlike for a password: the secret has 256 random bits, so there is nothing to guess.
"""

import hashlib
import hmac
import re
import secrets
from datetime import datetime
from enum import StrEnum

from pydantic import Field

from neuroloop.core.schemas import Record, now

_FORM = re.compile(r"nl_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
LONGEST_NAME = 100
_NAME = re.compile(rf"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{{1,{LONGEST_NAME}}}")


class Role(StrEnum):
    """What the holder of a key may do; each role may do all that the ones before it may."""

    UPLOADER = "uploader"
    READER = "reader"
    ADMIN = "admin"

    def covers(self, needed: "Role") -> bool:
        """Whether this role may do what `needed` may."""
        order = list(Role)
        return order.index(self) >= order.index(needed)

    def lowered(self, wanted: "Role") -> "Role":
        """The lesser of the two: a role can be given up for a request, never gained."""
        return wanted if self.covers(wanted) else self


class ApiKey(Record):
    """One key as it is kept: without its secret."""

    id: str
    name: str = Field(description="Who holds it; verdicts and uploads made with it carry this name")
    role: Role
    delegates: bool = Field(
        default=False, description="May name the person it acts for, as the frontend does for whoever signed in"
    )
    digest: str = Field(description="SHA-256 of the secret, hex")
    created_at: datetime = Field(default_factory=now)
    expires_at: datetime | None = None
    revoked_at: datetime | None = None

    def matches(self, secret: str) -> bool:
        """Whether `secret` is this key's; takes the same time wherever the first difference is."""
        return hmac.compare_digest(self.digest, _digest(secret))

    def standing(self) -> str:
        """`valid`, `revoked` or `expired`."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= now() else "valid"


def new_key() -> str:
    """A fresh random key; whoever asked for it sees it now or never."""
    return f"nl_{secrets.token_hex(6)}_{secrets.token_urlsafe(32)}"


def parted(key: str) -> tuple[str, str] | None:
    """Id and secret of a key, None where it has not the form of one."""
    found = _FORM.fullmatch(key)
    return (found[1], found[2]) if found else None


def recorded(key: str, *, name: str, role: Role, delegates: bool = False, expires_at: datetime | None = None) -> ApiKey:
    """What is kept of `key`. Raises `ValueError` where it, or the name, has not the right form."""
    parts = parted(key)
    if parts is None:
        raise ValueError("it is no key; `neuroloop keys create` and `make up` make one")
    if not valid_name(name):
        raise ValueError(f"a name has 1 to {LONGEST_NAME} characters, none of them a control character")
    return ApiKey(
        id=parts[0], name=name, role=role, delegates=delegates, digest=_digest(parts[1]), expires_at=expires_at
    )


def valid_name(name: str) -> bool:
    """Whether `name` can stand for a person or a key: printable, not blank, not too long."""
    return _NAME.fullmatch(name) is not None and name.strip() == name


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
