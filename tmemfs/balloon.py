"""Choose the size of a guest's cache by its demand.

Two signals count, each against the present capacity, so that one rule fits any size:

* *returns*: misses on pages that this guest has had before (the pool gave them, or had their ghost). A larger cache
  would have kept those. A miss on a page never seen says nothing, so reading a huge file once grows nothing.
* *requested*: pages requested at all. Hardly any for a while means that the guest is idle, whatever it holds.

A tick with returns for 1/64 of the capacity doubles it. A window of `idle` seconds with fewer than 1/64 requested
halves it. Each halving has its own window, so the cache shrinks step by step and the pool has time to take the pages.
Hysteresis: a halved cache needs four times the rate at which it was halved to double again.

Pure: times are handed in. `DataPath.follow_demand` is the task.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from tmemfs.cache.pagecache import PAGE_SHIFT
from tmemfs.config import BalloonRange

DEMAND_DIVISOR = 64


@dataclass(frozen=True, slots=True)
class Signals:
    """What a guest has counted up to one moment."""

    requested: int  # pages read or written
    returns: int  # pages missed that this guest has had before
    full: bool  # no room for another page in the cache


class Balloon:
    """Turn a guest's signals into sizes. `now` is seconds on any one clock."""

    def __init__(self, allowed: BalloonRange) -> None:
        self.allowed = allowed
        self.grows = self.shrinks = 0
        self._returns = 0
        # (time, pages requested until then); the first is the newest one that is older than the idle window.
        self._requested: deque[tuple[float, int]] = deque()

    def decide(self, now: float, signals: Signals, capacity: int) -> int:
        """Return the capacity to have from now on; `capacity` itself for no change."""
        returns = signals.returns - self._returns
        self._returns = signals.returns
        self._requested.append((now, signals.requested))
        threshold = max(1, (capacity >> PAGE_SHIFT) // DEMAND_DIVISOR)
        wanted = capacity
        if signals.full and returns >= threshold:
            wanted = capacity * 2
        elif self._is_idle(now, threshold):
            wanted = capacity // 2
        wanted = self.allowed.clamp(wanted)
        if wanted != capacity:
            self.grows += wanted > capacity
            self.shrinks += wanted < capacity
            self._requested = deque([(now, signals.requested)])
        return wanted

    def _is_idle(self, now: float, threshold: int) -> bool:
        """Return whether fewer than `threshold` pages were requested in a whole window."""
        begin = now - self.allowed.idle
        requested = self._requested
        while len(requested) > 1 and requested[1][0] <= begin:
            requested.popleft()
        return requested[0][0] <= begin and requested[-1][1] - requested[0][1] < threshold

    def check(self) -> None:
        """Raise AssertionError unless the window is in order and short."""
        times = [time for time, _ in self._requested]
        counts = [count for _, count in self._requested]
        assert times == sorted(times)
        assert counts == sorted(counts)
        assert self.allowed.minimum <= self.allowed.maximum
