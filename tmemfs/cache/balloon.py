"""Decide the size of a guest's cache (its X) by its need: no clock, no I/O.

Two signals, each against the present capacity, so that one rule fits any size:

* *returns*: misses on pages that this guest has had before (the pool gave them, or still had their ghost). A larger
  cache would have kept those; a miss on a page never seen says nothing, so reading a huge file once grows nothing.
* *asked*: pages asked for at all. Hardly any for a while means that the guest is idle, whatever it holds.

A tick with returns for 1/64 of the capacity doubles it. A window of `idle` seconds in which less than 1/64 was asked
for halves it; each halving has its own window, so it goes down to its minimum step by step and gives the pool time to
take the pages. Hysteresis: to be doubled again, a halved cache needs four times the rate that it was halved at.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from tmemfs.cache.pagecache import PAGE_SHIFT

PARTS = 64
TICKS = 8  # looks in one idle window
IDLE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class BalloonRange:
    """Say between which sizes, in bytes, a cache may be moved, and how long a guest must be quiet to be idle."""

    minimum: int
    maximum: int
    idle: float = IDLE_SECONDS

    @property
    def tick(self) -> float:
        """Seconds between two looks."""
        return self.idle / TICKS

    def clamp(self, capacity: int) -> int:
        """Give the nearest size that is allowed."""
        return max(self.minimum, min(capacity, self.maximum))


@dataclass(frozen=True, slots=True)
class Signals:
    """What a guest has counted up to one moment."""

    asked: int  # pages read or written
    returns: int  # pages missed that this guest has had before
    full: bool  # no room for another page in the cache


class Balloon:
    """Turn a guest's signals into sizes. `now` is seconds on any one clock."""

    def __init__(self, allowed: BalloonRange) -> None:
        self.allowed = allowed
        self.grows = self.shrinks = 0
        self._returns = 0
        # (time, pages asked for until then): the newest one that is older than the idle window is the first.
        self._asked: deque[tuple[float, int]] = deque()

    def decide(self, now: float, signals: Signals, capacity: int) -> int:
        """Give the capacity to have from now on, `capacity` itself for no change."""
        returns = signals.returns - self._returns
        self._returns = signals.returns
        self._asked.append((now, signals.asked))
        part = max(1, (capacity >> PAGE_SHIFT) // PARTS)
        wanted = capacity
        if signals.full and returns >= part:
            wanted = capacity * 2
        elif self._is_idle(now, part):
            wanted = capacity // 2
        wanted = self.allowed.clamp(wanted)
        if wanted != capacity:
            self.grows += wanted > capacity
            self.shrinks += wanted < capacity
            self._asked = deque([(now, signals.asked)])
        return wanted

    def _is_idle(self, now: float, part: int) -> bool:
        """Tell whether less than `part` pages were asked for in a whole window."""
        begin = now - self.allowed.idle
        asked = self._asked
        while len(asked) > 1 and asked[1][0] <= begin:
            asked.popleft()
        return asked[0][0] <= begin and asked[-1][1] - asked[0][1] < part

    def check(self) -> None:
        """Raise AssertionError unless the window is in order and short."""
        times = [time for time, _ in self._asked]
        counts = [count for _, count in self._asked]
        assert times == sorted(times)
        assert counts == sorted(counts)
        assert self.allowed.minimum <= self.allowed.maximum
