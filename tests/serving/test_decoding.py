"""The process in which uploads are decoded: what it gives, and what it cannot do to the service."""

import contextlib
import gc
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imaging.files import axial, compressed, dicom, nifti, picture
from neuroloop.core.errors import ImageTooLarge, InvalidImage, Unavailable, UnsupportedImage
from neuroloop.core.settings import Settings
from neuroloop.imaging import decode
from neuroloop.imaging.decode import Limits
from neuroloop.serving.decoding import Decoder
from serving.running import head, wait

HEAD = head("glioma")


def decoder(*, seconds: float = 20, memory: int = 1_000_000_000, at_once: int = 2, **limits: int) -> Decoder:
    return Decoder(Limits(**limits), seconds=seconds, memory=memory, at_once=at_once)


@pytest.fixture(scope="module")
def patient() -> Iterator[Decoder]:
    """A decoder with time for a slow machine."""
    one = decoder()
    yield one
    one.close()


def worker(one: Decoder) -> int:
    """The process id of a decoder's worker."""
    one.read(dicom(HEAD))
    return one._worker._process.pid


def children(process: int) -> list[str]:
    return Path(f"/proc/{process}/task/{process}/children").read_text().split()


def decoding(process: int) -> int | None:
    """The fork of a worker that has used the processor for an image; None where there is none."""
    for child in children(process):
        with contextlib.suppress(OSError):
            if int(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[11]) >= 5:
                return int(child)
    return None


