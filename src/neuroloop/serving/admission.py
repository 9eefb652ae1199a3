"""Back-pressure: how many predictions are worked on, how many wait, and what becomes of the rest.

A queue without an end turns a crowd into answers that come when nobody waits for them any more. This one has room for
a burst. Once that overflows it is no burst but more than the server can do, and a short queue is enough to keep the
threads busy: until no more are turned away, only so many wait, the latest of those who waited are sent off, and fewer
are worked on at once, for they would share the processor and each take longer. So answers that are given stay quick.
Nearly all who are turned away learn it at once, before a body is read: at the door, where those count too who were let
in a moment before and are still sending. Whose key has not been seen valid does not count there, or strangers could
have others sent off.
"""

import asyncio
import contextlib
import contextvars
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import takewhile
from typing import Any, NamedTuple, TypeVar

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from neuroloop.core.errors import Busy
from neuroloop.serving import problems

BURST = 64
"""Requests that may wait while all is well."""
CROWD = 1
"""Requests that may wait while others are being turned away: enough that no thread is idle until the next comes."""
CALM_SECONDS = 1.0
"""A crowd is over when nobody was turned away for so long."""
COMING_SECONDS = 0.25
"""How long a request may count from the door on, until it waits or is worked on: enough for a key and some 100 kB of
body on a busy server."""
COMING_WHILE_IDLE_SECONDS = 0.03
"""The same while a thread has nothing to do: whoever sends slowly must not keep others out then."""
_arrive: contextvars.ContextVar[Callable[[], object]] = contextvars.ContextVar("arrive", default=lambda: None)
_LOG = logging.getLogger(__name__)
T = TypeVar("T")


