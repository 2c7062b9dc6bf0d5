"""Carry out what the lender decided, in order, in a thread beside the event loop.

A fallocate takes 0.1 ms a MiB while there is memory and much longer when the kernel must reclaim some; the loop that
hears the guests must not stand still meanwhile. What waits is taken together, so that many small decisions cost one
trip to the thread. Freeing a dead guest's arena (0.1 s for 2 GiB) has a thread of its own each time.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable

import trio

from tmem.lending.daemon import memfds
from tmem.lending.daemon.arenas import Arena, Arenas, Found, Work
from tmem.lending.lender.actions import Close, Punch
from tmem.lending.lender.slabmap import count

log = logging.getLogger(__name__)

_SMALL = 64  # slabs: punching them costs less than the trip to the thread, and waits for no memory
_AT_ONCE = 16  # decisions a trip: at most BATCH slabs each, so others do not wait for long


class Executor:
    """A queue of decisions and the task that has them carried out."""

    def __init__(self, arenas: Arenas, found: Callable[[Found], None], closed: Callable[[int], None]) -> None:
        """`found` is called in the loop with each result, `closed` when a guest's memory is free."""
        self._arenas = arenas
        self._found = found
        self._closed = closed
        self._queue: deque[Work | Close] = deque()
        self._pending: Counter[int] = Counter()
        self._wake = trio.Event()

    def submit(self, action: Work | Close) -> None:
        """Queue a decision; a small Punch that nothing comes before is carried out at once."""
        if not self._pending and isinstance(action, Punch) and count(action.runs) <= _SMALL:
            self._arenas.work([action])
            return
        self._queue.append(action)
        self._pending[action.guest] += 1
        self._wake.set()

    def is_busy(self, guest: int) -> bool:
        """Tell whether something is still to be done to a guest's arena."""
        return self._pending[guest] > 0

    async def run(self) -> None:
        """Carry out what is submitted, until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                await self._wake.wait()
                if self._queue and isinstance(self._queue[0], Close):
                    guest = self._queue.popleft().guest
                    nursery.start_soon(self._close, guest, self._arenas.release(guest))
                elif self._queue:
                    await self._work()
                if not self._queue:
                    self._wake = trio.Event()

    async def _work(self) -> None:
        """Take the decisions before the next Close in one trip."""
        works: list[Work] = []
        while self._queue and len(works) < _AT_ONCE:
            action = self._queue[0]
            if isinstance(action, Close):
                break
            works.append(action)
            self._queue.popleft()
        # The thread is waited for even at the end: it works on descriptors that are closed after.
        results = await trio.to_thread.run_sync(self._arenas.work, works)
        for work in works:
            self._finish(work.guest)
        for result in results:
            self._found(result)

    async def _close(self, guest: int, arena: Arena | None) -> None:
        if arena is not None:
            try:
                await trio.to_thread.run_sync(memfds.free, arena.fd, arena.slabs)
            except OSError as error:
                log.warning("guest %d: its memory cannot be freed: %s", guest, error)
        self._finish(guest)
        self._closed(guest)

    def _finish(self, guest: int) -> None:
        self._pending[guest] -= 1
        if not self._pending[guest]:
            del self._pending[guest]
