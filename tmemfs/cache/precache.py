"""Feed the ephemeral pool with evicted clean pages, and get them back.

The victim queue is drained behind the replies, by one task. A batch grows with the queue, so that a reader that gets
pages faster than they are compressed does not outrun the drain; each put ends before the next await, so a page is in
the cache or in the pool, never in both and never, without being counted as dropped, in neither.
"""

from __future__ import annotations

import time

import trio

from tmem import Pool
from tmemcommon.wakeup import Wakeup
from tmemfs.cache.admission import Admission
from tmemfs.cache.discards import Discards
from tmemfs.cache.pagecache import PAGE_SHIFT, PageCache, PageOwner
from tmemfs.cache.stocking import Stocking

MANY = 4096  # pages; a failed truncate to 2**62 bytes must not be a loop over 2**50 of them
STEP = 64  # pages that leave a shrinking cache between two such looks
FRAMES = 1024  # of a cache that has shrunk, given back between two
BATCH = 16  # pages put between two looks at the requests: about 200 µs


class Precache:
    """The guest's private ephemeral pool; with no pool, every get misses and nothing is put."""

    def __init__(self, cache: PageCache, pool: Pool | None, stocking: Stocking, victims: Wakeup) -> None:
        """Serve the pool; the cache sets `victims` when its victim queue is to be drained."""
        self.cache = cache
        self._stocking = stocking
        self.pool = pool
        self.discards = Discards(cache, pool)
        self.admission = Admission()
        self._victims = victims

    def get(self, owner: PageOwner, index: int) -> bytes | None:
        """Take a page out of the pool; the caller owes it to the cache before its next await."""
        return self.pool.get(owner.pages.oid, index) if self.pool is not None else None

    def accept(self, owner: PageOwner, index: int, page: bytes) -> None:
        """Move a page that was got into the cache.

        A reader that gets faster than the drain puts would have the cache drop pages: here it exchanges, a put for a
        get (15 µs, against the backing read that the get has saved).
        """
        if not self.cache.free_frames and not self.drain(BATCH):
            self.cache.queue_victims(BATCH)  # nothing was queued, or all of it was rescued
            self.drain(BATCH)
        if self.cache.free_frames:
            self.cache.insert_page(owner, index, page, True)
        elif self.pool is not None:
            self.pool.put(owner.pages.oid, index, page, True)  # a shrink is taking the frames, or all pages are dirty

    def holds(self, owner: PageOwner, index: int) -> bool:
        """Tell whether a get would be likely to hit, without counting."""
        return self.pool is not None and self.pool.holds(owner.pages.oid, index)

    def should_bypass(self, owner: PageOwner, first: int, last: int, started: float) -> bool:
        """Return whether pages whose reading ahead began at `started` are not worth a put when they are evicted."""
        if self.pool is None:
            return False
        capacity_pages, now, busy = self.cache.frames + self.pool.reach, trio.current_time(), time.thread_time()
        return self.admission.should_bypass(
            owner.pages.oid, first, last, capacity_pages=capacity_pages, now=now, busy=busy, took=now - started
        )

    def flush(self, owner: PageOwner, first: int, last: int) -> None:
        """Make sure that the pool has none of the owner's pages first..last (where they are many: none at all)."""
        pool, table = self.pool, owner.pages
        if pool is not None and pool.has_object(table.oid):
            if last - first > MANY:
                self.discards.add_object(table.renumber())
                return
            for index in range(first, last + 1):
                pool.flush_page(table.oid, index)

    def drain(self, count: int) -> int:
        """Put up to `count` victims into the pool and free their frames. Return how many."""
        cache, pool = self.cache, self.pool
        for done in range(count):
            frame = cache.next_victim()
            if frame < 0:
                return done
            if pool is not None:
                table, index = cache.describe(frame)
                if not table.discarded:
                    pool.put(table.oid, index, cache.page(frame), bool(cache.pool_bit[frame]))
            cache.evict(frame)
        return count

    async def run(self) -> None:
        """Drain the victim queue whenever something waits in it."""
        while True:
            await self._victims.wait()
            while self.cache.victims:
                count = max(BATCH, len(self.cache.victims) // 4)
                await self._stocking.wait_for_stock(count)
                self.drain(count)
                await trio.lowlevel.checkpoint()

    async def resize(self, capacity: int) -> None:
        """Change the size of the cache; what no longer fits goes into the pool.

        Most of it does so before the bound moves: until then who reads meanwhile finds free frames. Somebody who reads
        as fast as pages leave cannot hold that up for ever.
        """
        cache = self.cache
        cache.bypassing[:] = bytes(len(cache.bypassing))  # nobody waits for these puts but who asked for the size
        surplus = cache.resident - (capacity >> PAGE_SHIFT)
        for _ in range(2 * surplus // STEP + 1):
            if not await self._shed(cache.resident - (capacity >> PAGE_SHIFT)):
                break
        cache.set_capacity(capacity)
        while await self._shed(cache.excess):
            pass  # what is left then is dirty, and leaves as it is written back
        while cache.settle(FRAMES):
            await trio.lowlevel.checkpoint()

    async def _shed(self, surplus: int) -> bool:
        """Move some of so many pages into the pool; False when there was none to move."""
        if surplus <= 0 or not self.cache.queue_victims(min(STEP, surplus)):
            return False
        await self._stocking.wait_for_stock(len(self.cache.victims))
        self.drain(len(self.cache.victims))
        await trio.lowlevel.checkpoint()
        return True
