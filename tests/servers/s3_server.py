"""An Amazon S3 and IAM for tests: moto, made as atomic as S3 is, with faults on demand.

Run by the Python of `make emulators`, which has moto; this project's own has not: `s3_server.py PORT`.

moto looks whether a key is free and writes it later, so of several concurrent create-once writes two could win; S3
decides in one step. Here, too: requests are answered one at a time. `POST /faults` takes a JSON list of
`[method, status, whether the request takes effect]`, each of which spoils one answer to a request for an object.
`GET /listings` tells who has listed what so far, as `[access key, prefix]`: moto does not heed a policy's `s3:prefix`.
"""

import json
import sys
import threading
from collections import deque
from urllib.parse import parse_qs

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server


class OneAtATime:
    """moto's WSGI application behind a lock, and the faults."""

    def __init__(self) -> None:
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()
        self._faults: deque[list] = deque()
        self._listings: list[list[str]] = []

    def __call__(self, environ, start_response):
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        with self._lock:
            if path == "/faults":
                if method == "POST":
                    length = int(environ["CONTENT_LENGTH"])
                    self._faults.extend(json.loads(environ["wsgi.input"].read(length)))
                return _answer(start_response, 200, json.dumps(list(self._faults)).encode())
            if path == "/listings":
                return _answer(start_response, 200, json.dumps(self._listings).encode())
            query = parse_qs(environ["QUERY_STRING"], keep_blank_values=True)
            if method in ("GET", "HEAD") and path.strip("/").count("/") == 0 and path != "/":
                key = environ.get("HTTP_AUTHORIZATION", "").partition("Credential=")[2].partition("/")[0]
                self._listings.append([key, query.get("prefix", [None])[0]])
            if path.count("/") > 1 and self._faults and self._faults[0][0] == method:
                _, status, effective = self._faults.popleft()
                if effective:
                    b"".join(self._moto(environ, lambda *_: None))
                return _answer(start_response, status, b"a fault of the test")
            return list(self._moto(environ, start_response))


def _answer(start_response, status: int, body: bytes) -> list[bytes]:
    start_response(f"{status} Fault", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]


if __name__ == "__main__":
    make_server("127.0.0.1", int(sys.argv[1]), OneAtATime(), threaded=True).serve_forever()
