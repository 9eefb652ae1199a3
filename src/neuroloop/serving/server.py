"""Starts the API with the settings of the environment: `python -m neuroloop.serving.server`."""

import asyncio
import logging
import math
import resource
import socket

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from neuroloop.core.settings import Settings
from neuroloop.serving.intake import UPLOAD_SECONDS

MOST_SILENT = 65_536
"""Bytes that a connection may send without a header section coming to its end or a body going on."""
HEADER_SECONDS = 20.0
"""Longest time from the first byte of a request, or from the connection, to the end of its header section."""
LEFTOVER_SECONDS = UPLOAD_SECONDS
"""Longest time that the rest of a body may take to come that was answered before it had."""
WRITE_SECONDS = 30.0
"""A client that takes nothing of its answers for so long is cut off; however slow it is, one that reads is not."""
MOST_CONNECTIONS = 2_000
"""Open at once, where the system allows that many files; beyond it, one that asks for nothing makes room."""
_SPARE_FILES = 200  # for store, database, registry and decoding
_WARN_SECONDS = 10.0
_LOG = logging.getLogger(__name__)


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's faster protocol, which would keep headers, connections that ask for nothing, and answers that nobody
    reads, without a bound.
    """

    most = MOST_CONNECTIONS
    _silent, _heard = 0, False
    _last = 0.0  # when the client was heard of
    _late: asyncio.TimerHandle | None = None
    _warned = -math.inf

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request; where there are too many connections, the longest idle one is closed."""
        super().connection_made(transport)
        # The system knows what was taken, to the byte; it also ends what is being closed and has not been read.
        patience = round(WRITE_SECONDS * 1000)
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, patience)
        self._last = self.loop.time()
        self._expect_headers(HEADER_SECONDS)
        if len(self.connections) > self.most:
            idle = [each for each in self.connections if isinstance(each, BoundedHttp) and each._idle()]
            min(idle, key=lambda each: each._last).transport.close()  # this new one, where all others are at work
            if self._last > BoundedHttp._warned + _WARN_SECONDS:
                BoundedHttp._warned = self._last
                _LOG.warning("more than %d connections; those that ask for nothing are closed", self.most)

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        self._got_headers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came; a client that sends headers without an end is answered with 400 and cut off."""
        self._heard, self._last = False, self.loop.time()
        super().data_received(data)
        self._silent = 0 if self._heard else self._silent + len(data)
        if self._silent > MOST_SILENT and not self.transport.is_closing():
            self.send_400_response("The headers are too long.")
        if self._idle() and self.timeout_keep_alive_task is None:
            self._expect_headers(LEFTOVER_SECONDS if self._heard else HEADER_SECONDS)

    def _idle(self) -> bool:
        return (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing()

    def _expect_headers(self, seconds: float) -> None:
        """From now on, unless there is a clock running already: bytes that complete nothing win no time."""
        if self._late is None:
            self._late = self.loop.call_later(seconds, self.transport.close)

    def _got_headers(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def on_headers_complete(self) -> None:
        """Noted."""
        self._heard = True
        self._got_headers()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Noted."""
        self._heard = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Noted; what was answered long before is now an idle connection like any other."""
        self._heard = True
        super().on_message_complete()
        if self._idle():
            self._got_headers()
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )


def main() -> None:
    """Serve until a signal ends it."""
    settings = Settings.load()
    BoundedHttp.most = min(MOST_CONNECTIONS, _files() - _SPARE_FILES)
    uvicorn.run(
        "neuroloop.serving.api:app",
        factory=True,
        host=settings.bind,
        port=settings.api_port,
        http=BoundedHttp,
        access_log=False,
        server_header=False,
        timeout_keep_alive=75,  # longer than a load balancer keeps an idle connection, which may then be used again
        timeout_graceful_shutdown=10,
    )


def _files() -> int:
    """How many files this process may have open, after asking for enough."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_CONNECTIONS + _SPARE_FILES
    if now != resource.RLIM_INFINITY and now < wanted:
        now = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (now, most))
    return wanted if now == resource.RLIM_INFINITY else now


if __name__ == "__main__":
    main()
