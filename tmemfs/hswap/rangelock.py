"""A fair lock on ranges of pages.

A request holds its range from the first look at a page to the last change. So two requests for one page never
interleave, even when one of them waits for a disk. A request waits only for overlapping ranges that were requested
before its own: this excludes starvation and deadlock.
"""

from __future__ import annotations

import trio


class HeldRange:
    """An async context manager: pages first..last, held or waited for."""

    __slots__ = ("_lock", "_released", "first", "last")

    def __init__(self, lock: RangeLock, first: int, last: int) -> None:
        self.first = first
        self.last = last
        self._lock = lock
        self._released: trio.Event | None = None  # made when another request waits for it

    async def __aenter__(self) -> HeldRange:
        ranges = self._lock.ranges
        earlier = [other for other in ranges if other.first <= self.last and self.first <= other.last]
        ranges[self] = None
        try:
            for other in earlier:
                await other.wait_until_released()
        except BaseException:
            self.release()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.release()

    async def wait_until_released(self) -> None:
        """Wait until this range is released; without a checkpoint if it already is."""
        if self in self._lock.ranges:
            if self._released is None:
                self._released = trio.Event()
            await self._released.wait()

    def release(self) -> None:
        """Release the range and wake those that wait for it."""
        del self._lock.ranges[self]
        if self._released is not None:
            self._released.set()


class RangeLock:
    """All ranges that are held or waited for, in the order of the requests."""

    def __init__(self) -> None:
        self.ranges: dict[HeldRange, None] = {}

    def hold(self, first: int, last: int) -> HeldRange:
        """Return a context manager that holds pages first..last; entering it is no checkpoint if they are free."""
        return HeldRange(self, first, last)

    def try_hold(self, page: int) -> HeldRange | None:
        """Hold one page without waiting; return None if it is held or waited for."""
        if any(held.first <= page <= held.last for held in self.ranges):
            return None
        held = HeldRange(self, page, page)
        self.ranges[held] = None
        return held