def passes(count: int, side: int) -> bytes:
    """A progressive JPEG whose last pass is repeated: a few bytes each, and each goes over all pixels."""
    data = picture(Image.new("L", (side, side), 90), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * count + b"\xff\xd9"


def struck(one: Decoder, process: int, sent: signal.Signals) -> None:
    """Read a slow image, whose fork of the worker `process` gets this signal in the middle of it."""
    wait(lambda: not children(process))  # the fork that read the image before
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(one.read, passes(9_000, 5000))
        wait(lambda: decoding(process))
        os.kill(decoding(process), sent)
        slow.result(30)


@pytest.mark.parametrize(
    "data",
    [
        picture(HEAD, "PNG"),
        picture(HEAD, "JPEG", progressive=True),
        picture(HEAD, "TIFF"),
        picture(HEAD, "WEBP"),
        picture(HEAD, "BMP"),
        dicom(np.stack([HEAD] * 3), Modality="CT", BodyPartExamined="KNEE"),
        compressed(HEAD, "JPEG2000Lossless"),
        nifti(axial(HEAD), zipped=True),
    ],
    ids=["png", "progressive", "tiff", "webp", "bmp", "dicom", "jpeg2000", "nifti"],
)
def test_what_comes_back_is_what_the_readers_say(patient: Decoder, data: bytes):
    found, expected = patient.read(data), decode.read(data)
    assert np.array_equal(found.pixels, expected.pixels)
    assert found[1:] == expected[1:]


def test_refusals_come_back_in_words(patient: Decoder):
    for data, error, words in (
        (b"no image at all, but long enough" * 4, UnsupportedImage, "bytes are not"),
        (dicom(HEAD)[:3000], InvalidImage, "damaged"),
        (b"", InvalidImage, "empty"),
        (picture(np.zeros((20, 20), np.uint8), "TIFF"), InvalidImage, "at least 32"),
    ):
        with pytest.raises(error, match=words):
            patient.read(data)
    with pytest.raises(InvalidImage, match="frame 9"):
        patient.read(dicom(HEAD), 9)


def test_many_images_at_once_come_back_each_to_its_own_caller(patient: Decoder):
    files = [dicom(np.full((40, 40), grey, np.uint8)) for grey in range(24)]
    with ThreadPoolExecutor(8) as pool:
        greys = [int(read.pixels[0, 0]) for read in pool.map(patient.read, files)]
    assert greys == list(range(24))


def test_an_image_that_takes_too_long_is_given_up_and_its_process_ended():
    one = decoder(seconds=0.7)
    process = worker(one)
    bomb = passes(9_000, 5000)
    assert len(bomb) < 2_000_000
    assert not decode.is_plain(bomb)
    started = time.monotonic()
    with pytest.raises(InvalidImage, match=r"longer than the 0\.7 s"):
        one.read(bomb)
    assert time.monotonic() - started < 10
    wait(lambda: not children(process))
    assert worker(one) == process  # the next image has a fresh fork of the same worker
    one.close()


def test_an_image_that_needs_too_much_memory_is_refused():
    one = decoder(memory=60_000_000)
    with pytest.raises(InvalidImage, match=r"too much memory|broke down"):
        one.read(picture(Image.new("RGBA", (5000, 5000)), "PNG"))
    assert one.read(dicom(HEAD)).kind == "DICOM"
    one.close()


def test_a_decoder_that_breaks_down_is_a_refusal_and_the_next_image_is_read():
    one = decoder(seconds=60)
    process = worker(one)
    with pytest.raises(InvalidImage, match="broke down"):
        struck(one, process, signal.SIGSEGV)
    assert worker(one) == process
    one.close()


def test_a_fork_that_gets_no_processor_is_not_the_images_fault():
    one = decoder(seconds=3)
    process = worker(one)
    with pytest.raises(Unavailable, match="of the processor"):
        struck(one, process, signal.SIGSTOP)
    wait(lambda: not children(process))  # it is ended all the same
    one.close()


@pytest.mark.parametrize("sent", [signal.SIGSTOP, signal.SIGKILL])
def test_a_worker_that_begins_nothing_is_not_the_images_fault(monkeypatch: pytest.MonkeyPatch, sent: signal.Signals):
    monkeypatch.setattr("neuroloop.serving.decoding._BEGIN_SECONDS", 0.5)
    one = decoder()
    process = worker(one)
    monkeypatch.setattr(one._worker, "hand_over", lambda job, hand_over=one._worker.hand_over: (
        os.kill(process, signal.SIGSTOP), hand_over(job), os.kill(process, sent)
    ))  # fmt: skip
    with pytest.raises(Unavailable, match="did not begin"):
        one.read(dicom(HEAD))
    os.kill(process, signal.SIGKILL)
    one._worker._process.wait()
    assert one.read(dicom(HEAD)).kind == "DICOM"
    one.close()


def test_a_worker_that_was_killed_is_replaced():
    one = decoder()
    process = worker(one)
    os.kill(process, signal.SIGKILL)
    one._worker._process.wait()
    assert worker(one) != process
    one.close()


def test_a_worker_that_did_not_start_is_no_reason_that_the_next_one_should_not(monkeypatch: pytest.MonkeyPatch):
    one = decoder()
    with monkeypatch.context() as patch:
        patch.setattr("neuroloop.serving.decoding.START_SECONDS", 0.001)
        with pytest.raises(Unavailable, match="not there"):
            one.read(dicom(HEAD))
    assert one.read(dicom(HEAD)).kind == "DICOM"
    with monkeypatch.context() as patch:
        patch.setattr("sys.executable", "/nowhere/python")
        one._forget(one._worker)
        with pytest.raises(Unavailable, match="not there"):
            one.read(dicom(HEAD))
    assert one.read(dicom(HEAD)).kind == "DICOM"
    one.close()


def test_without_a_free_place_the_image_is_turned_away_for_now():
    one = decoder(seconds=30, at_once=1)
    worker(one)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(one.read, passes(9_000, 5000))
        wait(lambda: one._places._value == 0)
        with pytest.raises(Unavailable, match="Too many images"):
            one.read(dicom(HEAD))
        assert one.read(picture(HEAD, "PNG")).kind == "PNG"  # what is plain needs no place
        one.close()
        with pytest.raises(InvalidImage):
            slow.result(30)


def test_the_worker_knows_no_secret_and_its_forks_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NEUROLOOP_DATABASE_URL", "postgresql://user:hunter2@host/name")  # pragma: allowlist secret
    one = decoder()
    process = worker(one)
    assert b"hunter2" not in Path(f"/proc/{process}/environ").read_bytes()
    wait(lambda: not children(process))
    gc.collect()  # what other tests left open closes now, not while this one counts
    before = len(os.listdir(f"/proc/{process}/fd")), len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        one.read(dicom(HEAD))
    assert (len(os.listdir(f"/proc/{process}/fd")), len(os.listdir("/proc/self/fd"))) == before
    wait(lambda: not children(process))
    one.close()


def test_a_closed_decoder_has_ended_its_worker():
    one = decoder()
    process = worker(one)
    one.close()
    assert not Path(f"/proc/{process}").exists()
    with pytest.raises(Unavailable):
        one.read(dicom(HEAD))


def test_the_worker_ends_when_the_service_is_killed():
    code = (
        "import sys, time; from serving.test_decoding import decoder, worker; "
        "print(worker(decoder()), flush=True); time.sleep(60)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    service = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment)
    process = int(service.stdout.readline())
    service.kill()
    service.wait()
    service.stdout.close()
    wait(lambda: not re.search(r"State:\s+[RSD]", _status(process)))


def _status(process: int) -> str:
    try:
        return Path(f"/proc/{process}/status").read_text()
    except OSError:
        return ""


def test_the_settings_become_limits():
    settings = Settings(
        max_upload_mb=3, max_megapixels=5, max_frames=7, max_unpacked_mb=11, max_dicom_depth=13, decode_seconds=0.5
    )
    one = Decoder.of(settings)
    assert one._limits == Limits(bytes=3_000_000, pixels=5_000_000, frames=7, unpacked=11_000_000, depth=13)
    with pytest.raises(ImageTooLarge, match="3,000,000"):
        one.read(bytes(3_000_001))
