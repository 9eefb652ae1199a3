"""A TCP relay to a local server that can refuse, hang and lose answers, as networks and servers do."""

import contextlib
import socket
import socketserver
import threading
from collections.abc import Callable


class Relay(contextlib.AbstractContextManager):
    """Passes bytes on between `port` and the server on `target`, both on 127.0.0.1.

    `close` refuses connections and breaks those there are, `open` ends that. `stall` holds every byte back while the
    connections stay, `flow` lets them go on. `swallow_answer_to(word)` passes what has `word` in it on to the server
    and cuts the connection before its answer. `tell_of(word, call)` calls whenever the server has answered what has
    `word` in it, before the answer is passed on.
    """

    def __init__(self, target: int, port: int) -> None:
        self._target, self.port = target, port
        self.url = f"http://127.0.0.1:{port}"
        self._flowing = threading.Event()
        self._flowing.set()
        self._word = b""
        self._known: tuple[bytes, Callable[[], None]] | None = None

    def __enter__(self) -> "Relay":
        self.open()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def stall(self) -> None:
        self._flowing.clear()

    def flow(self) -> None:
        self._flowing.set()

    def swallow_answer_to(self, word: bytes) -> None:
        self._word = word

    def tell_of(self, word: bytes, call: Callable[[], None]) -> None:
        self._known = word, call

    def open(self) -> None:
        relay, target = self, self._target
        self._open: set[socket.socket] = set()
        connections = self._open

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                self.swallowing = self.awaiting = False
                with socket.create_connection(("127.0.0.1", target)) as upstream:
                    connections.update({self.request, upstream})
                    back = threading.Thread(target=self.pump, args=(upstream, self.request, False), daemon=True)
                    back.start()
                    self.pump(self.request, upstream, True)
                    back.join()

            def pump(self, source: socket.socket, sink: socket.socket, forth: bool) -> None:
                with contextlib.suppress(OSError):
                    while data := source.recv(65536):
                        relay._flowing.wait()
                        if not forth and self.swallowing:
                            break
                        if forth and relay._word and relay._word in data:
                            self.swallowing, relay._word = True, b""
                        if forth and relay._known and relay._known[0] in data:
                            self.awaiting = True
                        elif not forth and self.awaiting and relay._known:
                            self.awaiting = False
                            relay._known[1]()
                        sink.sendall(data)
                for end in (source, sink):
                    with contextlib.suppress(OSError):
                        end.shutdown(socket.SHUT_RDWR)

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = True
            daemon_threads = True
            block_on_close = False

        self._server = Server(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._flowing.set()
        for end in list(self._open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
