"""Hold ranges of pages, first come first served.

A request holds all of its pages from the first look to the last change, so two writers of one page, a write and a
move between pool and overflow, or a read and a discard never interleave, whichever of them has to wait for a disk.
Whoever comes waits only for overlapping ranges that came before, so nobody starves and nobody waits in a circle.
"""

from __future__ import annotations

import trio


class HeldRange:
    """Pages first..last, held or waited for: an async context manager that ends with the hold."""

    __slots__ = ("_ended", "_lock", "first", "last")

    def __init__(self, lock: RangeLock, first: int, last: int) -> None:
        self.first = first
        self.last = last
        self._lock = lock
        self._ended: trio.Event | None = None  # only made when somebody waits for it

    async def __aenter__(self) -> HeldRange:
        ranges = self._lock.ranges
        ahead = [other for other in ranges if other.first <= self.last and self.first <= other.last]
        ranges[self] = None
        try:
            for other in ahead:
                await other.wait_until_ended()
        except BaseException:
            self.release()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.release()

    async def wait_until_ended(self) -> None:
        """Return when this range is held no more: at once, without a turn of the scheduler, if it is so already."""
        if self in self._lock.ranges:
            if self._ended is None:
                self._ended = trio.Event()
            await self._ended.wait()

    def release(self) -> None:
        """Let those go on who waited."""
        del self._lock.ranges[self]
        if self._ended is not None:
            self._ended.set()


class RangeLock:
    """All ranges that are held or waited for, in the order of their coming."""

    def __init__(self) -> None:
        self.ranges: dict[HeldRange, None] = {}

    def hold(self, first: int, last: int) -> HeldRange:
        """Give a context manager that holds pages first..last; entered without a turn of the scheduler if free."""
        return HeldRange(self, first, last)

    def try_hold(self, page: int) -> HeldRange | None:
        """Hold one page at once, or not at all."""
        if any(held.first <= page <= held.last for held in self.ranges):
            return None
        held = HeldRange(self, page, page)
        self.ranges[held] = None
        return held
