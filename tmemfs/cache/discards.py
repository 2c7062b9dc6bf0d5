"""Free the dropped pages of files in steps, so that requests are served in between.

A file drops all of its pages by taking a new page table, and a new object number in the pool, in constant time. The old
pages keep their frames and slots until they are freed here. Freeing 400,000 pages at once blocked the event loop for
1 s.
"""

from __future__ import annotations

from collections import deque

import trio

from tmem import Pool
from tmemcommon.wakeup import Wakeup
from tmemfs.cache.pagecache import PageCache, PageTable

STEP = 256  # pages freed between two checkpoints: 0.5 ms


class Discards:
    """The discarded page tables and objects of one guest."""

    def __init__(self, cache: PageCache, pool: Pool | None) -> None:
        self._cache = cache
        self._pool = pool
        self._tables: deque[PageTable] = deque()
        self._objects: deque[int] = deque()
        self._wake = Wakeup()

    def add(self, table: PageTable) -> None:
        """Add a page table that no file uses any more."""
        self._tables.append(table)
        self.add_object(table.oid)

    def add_object(self, oid: int) -> None:
        """Add a pool object whose number is not used any more."""
        self._objects.append(oid)
        self._wake.set()

    def _step(self) -> None:
        """Free up to STEP pages."""
        left = STEP
        while self._tables and left > 0:
            left -= 1 + self._cache.free_some(self._tables[0], left)
            if not self._tables[0]:
                self._tables.popleft()
        while self._objects and left > 0:
            left -= 1
            if self._pool is not None and self._pool.has_object(self._objects[0]):
                left -= self._pool.flush_object(self._objects[0], left)
                continue
            self._objects.popleft()

    async def finish(self) -> None:
        """Free everything."""
        while self._tables or self._objects:
            self._step()
            await trio.lowlevel.checkpoint()

    async def run(self) -> None:
        """Free what is added, until cancelled."""
        while True:
            await self._wake.wait()
            await self.finish()

    def check(self) -> None:
        """Raise AssertionError unless no file uses the page tables."""
        assert all(table.discarded for table in self._tables)
