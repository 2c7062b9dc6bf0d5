"""Move the size of a guest's cache as its balloon decides."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from tmemfs.backing import Backing
from tmemfs.cache.balloon import Balloon, BalloonRange, Signals
from tmemfs.cache.pagecache import PAGE_SHIFT, PageCache
from tmemfs.cache.precache import Precache
from tmemfs.io.reader import Reader


class Ballooning:
    """The task behind `--balloon`; `resize` is what a person's resize calls, too."""

    def __init__(
        self,
        allowed: BalloonRange,
        cache: PageCache,
        reader: Reader,
        precache: Precache,
        backing: Backing,
        resize: Callable[[int], Awaitable[None]],
    ) -> None:
        self._cache = cache
        self._reader = reader
        self._precache = precache
        self._backing = backing
        self._resize = resize
        self.balloon = Balloon(allowed)

    def _signals(self) -> Signals:
        cache, reader, pool = self._cache, self._reader, self._precache.pool
        # Without a pool there is nothing that remembers a page: every miss counts.
        returns = reader.misses
        if pool is not None:
            stats = pool.stats
            returns = stats.succ_gets + stats.ghost_hits
        return Signals(
            asked=reader.hits + reader.misses + (self._backing.write_bytes >> PAGE_SHIFT),
            returns=returns,
            full=cache.resident + 2 * cache.reserve_frames >= cache.frames,
        )

    async def run(self) -> None:
        """Look at the signals again and again, and resize."""
        while True:
            await trio.sleep(self.balloon.allowed.tick)
            capacity = self._cache.capacity
            wanted = self.balloon.decide(trio.current_time(), self._signals(), capacity)
            if wanted != capacity:
                await self._resize(wanted)
