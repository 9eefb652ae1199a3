"""Starts the API with the settings of the environment: `python -m neuroloop.serving.server`."""

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from neuroloop.core.settings import Settings

MOST_SILENT = 65_536
"""Bytes that a connection may send without a header section coming to its end or a body going on."""


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's faster protocol, which would keep header lines, and those behind a body, without a bound."""

    _silent, _heard = 0, False

    def data_received(self, data: bytes) -> None:
        """Parse what came; a client that sends headers without an end is answered with 400 and cut off."""
        self._heard = False
        super().data_received(data)
        self._silent = 0 if self._heard else self._silent + len(data)
        if self._silent > MOST_SILENT and not self.transport.is_closing():
            self.send_400_response("The headers are too long.")

    def on_headers_complete(self) -> None:
        """Noted."""
        self._heard = True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Noted."""
        self._heard = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Noted."""
        self._heard = True
        super().on_message_complete()


def main() -> None:
    """Serve until a signal ends it."""
    settings = Settings.load()
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


if __name__ == "__main__":
    main()
