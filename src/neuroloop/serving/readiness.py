"""Whether a prediction would be answered: one look for all who ask, for the probes are open to everybody."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from neuroloop.core.errors import NeuroLoopError

CHECK_SECONDS = 3.0
"""Longest look at each part."""
FRESH_SECONDS = 1.0
"""For so long a look that found all in order is believed."""
_LOG = logging.getLogger(__name__)


class Readiness:
    """Looks at `parts` with `run`, which calls in a thread and raises a `NeuroLoopError` where that takes too long.

    Who asks while a look is under way shares it, so that no crowd at the probes can keep the machine's own from being
    answered. One event loop uses it.
    """

    def __init__(
        self,
        run: Callable[..., Coroutine[Any, Any, Any]],
        parts: Mapping[str, Callable[[], object]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run, self._parts, self._clock = run, parts, clock
        self._look: asyncio.Task[dict[str, str]] | None = None
        self._fresh_until = 0.0

    async def faults(self) -> dict[str, str]:
        """Part -> what is wrong with it, in the words of the error: for this machine only. Empty: it is ready."""
        if self._look is None or (self._look.done() and self._clock() >= self._fresh_until):
            self._look = asyncio.create_task(self._look_at_all())
        return await asyncio.shield(self._look)  # who leaves does not take it from the others

    async def _look_at_all(self) -> dict[str, str]:
        said = await asyncio.gather(*map(self._fault, self._parts.values()))
        faults = {part: fault for part, fault in zip(self._parts, said, strict=True) if fault}
        self._fresh_until = 0.0 if faults else self._clock() + FRESH_SECONDS
        return faults

    async def _fault(self, check: Callable[[], object]) -> str:
        try:
            await self._run(check, seconds=CHECK_SECONDS)
        except NeuroLoopError as error:
            return str(error)
        except Exception:
            _LOG.exception("a readiness check failed unexpectedly")
            return "unexpected fault, see the server's log"
        return ""
