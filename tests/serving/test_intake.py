"""Bodies: bounded while they arrive, and read from forms with care."""

import asyncio
import contextlib
import http.client
import socket

import httpx
import pytest
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.responses import Response

from neuroloop.serving.intake import ENVELOPE_BYTES, BodyLimit
from serving.running import Api, encoded, head, serving

MEGABYTE = 1_000_000  # the limit of this API


def part(*dispositions: str, content: str = "x") -> bytes:
    parts = (f"--b\r\nContent-Disposition: form-data; {each}\r\n\r\n{content}\r\n" for each in dispositions)
    return "".join([*parts, "--b--\r\n"]).encode()


def chunks(total: int):
    for _ in range(total // 50_000):
        yield bytes(50_000)


def test_a_chunked_body_is_refused_as_soon_as_it_is_too_large(api: Api):
    response = api.client.post(
        "/v1/predictions", content=chunks(3 * MEGABYTE), headers={"Content-Type": "application/octet-stream"}
    )
    assert (response.status_code, response.headers["content-type"]) == (413, "application/problem+json")
    assert response.json()["fix"]


def test_an_announced_length_beyond_the_limit_is_refused_before_anything_is_read(api: Api):
    connection = http.client.HTTPConnection("127.0.0.1", api.port, timeout=5)
    connection.putrequest("POST", "/v1/predictions")
    connection.putheader("Content-Type", "image/png")
    connection.putheader("Content-Length", str(10**12))
    connection.endheaders()  # and no body: an answer can only come from the announcement
    assert connection.getresponse().status == 413
    connection.close()


@pytest.mark.parametrize("known", [True, False])
def test_an_endless_chunked_body_does_not_stay_connected(api: Api, known: bool):
    key = f"Authorization: Bearer {api.key}\r\n" if known else ""
    kind = "Content-Type: image/png\r\nTransfer-Encoding: chunked\r\n"
    start = f"POST /v1/predictions HTTP/1.1\r\nHost: x\r\n{key}{kind}\r\n"
    with socket.create_connection(("127.0.0.1", api.port), timeout=10) as client:
        client.sendall(start.encode())
        with pytest.raises(OSError, match=r"reset|pipe"):
            client.sendall((b"10000\r\n" + bytes(0x10000) + b"\r\n") * 1600)  # 100 MB


def test_json_bodies_have_a_limit_of_their_own(api: Api):
    prediction_id = api.predict(head("glioma")).json()["id"]
    response = api.feedback(prediction_id, "agree", reader="a" * 200_000)
    assert response.status_code == 413


def test_an_upload_just_below_the_limit_is_read(api: Api):
    data = encoded(head("glioma"))
    padded = data + bytes(MEGABYTE - len(data))  # Pillow stops at the end of the image
    assert api.upload(padded).status_code == 201


@pytest.mark.parametrize(
    ("content_type", "body", "status"),
    [
        ("multipart/form-data", b"x", 400),
        ("multipart/form-data; boundary=b", b"no part at all", 400),
        ("multipart/form-data; boundary=b", part('name="file"'), 400),
        ("multipart/form-data; boundary=b", part('name="x"; filename="f"'), 400),
        ("text/plain", b"x", 415),
        ("", b"x", 415),
    ],
)  # fmt: skip
def test_a_body_that_holds_no_file_is_a_problem_that_says_so(api: Api, content_type: str, body: bytes, status: int):
    response = api.client.post("/v1/predictions", content=body, headers={"Content-Type": content_type})
    assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json")
    assert "file" in response.json()["detail"] + response.json()["fix"] or "form" in response.json()["detail"]


@pytest.mark.parametrize("path", ["/v1/predictions", "/v1/predictions:batch"])
@pytest.mark.parametrize("charset", ["punycode", "undefined", "utf-7"])
def test_a_form_in_a_charset_of_its_own_is_refused_before_anything_is_decoded(api: Api, path: str, charset: str):
    """Decoding 60 kB of punycode takes Python half a second, of 1 MB minutes, in which nobody else is answered."""
    body = part('name="note"', 'name="file"; filename="f"', content="b" * 60_000)
    kind = "multipart/form-data; boundary=b"
    response = api.client.post(path, content=body, headers={"Content-Type": f"{kind}; charset={charset}"})
    assert (response.status_code, "utf-8" in response.json()["detail"]) == (400, True)
    for usual in ("UTF-8", "ISO-8859-1", "US-ASCII"):
        response = api.client.post(path, content=body, headers={"Content-Type": f"{kind}; charset={usual}"})
        assert response.status_code in (200, 415)  # read, and what it holds is no image


def test_a_text_field_of_a_form_has_a_limit_of_its_own(api: Api):
    body = part('name="note"', content="b" * (ENVELOPE_BYTES + 1))
    response = api.client.post(
        "/v1/predictions", content=body, headers={"Content-Type": "multipart/form-data; boundary=b"}
    )
    assert (response.status_code, "maximum size" in response.json()["detail"]) == (400, True)


def test_a_second_file_in_the_form_is_refused(api: Api):
    data = encoded(head("glioma"))
    response = api.client.post("/v1/predictions", files=[("file", ("a.png", data)), ("file", ("b.png", data))])
    assert response.status_code == 400


def test_bodies_that_together_are_too_large_wait_for_nobody_and_the_next_finds_room_again():
    reading, go = [], asyncio.Event()

    async def app(scope, receive, send):
        body = (await receive())["body"]
        reading.append(len(body))
        await go.wait()
        await Response("read")(scope, receive, send)

    limited = ExceptionMiddleware(BodyLimit(app, limit=lambda path: 100, together=150), handlers={})

    async def clients() -> list[int]:
        transport = httpx.ASGITransport(app=limited)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            first = asyncio.create_task(client.post("/", content=bytes(80)))
            while not reading:
                await asyncio.sleep(0.01)
            second = await client.post("/", content=bytes(80))
            go.set()
            return [
                (await first).status_code,
                second.status_code,
                (await client.post("/", content=bytes(80))).status_code,
            ]

    assert asyncio.run(clients()) == [200, 503, 200]


def test_a_holder_of_a_key_who_fills_their_share_keeps_nobody_else_out():
    reading, go = [], asyncio.Event()

    async def app(scope, receive, send):
        reading.append((await receive())["body"])
        await go.wait()
        await Response("read")(scope, receive, send)

    def holder(scope) -> str:
        return scope["path"]

    limited = ExceptionMiddleware(BodyLimit(app, limit=lambda path: 30, together=160, holder=holder), handlers={})

    async def clients() -> list[int]:
        transport = httpx.ASGITransport(app=limited)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            first = asyncio.create_task(client.post("/eve", content=bytes(30)))
            while not reading:
                await asyncio.sleep(0.01)
            second = await client.post("/eve", content=bytes(30))
            other = asyncio.create_task(client.post("/ann", content=bytes(30)))
            while len(reading) < 2:
                await asyncio.sleep(0.01)
            go.set()
            held = [await first, await other]
            return [each.status_code for each in (*held, second, await client.post("/eve", content=bytes(30)))]

    assert asyncio.run(clients()) == [200, 200, 429, 200]


def test_one_uploader_does_not_take_the_room_of_all(services, champion):
    batch = 5 * (MEGABYTE + ENVELOPE_BYTES) - 10  # nearly the largest body; four of these are all that is held at once
    with serving(services) as api, contextlib.ExitStack() as stack:
        eve, ann = (stack.enter_context(api.holder("uploader", name)) for name in ("eve", "ann"))
        start = (
            "POST /v1/predictions:batch HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n"
            f"Authorization: {eve.headers['Authorization']}\r\nContent-Length: {batch + 1}\r\n\r\n"
        )
        said = []
        for _ in range(4):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", api.port), timeout=30))
            with contextlib.suppress(OSError):
                client.sendall(start.encode() + bytes(batch))
            client.settimeout(0.5)
            with contextlib.suppress(OSError):
                said.append(client.recv(4096))
        assert ann.post("/v1/predictions", files={"file": ("a", encoded(head("glioma")))}).status_code == 201
        assert all(each.startswith(b"HTTP/1.1 429") and b"retry-after: 5" in each.lower() for each in said)


@pytest.mark.parametrize(
    ("path", "content_type"),
    [
        ("/v1/predictions/{id}/feedback", "application/json"),
        ("/v1/keys", "application/json"),
        ("/v1/predictions", "image/png"),
        ("/v1/predictions:batch", "multipart/form-data; boundary=b"),
    ],
)
def test_a_body_that_does_not_come_to_its_end_is_408(api: Api, monkeypatch, path: str, content_type: str):
    path = path.format(id=api.predict(head("glioma")).json()["id"])
    monkeypatch.setattr("neuroloop.serving.intake.UPLOAD_SECONDS", 0.5)
    start = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {api.key}\r\nContent-Type: {content_type}\r\n"
    with socket.create_connection(("127.0.0.1", api.port), timeout=30) as client:
        client.sendall(f"{start}Content-Length: 1000\r\n\r\n{{".encode())
        answer = http.client.HTTPResponse(client)
        answer.begin()
        assert (answer.status, answer.headers["Connection"]) == (408, "close")
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert b"had not arrived" in answer.read()
        assert client.recv(1) == b""


def test_a_json_body_that_grows_too_large_is_413(api: Api):
    response = api.client.post("/v1/keys", content=chunks(MEGABYTE), headers={"Content-Type": "application/json"})
    assert response.status_code == 413
