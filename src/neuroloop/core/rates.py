"""How often one key, or one address without a key, may call."""

import ipaddress
import time
from collections.abc import Callable

_WINDOW = 60.0  # seconds; a whole minute's allowance may be used at once
_MOST = 20_000  # callers remembered; beyond it those that have been idle longest are forgotten


class Rate:
    """`per_minute` calls a minute for each caller: a token bucket, kept as the time at which it will be full again.

    Not thread-safe: one event loop uses it. Counts are this process'; several servers allow as many times more.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._gap, self._clock = _WINDOW / per_minute, clock
        self._full: dict[str, float] = {}

    def wait(self, caller: str) -> float:
        """Seconds until `caller` may call again; 0 where it may now."""
        return max(0.0, self._full.get(caller, 0.0) + self._gap - _WINDOW - self._clock())

    def spend(self, caller: str) -> float:
        """Count one call; returns `wait` as it was before, and counts nothing where that is not 0."""
        seconds = self.wait(caller)
        if not seconds:
            now = self._clock()
            full = max(self._full.pop(caller, now), now) + self._gap  # popped, so that the latest stand last
            if len(self._full) >= _MOST:
                del self._full[next(iter(self._full))]
            self._full[caller] = full
        return seconds

    def refund(self, caller: str) -> None:
        """Take back one call that `spend` counted."""
        if caller in self._full:
            self._full[caller] -= self._gap


def network(address: str) -> str:
    """The address as one caller: an IPv6 client owns a whole /64 and could take another of its addresses each time."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if parsed.version == 6:
        return str(parsed.ipv4_mapped or ipaddress.ip_network(f"{parsed}/64", strict=False))
    return str(parsed)
