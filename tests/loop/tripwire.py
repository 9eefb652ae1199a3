"""Watches a task from outside, and kills it at the n-th thing that it does to store, database, registry or mailbox."""

import contextlib
import ctypes
import http.client
import os
import signal
import struct
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

_CREATED, _DELETED, _MOVED = 0x100, 0x200, 0x40  # of inotify(7)
_WORDS = {_CREATED: "begun to write", _DELETED: "removed", _MOVED: "written"}


class Tripwire:
    """Counts what happens; at the `at`-th event since `arm`, the process dies before it learns of it."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self._lock = threading.Lock()
        self._pid = self._at = 0
        self._group = False

    def arm(self, pid: int, at: int = 0, *, group: bool = True) -> None:
        """Watch this process; `at` 0 only counts. `group`: what it started dies with it, as in a container."""
        with self._lock:
            self.events, self._pid, self._at, self._group = [], pid, at, group

    def disarm(self) -> None:
        with self._lock:
            self._pid = 0

    def happened(self, what: str) -> None:
        with self._lock:
            if self._pid:
                self.events.append(what)
                if len(self.events) == self._at:
                    self._kill()

    def kill(self) -> None:
        with self._lock:
            self._kill()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if self._group else os.kill)(self._pid, signal.SIGKILL)
        self._pid = 0


class FolderWatch:
    """Tells what is made, moved away and deleted in some folders. By inotify, since a look now and then comes late."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._libc.inotify_init()
        self._names: dict[int, str] = {}
        self._tell = tell
        threading.Thread(target=self._read, daemon=True).start()

    def add(self, folder: Path, kinds: int = _CREATED | _DELETED | _MOVED) -> None:
        watch = self._libc.inotify_add_watch(self._descriptor, os.fsencode(folder), kinds)
        assert watch >= 0, os.strerror(ctypes.get_errno())
        self._names[watch] = folder.name

    def add_deletions(self, folder: Path) -> None:
        if folder.is_dir():
            self.add(folder, _DELETED)

    def _read(self) -> None:
        while True:
            data, at = os.read(self._descriptor, 65536), 0
            while at < len(data):
                watch, kind, _, length = struct.unpack_from("iIII", data, at)
                at += struct.calcsize("iIII") + length
                for bit, word in _WORDS.items():
                    if kind & bit:
                        self._tell(f"store: {word} in {self._names.get(watch, '?')}")


@contextlib.contextmanager
def relayed(target: str, port: int, tell: Callable[[str], None]) -> Iterator[str]:
    """An HTTP server on `port` that passes all on to `target`, and tells of each write that was answered.

    The answer is passed on afterwards only: whoever is killed by what was told never sees it.
    """
    upstream = urlsplit(target)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one_request(self) -> None:
            self.raw_requestline = self.rfile.readline(65537)
            if not self.raw_requestline or not self.parse_request():
                self.close_connection = True
                return
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            connection = http.client.HTTPConnection(upstream.hostname, upstream.port, timeout=60)
            headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            data = answer.read()
            connection.close()
            path = urlsplit(self.path).path
            if self.command != "GET" and not path.endswith("search"):
                tell(f"mlflow: {self.command} {path.split('/mlflow/')[-1].split('/artifacts/')[-1]}")
            with contextlib.suppress(OSError):
                self.send_response_only(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, *_: object) -> None:
            """A killed client is what it is here for."""

    server = Server(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.shutdown()
        server.server_close()
