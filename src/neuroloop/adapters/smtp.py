"""Mail by SMTP, and the local sink that keeps mails in the object store for the frontend to show."""

import asyncio
import hashlib
import logging
import signal
import smtplib
import socket
import ssl
import threading
import uuid
from email import message_from_bytes, policy
from email.message import EmailMessage
from email.utils import format_datetime, make_msgid
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from neuroloop.core import keys
from neuroloop.core.errors import NeuroLoopError, Unavailable
from neuroloop.core.ports import ObjectStore
from neuroloop.core.schemas import RESEARCH_NOTICE, now

if TYPE_CHECKING:
    from aiosmtpd.controller import Controller

log = logging.getLogger(__name__)
_TIMEOUT = 10.0  # seconds, for each step of the conversation
_MAIL_BYTES = 1_000_000  # the sink refuses larger ones; the platform's own are a few kilobytes
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_DOMAIN = "neuroloop.invalid"


class SmtpNotifier:
    """`ports.Notifier` by SMTP.

    `url` is `smtp://[user:password@]host[:port]` or `smtps://...`; a password is sent over smtp:// only after
    STARTTLS, or to this machine. `receivers` are comma-separated.
    """

    def __init__(self, url: str, sender: str, receivers: str) -> None:
        parts = urlsplit(url)
        self._tls = parts.scheme == "smtps"
        self._host = parts.hostname or "127.0.0.1"
        self._port = parts.port or (465 if self._tls else 25)
        self._user = unquote(parts.username or "")
        self._password = unquote(parts.password or "")
        self._sender = _encodable(sender)
        self._receivers = [address.strip() for address in _encodable(receivers).split(",") if address.strip()]

    def send(self, subject: str, body: str, *, once: str = "") -> None:
        """Send one plain-text mail, with the research notice below it. Raises `Unavailable`.

        A server that takes it for some receivers only is no error: who is left out, and why, is logged as a warning.
        Mails of one occasion, `once`, have the same Message-ID, by which the local sink and most mail servers keep one.
        """
        message = EmailMessage()
        message["Subject"] = _encodable(" ".join(subject.split()))  # a line break would start another header
        message["From"] = self._sender
        message["To"] = ", ".join(self._receivers)
        message["Date"] = format_datetime(now())
        own = f"<{hashlib.sha256(_encodable(once).encode()).hexdigest()}@{_DOMAIN}>" if once else ""
        message["Message-ID"] = own or make_msgid(domain=_DOMAIN)  # the default asks the DNS for this host
        message.set_content(f"{_encodable(body.rstrip())}\n\n--\n{RESEARCH_NOTICE}\n")
        try:
            with self._connect() as server:
                if self._user:
                    self._log_in(server)
                refused = server.send_message(message, self._sender, self._receivers)
        except (OSError, smtplib.SMTPException) as error:
            raise Unavailable(
                f"the mail {message['Subject']!r} could not be sent by {self._host}:{self._port}",
                why=str(error) or type(error).__name__,
                fix="check NEUROLOOP_NOTIFY_URL, NEUROLOOP_NOTIFY_FROM and NEUROLOOP_NOTIFY_TO",
            ) from error
        for receiver, (code, words) in refused.items():
            said = " ".join(words.decode(errors="replace").split())
            log.warning(
                "the mail %r went to others but not to %s: %s:%d said %d %s; check NEUROLOOP_NOTIFY_TO",
                *(message["Subject"], receiver, self._host, self._port, code, said),
            )

    def _connect(self) -> smtplib.SMTP:
        if self._tls:
            context = ssl.create_default_context()
            return smtplib.SMTP_SSL(self._host, self._port, "localhost", timeout=_TIMEOUT, context=context)
        return smtplib.SMTP(self._host, self._port, "localhost", timeout=_TIMEOUT)

    def _log_in(self, server: smtplib.SMTP) -> None:
        server.ehlo_or_helo_if_needed()
        if not self._tls and server.has_extn("starttls"):
            server.starttls(context=ssl.create_default_context())
        elif not self._tls and self._host not in _LOOPBACK:
            raise smtplib.SMTPNotSupportedError("the server offers no encryption to send the password through")
        server.login(self._user, self._password)


def _encodable(text: str) -> str:
    """The text with halves of surrogate pairs, as a file's odd name brings them along, written out."""
    return text.encode(errors="backslashreplace").decode()


def start_sink(store: ObjectStore, host: str, port: int) -> "Controller":
    """Start the sink in a thread of its own; `.stop()` ends it. Raises `Unavailable` where the port is taken."""
    from aiosmtpd.controller import Controller

    controller = Controller(_Sink(store), hostname=host, port=port, data_size_limit=_MAIL_BYTES, ident="NeuroLoop")
    try:
        socket.create_server((host, port)).close()  # the controller would take five seconds to tell
        controller.start()
    except OSError as error:
        raise Unavailable(
            f"the mail sink cannot listen on {host}:{port}",
            why=error.strerror or str(error),
            fix="set NEUROLOOP_MAIL_PORT to a free port",
        ) from error
    return controller


def run_sink(store: ObjectStore, host: str, port: int) -> None:
    """Keep every mail in `store` until this process gets SIGTERM or SIGINT. Call it from the main thread."""
    ending = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, ending)  # before the thread starts, which inherits the mask
    controller = start_sink(store, host, port)
    try:
        signal.sigwait(ending)
    finally:
        controller.stop()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ending)


class _Sink:
    """aiosmtpd's handler: each mail becomes one object; one that was sent again, by its Message-ID, no second."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._keeping = threading.Lock()

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        try:
            await asyncio.to_thread(self._keep, envelope.content)
        except NeuroLoopError as error:
            return f"451 {error.what}, try again later"
        return "250 kept"

    def _keep(self, content: bytes) -> None:
        own = str(message_from_bytes(content, policy=policy.default)["Message-ID"] or uuid.uuid4())
        name = hashlib.sha256(own.strip().encode()).hexdigest()[:16]
        with self._keeping:
            if not any(key.endswith(f"-{name}.eml") for key in self._store.list(keys.MAIL)):
                key = keys.mail(f"{now():%Y%m%dT%H%M%S%f}Z-{name}")  # so that keys sort by time
                self._store.create(key, content, content_type="message/rfc822")
