"""Decoding of uploads: what is small and plain in this process, everything else in one that may be killed.

A decoder written in C may crash, hang or eat memory on a file made for it. Small PNG and sequential JPEG, which nearly
all uploads are, cost too little for that (see `raster.is_plain`) and are read by the two decoders that are attacked
most and longest; all else goes to `serving.decode_worker`.
"""

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np

from neuroloop.core import errors
from neuroloop.core.errors import Busy, InvalidImage
from neuroloop.core.settings import Settings
from neuroloop.imaging import decode
from neuroloop.imaging.decode import Decoded, Limits
from neuroloop.serving import decode_worker

START_SECONDS = 30.0
"""Longest wait for the worker to have imported its readers; some 1.5 s on a free core."""
QUEUE_SECONDS = 10.0
"""Longest wait for a free place; then it is a 503."""
_WARM_AFTER_SECONDS = 3.0  # after a start: until then the model's load has the cores
_BEGIN_SECONDS = 3.0  # longest wait for a fork to begin
_GRACE_SECONDS = 0.3  # beyond the time limit, which the worker keeps by itself
_LOG = logging.getLogger(__name__)


class Decoder:
    """Reads uploads within limits. Thread-safe. The worker is started when it is first needed."""

    def __init__(self, limits: Limits, *, seconds: float, memory: int, at_once: int) -> None:
        """`seconds` of the processor and `memory` (bytes) are one image's; `at_once` is how many are read at a time."""
        self._limits, self._seconds, self._memory = limits, seconds, memory
        self._places = threading.BoundedSemaphore(at_once)
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        self._closed = False
        self._warming: threading.Timer | None = None

    @classmethod
    def of(cls, settings: Settings) -> "Decoder":
        """The decoder that the settings describe."""
        limits = Limits(
            bytes=settings.max_upload_bytes,
            pixels=int(settings.max_megapixels * 1_000_000),
            frames=settings.max_frames,
            unpacked=int(settings.max_unpacked_mb * 1_000_000),
            depth=settings.max_dicom_depth,
        )
        memory = int(settings.decode_memory_mb * 1_000_000)
        return cls(limits, seconds=settings.decode_seconds, memory=memory, at_once=settings.decode_workers)

    def warm(self) -> None:
        """Start the worker soon, so that the first image that needs it does not wait for it."""
        self._warming = threading.Timer(_WARM_AFTER_SECONDS, self._try_to_start)
        self._warming.daemon = True
        self._warming.start()

    def close(self) -> None:
        """End the worker and what runs in it."""
        with self._lock:
            self._closed = True
            if self._warming:
                self._warming.cancel()
            if self._worker:
                self._worker.close()

    def read(self, data: bytes, frame: int | None = None) -> Decoded:
        """As `decode.read`, with an `InvalidImage` too where it takes too long, too much memory, or crashes.

        Raises `Unavailable` where no place is free, the worker does not start, or the processor is not to be had: then
        nothing is known of the image.
        """
        decode.check_bytes(data, self._limits)
        if decode.is_plain(data):
            return decode.read(data, frame=frame, limits=self._limits)
        if not self._places.acquire(timeout=QUEUE_SECONDS):
            raise Busy(
                "Too many images are being read",
                why=f"no place became free within {QUEUE_SECONDS:.0f} s",
                fix="try again shortly",
            )
        try:
            return self._elsewhere(data, frame)
        finally:
            self._places.release()

    def _elsewhere(self, data: bytes, frame: int | None) -> Decoded:
        ours, theirs = socket.socketpair()
        limit = self._seconds * decode_worker.PATIENCE
        with ours:
            with theirs:
                handed_over = self._hand_over(theirs)
            ours.settimeout(_BEGIN_SECONDS)
            try:
                begun = ours.recv(1) == decode_worker.BEGUN
            except OSError:
                begun = False
            if not begun:
                raise _starved("the process that reads such files did not begin")
            started = time.monotonic()
            ours.settimeout(limit + _GRACE_SECONDS)
            try:
                ours.sendall((-1 if frame is None else min(max(frame, 0), 2**31 - 1)).to_bytes(4, "big", signed=True))
                ours.sendall(data)
                ours.shutdown(socket.SHUT_WR)
                answer = self._receive(ours, started + limit + _GRACE_SECONDS)
            except OSError:  # a timeout as well: the fork was killed, or broke, while it was spoken to
                answer = b""
        read = self._understood(answer)
        if read is not None:
            return read
        ended = time.monotonic()
        if ended - handed_over >= limit:  # had it used its time, it would have ended before
            raise _starved(f"it got less than {self._seconds:g} s of the processor within {limit:g} s")
        if ended - started >= self._seconds:
            why = f"it takes longer than the {self._seconds:g} s that are set aside for one image"
            raise InvalidImage("The image cannot be read in time", why=why, fix="upload a single slice as JPEG or PNG")
        raise InvalidImage(
            "The image is damaged or cut off", why="the reader broke down on it", fix="export or download it again"
        )

    def _receive(self, job: socket.socket, deadline: float) -> bytes:
        """All that is sent until the other side closes, up to the largest answer there can be."""
        parts, room = [], self._limits.pixels + 64_000
        while room > 0 and (part := job.recv(1 << 20)):
            parts.append(part)
            room -= len(part)
            job.settimeout(max(0.001, deadline - time.monotonic()))
        return b"".join(parts)

    def _understood(self, answer: bytes) -> Decoded | None:
        """What the fork says; None where that is not whole. It is not believed: a hostile file may speak through it."""
        size = int.from_bytes(answer[:4], "big")
        try:
            head: dict[str, Any] = json.loads(answer[4 : 4 + size])
            if "error" in head:
                error = getattr(errors, str(head["error"]))
                if issubclass(error, InvalidImage):
                    raise error(str(head["what"]), why=str(head["why"]), fix=str(head["fix"]))
                return None
            height, width = (int(side) for side in head["pixels"])
            decode.check_size(width, height, self._limits)
            pixels = np.frombuffer(answer, np.uint8, offset=4 + size).reshape(height, width)
            return Decoded(
                pixels,
                str(head["kind"]),
                int(head["frames"]),
                int(head["frame"]),
                decode.declared.modality(head["modality"]),
                decode.declared.body_part(head["body_part"]),
                float(head["colour"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    def _hand_over(self, job: socket.socket) -> float:
        """Give a job to the worker; where that has gone, to a new one. Returns the time just before."""
        for _ in range(2):
            worker = self._current()
            before = time.monotonic()
            try:
                worker.hand_over(job)
                return before
            except OSError:
                _LOG.warning("the decoding worker ended (exit status %s) and is started anew", worker.status())
                self._forget(worker)
        raise _no_worker()

    def _try_to_start(self) -> None:
        with contextlib.suppress(Busy):  # closed meanwhile, or said to the first who needs it
            self._current()

    def _current(self) -> "_Worker":
        """The worker, started if need be, ready."""
        with self._lock:
            if self._closed:
                raise _no_worker()
            if self._worker is None:
                try:
                    self._worker = _Worker(self._limits, self._seconds, self._memory)
                except OSError as error:  # no process or memory is left
                    _LOG.warning("the decoding worker cannot be started: %s", error)
                    raise _no_worker() from None
            worker = self._worker
        try:
            worker.wait()
        except Busy:
            self._forget(worker)  # the next image may find a worker that starts
            raise
        return worker

    def _forget(self, worker: "_Worker") -> None:
        with self._lock:
            if self._worker is worker:
                self._worker = None


class _Worker:
    """The process that forks for every image."""

    def __init__(self, limits: Limits, seconds: float, memory: int) -> None:
        self._control, theirs = socket.socketpair()
        self._control.settimeout(START_SECONDS)
        given = json.dumps({"limits": limits, "seconds": seconds, "memory": memory})
        # No secret of this process: a decoder that was taken over would find it. One thread: forks have only one.
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL") if name in os.environ}
        kept |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        kept |= dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"), "1")
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", decode_worker.__name__, str(theirs.fileno()), given],
                env=kept,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._ready = threading.Lock()
        self._is_ready = False

    def wait(self) -> None:
        """Until it has imported its readers. Raises `Unavailable`."""
        with self._ready:
            if not self._is_ready:
                try:
                    self._is_ready = self._control.recv(1) == decode_worker.READY
                except OSError:
                    self._is_ready = False
            if not self._is_ready:
                self._process.kill()
                raise _no_worker()

    def hand_over(self, job: socket.socket) -> None:
        """Pass the worker's end of a socket on. Raises `OSError` where it has gone."""
        socket.send_fds(self._control, [b"!"], [job.fileno()])

    def status(self) -> int | None:
        """The exit status, None while it runs."""
        return self._process.poll()

    def close(self) -> None:
        """End it; it ends by itself where this process cannot say so any more."""
        self._control.close()
        try:
            self._process.wait(2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _no_worker() -> Busy:
    return _starved("the process that reads such files is not there")


def _starved(why: str) -> Busy:
    return Busy("The image cannot be read for now", why=why, fix="try again shortly")
