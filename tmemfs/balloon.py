"""Choose the size of a guest's cache by its demand (`--balloon`).

Two signals are compared with the present capacity, so the same rule fits any size:

* *returns*: misses on pages that were cached before: the pool had the page, or its ghost. A larger cache would have
  kept them. A first read of a page does not count, so reading a huge file once does not grow the cache.
* *requested*: all pages requested. Few of them for a while mean that the guest is idle.

The cache doubles after a tick with returns of 1/64 of the capacity. It halves after a window of `idle` seconds with
fewer than 1/64 requested. Each halving starts a new window, so the pool has time to take the pages. Hysteresis: to
double again, a halved cache needs four times the rate at which it was halved.

Pure: times are arguments. `DataPath.follow_demand` is the task.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from tmem.arena import PAGE_SHIFT
from tmemfs.config import BalloonRange

DEMAND_DIVISOR = 64


@dataclass(frozen=True, slots=True)
class Signals:
    """The counters of a guest at one moment."""

    requested: int  # pages read or written
    returns: int  # misses on pages that were cached before
    full: bool  # the cache has no free frame


class Balloon:
    """Decides the size of one guest's cache. `now` is in seconds of any clock."""

    def __init__(self, allowed: BalloonRange) -> None:
        self.allowed = allowed
        self.grows = self.shrinks = 0
        self._returns = 0
        # (time, pages requested until then). The first is the newest one from before the idle window.
        self._requested: deque[tuple[float, int]] = deque()

    def decide(self, now: float, signals: Signals, capacity: int) -> int:
        """Return the new capacity in bytes; `capacity` for no change."""
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
        """Return whether fewer than `threshold` pages were requested in a full window."""
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
