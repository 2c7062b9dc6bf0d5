"""The memory of one guest: a page cache and the pool below it, shared by the files that it makes."""

from __future__ import annotations

import trio

from tmem import Pool
from tmemcommon.wakeup import Wakeup
from tmemfs.cache.file import File
from tmemfs.cache.pagecache import PageCache
from tmemfs.cache.precache import Precache
from tmemfs.cache.stocking import Stocking


class Memory:
    """Cache and pool. Pages are counted in both; sizes are bytes."""

    def __init__(self, cache_bytes: int, *, cache_limit: int, pool: Pool | None, stocking: Stocking) -> None:
        """Make a cache of `cache_bytes`; `cache_limit` bounds what a later resize may ask for."""
        victims = Wakeup()
        # For the modules of this folder:
        self.cache = PageCache(cache_bytes, limit=cache_limit, on_victims=victims.set if pool is not None else None)
        self.precache = Precache(self.cache, pool, stocking, victims)
        self.pool = pool

    def new_file(self) -> File:
        """Return a file without pages."""
        return File(self.precache)

    def should_bypass(self, file: File, first: int, last: int, started: float) -> bool:
        """Return whether pages whose reading ahead began at `started` are not worth a put when they are evicted."""
        return self.precache.should_bypass(file, first, last, started)

    # -- counters and sizes --------------------------------------------------------------------------------------

    @property
    def hits(self) -> int:
        """Requested pages that were in the cache."""
        return self.cache.hits

    @property
    def readahead_hits(self) -> int:
        """Those of the hits that were read ahead and asked for the first time."""
        return self.cache.readahead_hits

    @property
    def misses(self) -> int:
        """Requested pages that were not in the cache, wherever they came from."""
        return self.cache.misses

    @property
    def capacity(self) -> int:
        """Bytes that the cache may hold."""
        return self.cache.capacity

    @property
    def frames(self) -> int:
        """Pages that the cache may hold."""
        return self.cache.frames

    @property
    def reserve_frames(self) -> int:
        """Frames that are kept free ahead of the readers."""
        return self.cache.reserve_frames

    @property
    def resident(self) -> int:
        """Pages in the cache."""
        return self.cache.resident

    @property
    def dirty_pages(self) -> int:
        """Pages in the cache that are not written back yet."""
        return self.cache.dirty_pages

    @property
    def evictions(self) -> int:
        """Pages that have left the cache to make room."""
        return self.cache.evictions

    @property
    def dropped(self) -> int:
        """Those of the evictions that the pool was not offered for lack of time."""
        return self.cache.dropped

    @property
    def bypassed(self) -> int:
        """Those of the evictions that the pool was not offered because of `should_bypass`."""
        return self.cache.bypassed

    @property
    def unused(self) -> int:
        """Pages that were read ahead, and gone before anybody asked for them."""
        return self.cache.unused

    @property
    def settled(self) -> bool:
        """Whether no shrink waits for dirty pages."""
        return self.cache.settled

    # -- changing ------------------------------------------------------------------------------------------------

    async def resize(self, capacity: int) -> None:
        """Resize the cache to so many bytes; what no longer fits goes into the pool."""
        await self.precache.resize(capacity)

    async def free_dropped(self) -> None:
        """Free all pages that files have dropped."""
        await self.precache.discards.finish()

    def queue_victims(self, count: int) -> int:
        """Evict up to `count` clean pages, which then wait to be put into the pool; return how many."""
        return self.cache.queue_victims(count)

    def evict_all(self) -> None:
        """Move every clean page out of the cache, into the pool where there is one."""
        while self.cache.queue_victims(64) or self.cache.victims:
            self.precache.drain(1 << 20)

    async def run(self) -> None:
        """Put evicted pages into the pool and free dropped ones, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.precache.run)
            nursery.start_soon(self.precache.discards.run)

    def check(self) -> None:
        """Raise AssertionError unless every part is consistent."""
        self.cache.check()
        self.precache.discards.check()

    def close(self) -> None:
        """Give the memory of the cache back."""
        self.cache.close()
