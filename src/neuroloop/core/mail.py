"""Mails as the local sink keeps them."""

from datetime import UTC, datetime
from email import message_from_bytes, policy
from typing import Any

from neuroloop.core.schemas import Mail


def parse_mail(data: bytes) -> Mail:
    """A mail as it was received, whatever its form: one that is broken must not hide the others.

    A date that is missing or malformed becomes 1970, a text of an unknown character set what UTF-8 makes of it.
    """
    message = message_from_bytes(data, policy=policy.default)
    part = message.get_body(preferencelist=("plain", "html"))
    sent = getattr(message["Date"], "datetime", None) or datetime.fromtimestamp(0, UTC)
    return Mail(
        at=sent if sent.tzinfo else sent.replace(tzinfo=UTC),
        to=str(message["To"] or ""),
        subject=str(message["Subject"] or ""),
        body=_text(part) if part is not None else "",
    )


def _text(part: Any) -> str:
    try:
        return str(part.get_content())
    except (LookupError, ValueError):  # an unknown character set or encoding
        content = part.get_payload(decode=True)
        return content.decode(errors="replace") if isinstance(content, bytes) else str(content)
