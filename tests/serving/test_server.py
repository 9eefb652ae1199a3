"""What a client may send before it is known."""

import contextlib
import socket
import time
from collections.abc import Iterable

import pytest

from neuroloop.serving import server
from neuroloop.serving.server import MOST_SILENT, BoundedHttp
from serving.running import KEY, Api, wait

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


ASKING = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"


def connected(api: Api, said: bytes = b"") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", api.port), timeout=20)
    client.sendall(said)
    return client


@pytest.mark.parametrize(
    ("said", "more"),
    [
        (b"", b""),
        (b"GET /health/li", b"v"),
        (ASKING[:-2], b"X-A: b\r\n"),
        (HEAD + b"Content-Length: 99999\r\n\r\n", b"x"),
    ],
    ids=["nothing", "half a line", "half a head", "a body that was refused"],
)
def test_a_connection_that_asks_for_nothing_is_closed(live_api: Api, monkeypatch, said: bytes, more: bytes):
    monkeypatch.setattr(server, "HEADER_SECONDS", 0.5)
    monkeypatch.setattr(server, "LEFTOVER_SECONDS", 0.5)
    with connected(live_api, said) as client:
        client.settimeout(0.1)
        for _ in range(150):
            try:
                client.sendall(more)  # slowly going on wins no time
                if not client.recv(4096):
                    return
            except TimeoutError:
                continue
            except OSError:
                return
    pytest.fail("after 15 s the server still listens")


def test_a_connection_is_kept_between_requests_and_for_one_that_takes_its_time(live_api: Api, monkeypatch):
    monkeypatch.setattr(server, "HEADER_SECONDS", 1.0)
    slow = HEAD + f"Authorization: Bearer {KEY}\r\nContent-Type: image/png\r\nContent-Length: 7\r\n\r\n".encode()
    refused = HEAD + b"Content-Length: 7\r\n\r\n"
    with connected(live_api, ASKING) as client:
        assert client.recv(4096).startswith(b"HTTP/1.1 200")
        time.sleep(1.5)
        for head, status in ((slow, b"415"), (refused, b"401")):  # the second is answered before its body has come
            client.sendall(head)
            for byte in b"no imag":
                time.sleep(0.3)
                client.sendall(bytes([byte]))
            assert client.recv(4096).startswith(b"HTTP/1.1 " + status)
            time.sleep(1.5)
        client.sendall(ASKING)
        assert client.recv(4096).startswith(b"HTTP/1.1 200")


def test_of_too_many_connections_the_longest_idle_one_makes_room(live_api: Api, monkeypatch):
    live_api.client.get("/health/live", headers={"Connection": "close"})  # it may have the longest idle one of all
    with contextlib.ExitStack() as stack:
        idle = stack.enter_context(connected(live_api, ASKING))
        assert idle.recv(4096).startswith(b"HTTP/1.1 200")
        monkeypatch.setattr(BoundedHttp, "most", 1)
        latest = stack.enter_context(connected(live_api))
        latest.sendall(ASKING)
        assert latest.recv(4096).startswith(b"HTTP/1.1 200")
        assert idle.recv(4096) == b""
        monkeypatch.setattr(BoundedHttp, "most", 2)
        latest.sendall(ASKING)
        assert latest.recv(4096).startswith(b"HTTP/1.1 200")


def deaf(api: Api) -> socket.socket:
    """A client that asks for far more than the system's buffers hold, and has little room for it."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(20)
    client.connect(("127.0.0.1", api.port))
    client.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
    return client


def cut_off(client: socket.socket) -> bool:
    """Whether the server has hung up, told without reading."""
    try:
        client.sendall(b"\r\n")
    except OSError:
        return True
    return False


def test_clients_that_never_read_their_answers_do_not_keep_others_out(live_api: Api, monkeypatch):
    monkeypatch.setattr(BoundedHttp, "most", 2)
    monkeypatch.setattr(server, "WRITE_SECONDS", 0.5)
    with deaf(live_api) as one, deaf(live_api) as another:
        wait(lambda: cut_off(one))
        wait(lambda: cut_off(another))
        with connected(live_api, ASKING) as client:
            assert client.recv(4096).startswith(b"HTTP/1.1 200")


def test_a_client_that_reads_slowly_gets_the_whole_of_its_answers(live_api: Api, monkeypatch):
    whole = 100 * len(live_api.client.get("/openapi.json").content)
    monkeypatch.setattr(server, "WRITE_SECONDS", 1.0)
    with deaf(live_api) as client:
        read, started = 0, time.monotonic()
        while read < whole:
            piece = client.recv(2**17)
            assert piece, f"it was cut off after {read} of {whole} bytes"
            read += len(piece)
            if time.monotonic() < started + 3:
                time.sleep(0.1)


def test_a_connection_that_is_closed_before_its_answers_were_read_does_not_stay(live_api: Api, monkeypatch):
    monkeypatch.setattr(server, "WRITE_SECONDS", 0.5)
    monkeypatch.setattr(server, "MOST_SILENT", 1000)
    with deaf(live_api) as client:
        client.sendall(b"GET /" + b"x" * 2000)  # answered with 400 behind all that is not read, then closed
        wait(lambda: cut_off(client))