class Places:
    """`at_once` threads for blocking work, and a bounded queue in front of them. One event loop uses it.

    Who is patient waits in a queue apart, and the two take turns: single uploads need not wait for batches, nor batches
    for them. Of the threads, only `in_a_crowd` are used while others are being turned away; all by default.
    """

    def __init__(
        self, at_once: int, name: str, clock: Callable[[], float] = time.monotonic, *, in_a_crowd: int | None = None
    ) -> None:
        self._pool = ThreadPoolExecutor(at_once, thread_name_prefix=name)
        self._free, self._clock = at_once, clock
        self._spared = at_once - min(max(in_a_crowd or at_once, 1), at_once)
        self._queue: deque[asyncio.Future[None]] = deque()
        self._patient: deque[asyncio.Future[None]] = deque()
        self._patient_next = False
        self._coming: dict[object, float] = {}  # since when, the latest last
        self._crowded_until = 0.0

    def full(self, patient: bool = False) -> bool:
        """Whether one more, or one more whose parts are patient, would be turned away."""
        idle = self._has_place() and not self._somebody_waits()
        since = self._clock() - (COMING_WHILE_IDLE_SECONDS if idle else COMING_SECONDS)
        coming = sum(1 for _ in takewhile(lambda began: began > since, reversed(self._coming.values())))
        return len(self._patient if patient else self._queue) + coming >= self._limit(patient)

    @contextlib.contextmanager
    def coming(self) -> Iterator[None]:
        """Around a request that was let in: it counts as coming until it calls `run`, here or of other places, ends, or
        takes too long."""
        self._coming[me := object()] = self._clock()
        token = _arrive.set(lambda: self._coming.pop(me, None))
        try:
            yield
        finally:
            self._coming.pop(me, None)
            _arrive.reset(token)

    def turned_away(self) -> Busy:
        """Note that one was turned away, which makes it a crowd; the error to tell them."""
        now = self._clock()
        if now >= self._crowded_until:
            _LOG.warning("more requests than can be answered; some are turned away")
        self._crowded_until = now + CALM_SECONDS
        while len(self._queue) > CROWD:
            if not (turn := self._queue.pop()).done():
                turn.set_exception(_busy())
        return _busy()

    async def run(self, function: Callable[..., T], *args: Any, seconds: float, patient: bool = False) -> T:
        """`function(*args)` in a thread. Raises `Unavailable` where the queue is full, or after `seconds`.

        Who is `patient` waits however long the queue is, and is not sent off: parts of a request that was let in.
        """
        deadline = self._clock() + seconds
        _arrive.get()()
        try:
            await self._place(seconds, patient)
            job = self._start(function, *args)
            async with asyncio.timeout(max(0.0, deadline - self._clock())):
                return await asyncio.wrap_future(job)
        except TimeoutError:
            raise too_slow(seconds) from None

    def close(self) -> None:
        """Drop what is queued; running work ends by its own time limits."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _place(self, seconds: float, patient: bool) -> None:
        if self._has_place() and not self._somebody_waits():
            self._free -= 1
            return
        if not patient and len(self._queue) >= self._limit():  # those who came later are nobody to wait for
            raise self.turned_away()
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue = self._patient if patient else self._queue
        queue.append(turn)
        try:
            await asyncio.wait_for(turn, seconds)
        except BaseException:
            if turn in queue:
                queue.remove(turn)
            elif turn.done() and not turn.cancelled() and turn.exception() is None:
                self._pass_on()  # the turn came as the client left
            raise

    def _start(self, function: Callable[..., T], *args: Any) -> "Future[T]":
        """Begin; the place is free again when the work has ended, not when somebody stops waiting for it."""
        loop = asyncio.get_running_loop()
        try:
            context = contextvars.copy_context()  # so that lines logged there name the request
            job = self._pool.submit(context.run, function, *args)
        except BaseException:
            self._pass_on()
            raise
        job.add_done_callback(lambda _: _on(loop, self._pass_on))
        return job

    def _pass_on(self) -> None:
        """A place is free: give it to whoever has waited longest, by turns of both queues, and others that are free to
        the next."""
        self._free += 1
        while self._somebody_waits() and self._has_place():
            self._patient_next = not self._patient_next
            first, second = (self._patient, self._queue) if self._patient_next else (self._queue, self._patient)
            turn = (first or second).popleft()
            if not turn.done():
                turn.set_result(None)
                self._free -= 1

    def _somebody_waits(self) -> bool:
        return bool(self._queue or self._patient)

    def _has_place(self) -> bool:
        return self._usable() > 0

    def _limit(self, patient: bool = False) -> int:
        """How many may be on their way to a thread: as many as are free, and those who may wait."""
        return max(self._usable(), 0) + (CROWD if self._crowded() and not patient else BURST)

    def _usable(self) -> int:
        """Free threads; fewer than none where more are at work than a crowd should have."""
        return self._free - (self._spared if self._crowded() else 0)

    def _crowded(self) -> bool:
        return self._clock() < self._crowded_until


class Door:
    """ASGI middleware that turns requests to `paths` away while `places` are full: at no cost, so before all else.

    Of them, the parts of what is sent to `patient` paths are. Only who is `expected` counts, and can send others off. A
    stranger passes, to be refused for want of a key.
    """

    def __init__(
        self,
        app: ASGIApp,
        places: Places,
        paths: frozenset[str],
        expected: Callable[[Scope], bool] = lambda _: True,
        patient: frozenset[str] = frozenset(),
    ) -> None:
        self._app, self._places, self._paths, self._expected, self._patient = app, places, paths, expected, patient

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on, or not."""
        counts = scope["type"] == "http" and scope["path"] in self._paths and scope["method"] == "POST"
        if not counts or not self._expected(scope):
            return await self._app(scope, receive, send)
        if self._places.full(scope["path"] in self._patient):
            scope["route"] = _Named(scope["path"])  # for the log and the metrics, as if it had been reached
            answer = problems.from_error(self._places.turned_away())
            if "transfer-encoding" in Headers(scope=scope):  # it may have no end, and nobody will read it
                answer.headers["Connection"] = "close"
            return await answer(scope, receive, send)
        with self._places.coming():
            await self._app(scope, receive, send)


def too_slow(seconds: float) -> Busy:
    """The error of work that was not done in time."""
    return Busy(
        "The answer took too long",
        why=f"the store, the database or a free thread could not be had within {seconds:.0f} s",
        fix="try again shortly",
    )


class _Named(NamedTuple):
    path: str


def _on(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(call)


def _busy() -> Busy:
    return Busy(
        "The service is busy", why="more images are waiting than it can answer in time", fix="try again shortly"
    )
