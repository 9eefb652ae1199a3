"""A Google Cloud Storage for tests: the JSON API's objects, in memory, with honest preconditions.

Speaks what google-cloud-storage and gcsfs (DVC) send: media, multipart (also with bare line feeds) and resumable
uploads, `ifGenerationMatch`, listing with prefix, delimiter and pages, ranged downloads, checksums, deletion.

Run it by itself with `python tests/servers/gcs_server.py [HOST:]PORT BUCKET...`.
"""

import base64
import hashlib
import itertools
import json
import re
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from urllib.parse import quote

import google_crc32c
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

OBJECTS = "/storage/v1/b/{bucket}/o"
UPLOADS = "/upload/storage/v1/b/{bucket}/o"


class Refusal(Exception):
    """An error answer as Google words it."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Upload:
    """A resumable upload that is not finished."""

    bucket: str
    meta: dict
    query: dict
    data: bytearray = field(default_factory=bytearray)


class GcsServer:
    """The state, the handlers and, in `serve`, the server's address."""

    def __init__(self, *buckets: str, page: int = 1000) -> None:
        self.buckets: dict[str, dict[str, tuple[dict, bytes]]] = {name: {} for name in buckets}
        self.url = ""
        self.faults: deque[tuple[str, int, bool]] = deque()  # (method, status, whether the request takes effect)
        self.requests: list[tuple[str, str]] = []
        self._page = page
        self._uploads: dict[str, Upload] = {}
        self._generations = itertools.count(int(time.time() * 1e6))
        self.app = Starlette(
            routes=[
                Route("/storage/v1/b", self._guarded(self._create_bucket), methods=["POST"]),
                Route("/storage/v1/b/{bucket}", self._guarded(self._get_bucket), methods=["GET"]),
                Route(OBJECTS, self._guarded(self._list), methods=["GET"]),
                Route(OBJECTS + "/{name:path}", self._guarded(self._get), methods=["GET"]),
                Route(OBJECTS + "/{name:path}", self._guarded(self._delete), methods=["DELETE"]),
                Route("/download" + OBJECTS + "/{name:path}", self._guarded(self._get), methods=["GET"]),
                Route(UPLOADS, self._guarded(self._upload), methods=["POST", "PUT"]),
            ]
        )

    @contextmanager
    def serve(self, port: int = 0) -> Iterator["GcsServer"]:
        """Answer on 127.0.0.1 from a thread until the block ends."""
        server = uvicorn.Server(uvicorn.Config(self.app, "127.0.0.1", port, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            if not thread.is_alive():
                raise OSError(f"port {port} cannot be used")
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.should_exit = True
            thread.join(10)

    def _guarded(self, handler):
        async def answer(request: Request) -> Response:
            self.requests.append((request.method, request.url.path))
            fault = None
            if self.faults and self.faults[0][0] == request.method:
                fault = self.faults.popleft()
                if not fault[2]:
                    return _error(fault[1], "Backend Error")
            try:
                # The body comes first: after it no handler waits, so each takes effect at once or not at all.
                response = handler(request, await request.body())
            except Refusal as refusal:
                response = _error(refusal.status, str(refusal))
            return _error(fault[1], "Backend Error") if fault else response

        return answer

    # --- buckets ---

    def _objects(self, bucket: str) -> dict[str, tuple[dict, bytes]]:
        if bucket not in self.buckets:
            raise Refusal(404, "The specified bucket does not exist.")
        return self.buckets[bucket]

    def _create_bucket(self, request: Request, body: bytes) -> Response:
        name = json.loads(body)["name"]
        if name in self.buckets:
            raise Refusal(409, "Your previous request to create the named bucket succeeded and you already own it.")
        self.buckets[name] = {}
        return JSONResponse({"kind": "storage#bucket", "id": name, "name": name})

    def _get_bucket(self, request: Request, body: bytes) -> Response:
        name = request.path_params["bucket"]
        self._objects(name)
        return JSONResponse({"kind": "storage#bucket", "id": name, "name": name})

    # --- reading ---

    def _list(self, request: Request, body: bytes) -> Response:
        objects, query = self._objects(request.path_params["bucket"]), request.query_params
        prefix, delimiter, after = query.get("prefix", ""), query.get("delimiter", ""), query.get("pageToken", "")
        size = min(int(query.get("maxResults", self._page)), self._page)
        entries: dict[str, dict | None] = {}  # a name with its object, or a common prefix with None
        for name in sorted(objects):
            if not name.startswith(prefix) or name < query.get("startOffset", ""):
                continue
            above, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
            entries[prefix + above + delimiter if found else name] = None if found else objects[name][0]
        rest = [name for name in entries if name > after]
        page = rest[:size]
        answer = {
            "kind": "storage#objects",
            "items": [entries[name] for name in page if entries[name] is not None],
            "prefixes": [name for name in page if entries[name] is None],
        }
        if len(rest) > size:
            answer["nextPageToken"] = page[-1]
        return JSONResponse(answer)

    def _get(self, request: Request, body: bytes) -> Response:
        bucket, name = request.path_params["bucket"], request.path_params["name"]
        objects = self._objects(bucket)
        if name not in objects:
            raise Refusal(404, f"No such object: {bucket}/{name}")
        meta, data = objects[name]
        _precondition(request.query_params, meta)
        if request.query_params.get("alt") != "media":
            return JSONResponse(meta)
        headers = {
            "x-goog-hash": f"crc32c={meta['crc32c']},md5={meta['md5Hash']}",
            "x-goog-generation": meta["generation"],
            "etag": meta["etag"],
        }
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
        if not span:
            return Response(data, headers=headers, media_type=meta["contentType"])
        start, end = int(span[1]), min(int(span[2] or len(data)), len(data) - 1)
        if start >= len(data):
            raise Refusal(416, "The requested range cannot be satisfied.")
        headers["content-range"] = f"bytes {start}-{end}/{len(data)}"
        return Response(data[start : end + 1], 206, headers, meta["contentType"])

    def _delete(self, request: Request, body: bytes) -> Response:
        bucket, name = request.path_params["bucket"], request.path_params["name"]
        objects = self._objects(bucket)
        if name not in objects:
            raise Refusal(404, f"No such object: {bucket}/{name}")
        _precondition(request.query_params, objects[name][0])
        del objects[name]
        return Response(status_code=204)

    # --- writing ---

    def _upload(self, request: Request, body: bytes) -> Response:
        bucket, query = request.path_params["bucket"], dict(request.query_params)
        objects = self._objects(bucket)
        kind = request.headers.get("content-type", "")
        if "upload_id" in query:
            return self._chunk(request, query["upload_id"], body)
        match query["uploadType"]:
            case "media":
                return self._write(bucket, {"contentType": kind}, body, query)
            case "multipart":
                meta, data = _multipart(kind, body)
                return self._write(bucket, meta, data, query)
            case "resumable":
                meta = json.loads(body) if body else {}
                _precondition(query, objects.get(query.get("name") or meta["name"], ({},))[0])
                upload = uuid.uuid4().hex
                meta.setdefault("contentType", request.headers.get("x-upload-content-type"))
                self._uploads[upload] = Upload(bucket, meta, query)
                where = f"/upload/storage/v1/b/{quote(bucket)}/o?uploadType=resumable&upload_id={upload}"
                return Response(headers={"location": f"{request.base_url}".rstrip("/") + where})
        raise Refusal(400, f"Unknown upload type {query['uploadType']}")

    def _chunk(self, request: Request, upload: str, body: bytes) -> Response:
        if upload not in self._uploads:
            raise Refusal(404, "No such upload")
        state = self._uploads[upload]
        span = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", request.headers.get("content-range", ""))
        if span is None or span[1] is not None:
            if (int(span[1]) if span else 0) != len(state.data):
                raise Refusal(400, "The chunk does not start where the upload stands")
            state.data += body
        if span is not None and (span[3] == "*" or int(span[3]) > len(state.data)):
            headers = {"range": f"bytes=0-{len(state.data) - 1}"} if state.data else {}
            return Response(status_code=308, headers=headers)
        del self._uploads[upload]
        return self._write(state.bucket, state.meta, bytes(state.data), state.query)

    def _write(self, bucket: str, meta: dict, data: bytes, query: dict) -> Response:
        objects = self._objects(bucket)
        name = query.get("name") or meta["name"]
        _precondition(query, objects.get(name, ({},))[0])
        sums = {
            "md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode(),
            "crc32c": base64.b64encode(google_crc32c.Checksum(data).digest()).decode(),
        }
        for key, value in sums.items():
            if meta.get(key, value) != value:
                raise Refusal(400, f"Provided {key} {meta[key]} does not match the data's {value}.")
        generation, now = str(next(self._generations)), f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"
        entry = {
            "kind": "storage#object",
            "id": f"{bucket}/{name}/{generation}",
            "name": name,
            "bucket": bucket,
            "size": str(len(data)),
            "contentType": meta.get("contentType") or "application/octet-stream",
            "generation": generation,
            "metageneration": "1",
            "etag": generation,
            "timeCreated": now,
            "updated": now,
            "metadata": meta.get("metadata") or {},
            **sums,
        }
        objects[name] = entry, data
        return JSONResponse(entry)


def _precondition(query, meta: dict) -> None:
    """`meta` is empty where there is no object, whose generation counts as 0."""
    wanted = query.get("ifGenerationMatch")
    if wanted is not None and wanted != meta.get("generation", "0"):
        raise Refusal(412, "At least one of the pre-conditions you specified did not hold.")


def _multipart(kind: str, body: bytes) -> tuple[dict, bytes]:
    """Metadata and data of a multipart/related body, whose lines end in CRLF or, from gcsfs, in LF."""
    found = re.search(r"boundary=[\"']?([^\"';]+)", kind)
    if not found:
        raise Refusal(400, "A multipart body needs a boundary")
    mark = b"--" + found[1].encode()
    end = b"\r\n" if body[body.index(mark) + len(mark) :].startswith(b"\r\n") else b"\n"
    last = body.rindex(end + mark + b"--")
    _, first, second = body[:last].split(mark + end, 2)
    meta = json.loads(first.split(end * 2, 1)[1])
    head, data = second.split(end * 2, 1)
    content_type = re.search(rb"(?i)content-type:\s*([^\r\n]+)", head)
    if content_type:
        meta.setdefault("contentType", content_type[1].decode())
    return meta, data


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": {"code": status, "message": message, "errors": [{"message": message}]}}, status)


if __name__ == "__main__":
    host, _, port = sys.argv[1].rpartition(":")
    uvicorn.run(GcsServer(*sys.argv[2:]).app, host=host or "127.0.0.1", port=int(port), log_level="warning")
