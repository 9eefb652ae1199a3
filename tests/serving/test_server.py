"""What a client may send before it is known."""

import socket
from collections.abc import Iterable

import pytest

from neuroloop.serving.server import MOST_SILENT
from serving.running import KEY, Api

HEAD = b"POST /v1/predictions HTTP/1.1\r\nHost: x\r\n"
CHUNKED = (
    HEAD + f"Authorization: Bearer {KEY}\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
)


def answer(api: Api, parts: Iterable[bytes]) -> tuple[bytes, int]:
    """What the server says, and how many bytes it took before it hung up."""
    sent = 0
    with socket.create_connection(("127.0.0.1", api.port), timeout=20) as client:
        try:
            for part in parts:
                client.sendall(part)
                sent += len(part)
        except OSError:
            pass
        try:
            return client.recv(4096), sent
        except ConnectionResetError:
            return b"", sent


@pytest.mark.parametrize(
    ("start", "again"),
    [
        (HEAD, b"X-More: " + b"x" * 1000 + b"\r\n"),
        (HEAD + b"X-Endless: ", b"x" * 1000),
        (b"GET /", b"x" * 1000),
        (CHUNKED + b"3\r\nabc\r\n0\r\n", b"X-Trailer: " + b"x" * 1000 + b"\r\n"),
    ],
    ids=["lines", "one line", "the path", "behind a body"],
)
def test_headers_without_an_end_are_cut_off(live_api: Api, start: bytes, again: bytes):
    most = 40_000_000
    said, sent = answer(live_api, (start, *[again] * (most // len(again))))
    assert sent < most // 4  # the system's buffers take some, too
    assert said == b"" or said.startswith(b"HTTP/1.1 400"), said


def test_headers_within_the_bound_are_read(live_api: Api):
    long = b"GET /health/live HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * (MOST_SILENT // 2) + b"\r\n\r\n"
    assert answer(live_api, [long])[0].startswith(b"HTTP/1.1 200")
