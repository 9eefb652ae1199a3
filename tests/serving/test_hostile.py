"""Two thousand damaged and hostile uploads: each gets an answer in words, none breaks the service or leaves a trace."""

import gzip
import io
import random
import struct
import tempfile
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from imaging.files import axial, compressed, dicom, nifti, picture
from serving.running import Api, encoded, head, serving

MUTATIONS = 2_016
HANG_SECONDS = 30
"""Far beyond the 2 s that are meant: the machine may be busy."""

GREY = head("glioma", height=64, width=72)
DEEP = GREY.astype(np.uint16) * 16
SEEDS = [
    picture(GREY, "PNG"),
    picture(Image.fromarray(GREY).convert("RGBA"), "PNG"),
    picture(GREY, "JPEG"),
    picture(Image.fromarray(GREY).convert("RGB"), "JPEG", progressive=True, exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0"),
    picture(GREY, "BMP"),
    picture(GREY, "WEBP"),
    picture(GREY, "WEBP", lossless=True),
    picture(GREY, "TIFF"),
    picture(GREY, "TIFF", compression="tiff_lzw"),
    picture(GREY, "TIFF", compression="jpeg"),
    dicom(GREY),
    dicom(np.stack([DEEP] * 3), WindowCenter=2000, WindowWidth=4000),
    *(
        compressed(DEEP, syntax, BitsStored=12, HighBit=11)
        for syntax in ("RLELossless", "JPEG2000Lossless", "JPEGLosslessSV1", "JPEGLSLossless")
    ),
    compressed(DEEP, "DeflatedExplicitVRLittleEndian"),
    compressed(GREY, "JPEGBaseline8Bit"),
    nifti(axial(GREY)),
    nifti(np.repeat(axial(DEEP).astype(np.float32), 4, axis=2), zipped=True),
    nifti(axial(GREY), version=2),
]
EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def mutated(chance: random.Random) -> bytes:
    """One of the seeds, damaged in one to three ways; most of it in the headers, where it does most."""
    data = bytearray(chance.choice(SEEDS))
    for _ in range(chance.randint(1, 3)):
        place = chance.randrange(len(data)) if chance.random() < 0.4 else chance.randrange(min(len(data), 700))
        match chance.randrange(7):
            case 0:
                data[place] ^= 1 << chance.randrange(8)
            case 1:
                del data[place:]
            case 2:
                data[place:place] = chance.randbytes(chance.choice((1, 2, 4, 8, 300)))
            case 3:
                del data[place : place + chance.choice((1, 2, 4, 8, 300))]
            case 4:
                code = chance.choice(("<H", ">H", "<L", ">L"))
                value = chance.choice(EXTREMES) & (0xFFFF if code[1] == "H" else 0xFFFFFFFF)
                data[place : place + struct.calcsize(code)] = struct.pack(code, value)
            case 5:
                piece = data[place : place + chance.randrange(1, 400)]
                data[place:place] = piece * chance.randrange(1, 4)
            case 6:
                other = chance.choice(SEEDS)
                data[place:] = other[min(place, len(other) - 1) :]
        if not data:
            return b""
    return bytes(data)


def assert_answered(response: httpx.Response) -> None:
    """An answer, or a problem that says what, why and how to mend it."""
    assert response.status_code in (201, 400, 413, 415, 422), response.text
    assert response.elapsed.total_seconds() < HANG_SECONDS
    if response.status_code != 201:
        assert response.headers["content-type"] == "application/problem+json"
        problem = response.json()
        assert problem["title"]
        assert problem["detail"]
        assert problem["fix"]


def test_two_thousand_mutations_get_an_answer_each_and_leave_nothing_behind(
    services, champion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    chance = random.Random(20_000)
    uploads = [mutated(chance) for _ in range(MUTATIONS)]
    with serving(services) as api:
        for seed in SEEDS:
            assert api.upload(seed).status_code == 201
        with ThreadPoolExecutor(2) as pool:
            seen = Counter(pool.map(lambda data: _status(api, data), uploads))
        assert seen.total() == MUTATIONS
        assert seen[400] + seen[413] + seen[415] > MUTATIONS // 4, seen
        kept = len(SEEDS) + seen[201] + seen[422]
        assert len(api.stored()) == kept
        figures = api.client.get("/v1/monitoring").json()
        assert figures["predictions"] == kept
        assert api.predict(head("glioma")).status_code == 201
    assert list(folder.iterdir()) == []


def _status(api: Api, data: bytes) -> int:
    response = api.upload(data)
    assert_answered(response)
    return response.status_code


def _png(width: int, height: int, body: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def _archive(content: bytes = b"<script>") -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("a", content)
    return out.getvalue()


SCAN = encoded(GREY)
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
HOSTILE = {
    "empty": b"",
    "one byte": b"\x89",
    "cut off": SCAN[: len(SCAN) // 2],
    "svg": SVG,
    "html": b"<!doctype html><title>x</title><script>alert(1)</script>",
    "php": b"<?php phpinfo(); ?>",
    "shell": b"#!/bin/sh\nrm -rf /\n",
    "program": b"MZ" + bytes(500),
    "elf": b"\x7fELF" + bytes(500),
    "pdf": b"%PDF-1.7\n" + SCAN,
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n",
    "archive": _archive(),
    "archive bomb": _archive(bytes(20_000_000)),
    "gif": picture(GREY, "GIF"),
    "image with an archive behind it": SCAN + _archive(),
    "image with a page behind it": SCAN + b"<html><script>alert(1)</script></html>",
    "image with a script in its comment": picture(GREY, "JPEG", comment=b"<script>alert(1)</script>"),
    "image with a drawing in its metadata": picture(GREY, "WEBP", xmp=SVG),
    "dicom that is a program": b"MZ" + dicom(GREY)[2:],
    "png bomb": _png(60_000, 60_000, zlib.compress(bytes(900_000), 9)),
    "bmp of four billion pixels": b"BM"
    + struct.pack("<LLLLllHHL", 90, 0, 54, 40, 65_535, 65_535, 1, 24, 0)
    + bytes(60),
    "gzip bomb": gzip.compress(nifti(axial(GREY)) + bytes(400_000_000), 9),
    "tiff without end": b"II*\0\x08\0\0\0" + b"\x00\x00\x08\0\0\0" * 3,
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_file_is_refused_in_words_and_leaves_nothing_behind(api: Api, what: str):
    stored, rows = api.stored(), len(api.rows())
    response = api.upload(HOSTILE[what])
    assert_answered(response)
    assert response.status_code in (400, 413, 415)
    assert (api.stored(), len(api.rows())) == (stored, rows)


NAMES = [
    "../../../../etc/passwd",
    "..\\..\\windows\\system32\\config",
    "/etc/cron.d/evil",
    "C:\\autoexec.bat",
    "\\\\host\\share\\x.png",
    "a.png\0.php",
    "a\r\nX-Injected: yes.png",
    '"; filename="other.png',
    "<script>alert(1)</script>.png",
    "<img src=x onerror=alert(1)>.png",
    "'; DROP TABLE predictions; --.png",
    "$(touch hacked).png",
    "`id`.png",
    "| cat /etc/passwd",
    "%2e%2e%2f%00.png",
    "{{7*7}}.png",
    "${jndi:ldap://host/a}.png",
    "%s%s%n%x.png",
    "\u202egnp.exe",
    "\ufeff\u200b.png",
    "e\u0301\U0001f9e0\u4e2d\u6587.png",
    "x" * 5_000 + ".png",
    "." * 300,
    "CON",
    "",
    " ",
]


@pytest.mark.parametrize("name", NAMES, ids=[f"name-{n}" for n in range(len(NAMES))])
def test_a_hostile_file_name_is_neither_followed_nor_kept(api: Api, name: str):
    """The name is not looked at: a scan is classified whatever it is called, a bad file refused."""
    assert len(NAMES) == 26
    before, rows = set(api.stored()), len(api.rows())
    for content, statuses in ((SCAN, (201, 400)), (SVG, (400, 415))):
        response = _raw(api, name, content)
        assert response.status_code in statuses, response.text
        if response.status_code != 201:
            assert_answered(response)
        if len(name) > 3:
            for text in (response.text, str(response.headers), *api.rows()[rows:], *set(api.stored()) - before):
                assert name not in text
        before, rows = set(api.stored()), len(api.rows())
        assert all(key.startswith("InferenceLogs/") and ".." not in key for key in before)


def _raw(api: Api, name: str, content: bytes) -> httpx.Response:
    """The form by hand: a client library would mend the name."""
    form = (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="'
        + name.encode()
        + b'"\r\nContent-Type: image/png\r\n\r\n'
        + content
        + b"\r\n--b--\r\n"
    )
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    return api.client.post("/v1/predictions", content=form, headers=headers)
