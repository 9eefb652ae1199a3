"""The look that decides on readiness: shared by all who ask at once, believed for a moment, told in words."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from neuroloop.core.errors import Unavailable
from neuroloop.serving.readiness import FRESH_SECONDS, Readiness


class Looked:
    """A part that counts how often it was looked at; `fault` is what is wrong with it."""

    def __init__(self) -> None:
        self.times, self.fault = 0, ""

    def __call__(self) -> None:
        self.times += 1
        if self.fault:
            raise Unavailable(self.fault)


async def thread(check: Callable[[], object], *, seconds: float) -> Any:
    return await asyncio.wait_for(asyncio.to_thread(check), seconds)


def asked(parts: Mapping[str, Callable[[], object]], *, at: list[float], times: int = 1) -> list[list[dict[str, str]]]:
    """What each of `times` callers at once is told, at each of these times."""
    now = [0.0]

    async def ask() -> list[list[dict[str, str]]]:
        readiness, told = Readiness(thread, parts, clock=lambda: now[0]), []
        for now[0] in at:
            told.append(await asyncio.gather(*(readiness.faults() for _ in range(times))))
        return told

    return asyncio.run(ask())


def test_a_crowd_shares_one_look_which_is_believed_for_a_moment():
    database, store = Looked(), Looked()
    told = asked({"database": database, "store": store}, at=[0, FRESH_SECONDS - 0.1, FRESH_SECONDS + 0.1], times=50)
    assert told == [[{}] * 50] * 3
    assert (database.times, store.times) == (2, 2)


def test_a_fault_is_told_to_all_and_looked_at_again_at_once():
    database, store = Looked(), Looked()
    store.fault = "the bucket is away"
    told = asked({"database": database, "store": store}, at=[0, 0], times=3)
    assert told == [[{"store": "the bucket is away."}] * 3] * 2
    assert store.times == 2


def test_a_check_that_fails_in_an_unforeseen_way_is_a_fault_too():
    def broken() -> None:
        raise ZeroDivisionError

    assert asked({"model": broken}, at=[0]) == [[{"model": "unexpected fault, see the server's log"}]]
