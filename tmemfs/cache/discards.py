"""Free what files have forgotten, in steps between which requests are served.

A file forgets all of its pages by taking a new page table, and a new object number in the pool: nothing finds the old
ones, however many they are. They still hold frames and slots, and are counted, until they are freed here. To free them
at once took 1 s for 400,000 pages, and every request waited for it.
"""

from __future__ import annotations

from collections import deque

import trio

from tmem import Pool
from tmemfs.cache.pagecache import PageCache, PageTable

STEP = 256  # pages freed between two looks at the requests: half a millisecond


class Discards:
    """The discarded page tables and objects of one guest."""

    def __init__(self, cache: PageCache, pool: Pool | None) -> None:
        self._cache = cache
        self._pool = pool
        self._tables: deque[PageTable] = deque()
        self._objects: deque[int] = deque()
        self._wake = trio.Event()

    def add(self, table: PageTable) -> None:
        """Take over a page table that no file has any more."""
        self._tables.append(table)
        self.add_object(table.oid)

    def add_object(self, oid: int) -> None:
        """Take over an object of the pool under whose number nothing is looked for or put any more."""
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
        """Free whatever comes."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            await self.finish()

    def check(self) -> None:
        """Raise AssertionError unless what is to be freed is nobody's."""
        assert all(table.discarded for table in self._tables)
