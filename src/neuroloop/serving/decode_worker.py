"""The process in which uploads are decoded that may be expensive or hostile; `serving.decoding` starts it and asks.

It imports the readers once, then forks for every image: a fork costs some milliseconds, sees nothing of the image
before, and whatever becomes of it, the next one is a fresh copy. Each may use the processor for so long, is ended by
this process where it does not get that within a multiple of the time, and can neither write files nor take more memory
than it is given.
"""

import contextlib
import gc
import json
import math
import os
import resource
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from neuroloop.core.errors import InvalidImage
from neuroloop.imaging import decode

READY, BEGUN = b"+", b"."
"""What the worker says when it has imported its readers, and a fork before anything else."""
PATIENCE = 3.0
"""The time limit on the clock, as a multiple of that on the processor: a busy machine is not the image's fault."""
_LOOK_SECONDS = 0.05  # how often the time limits are looked at while something runs


def main() -> None:
    """Serve until the other side of the socket `argv[1]` is closed; `argv[2]` is JSON of limits, seconds, memory."""
    control, given = socket.socket(fileno=int(sys.argv[1])), json.loads(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the API, which then closes the socket
    for reader in ("pydicom.pixels", "nibabel.orientations", "PIL.TiffImagePlugin", "PIL.WebPImagePlugin"):
        __import__(reader)
    gc.freeze()  # what is there now stays shared with the forks
    control.sendall(READY)
    running: dict[int, float] = {}  # process -> when it has to be done
    while True:
        readable, _, _ = select.select([control], [], [], _LOOK_SECONDS if running else None)
        if readable:
            mark, sockets, _, _ = socket.recv_fds(control, 1, 1)
            if not mark:
                break
            process = os.fork()
            if process == 0:
                control.close()
                _answer(socket.socket(fileno=sockets[0]), given)
            os.close(sockets[0])
            running[process] = time.monotonic() + given["seconds"] * PATIENCE
        _reap(running)
    for process in running:
        os.kill(process, signal.SIGKILL)


def _reap(running: dict[int, float]) -> None:
    """End what is overdue, and forget what has ended."""
    for process, deadline in list(running.items()):
        if time.monotonic() > deadline:
            os.kill(process, signal.SIGKILL)
        if os.waitpid(process, os.WNOHANG)[0]:
            del running[process]


def _answer(job: socket.socket, given: dict[str, Any]) -> None:
    """In the fork: read one request, answer it, end."""
    with contextlib.suppress(BaseException):  # a fork that breaks says so by ending without an answer
        job.sendall(BEGUN)
        _confine(given["memory"], given["seconds"])
        with job.makefile("rb") as request:
            frame = int.from_bytes(request.read(4), "big", signed=True)
            data = request.read()
        head: dict[str, Any] = {}
        pixels = b""
        try:
            read = decode.read(data, frame=None if frame < 0 else frame, limits=decode.Limits(*given["limits"]))
            head = read._asdict() | {"pixels": read.pixels.shape}
            pixels = read.pixels.tobytes()
        except InvalidImage as error:
            head = {"error": type(error).__name__, "what": error.what, "why": error.why, "fix": error.fix}
        words = json.dumps(head).encode()
        for part in (len(words).to_bytes(4, "big"), words, pixels):
            job.sendall(part)
    os._exit(0)


def _confine(memory: int, seconds: float) -> None:
    """Take away what a decoder has no use for: memory, time, files, core dumps, and a place to print what it saw."""
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)
    limits = [(resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CPU, math.ceil(seconds) + 1)]
    with contextlib.suppress(OSError):  # elsewhere than on Linux it is not known how much there is already
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limits.append((resource.RLIMIT_AS, pages * resource.getpagesize() + memory))
    for kind, most in limits:
        with contextlib.suppress(OSError, ValueError):  # a lower limit may hold already
            resource.setrlimit(kind, (most, most))
    signal.setitimer(signal.ITIMER_PROF, seconds)  # of the processor; nobody handles the signal, so it ends the fork


if __name__ == "__main__":
    main()
