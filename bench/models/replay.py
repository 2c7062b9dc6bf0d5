"""Count the misses of a trace in the objects that serve a mount: PageCache, Precache, and a pool over an EmbeddedArena.

All pages have the same incompressible content, so each takes one raw slot, sixteen a slab: the pool holds an exact
number of pages. The victim queue is drained after each request, as a mount does when reads leave it time.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

from tmem import Tmem
from tmem.arena import SLAB_SIZE, EmbeddedArena
from tmemcommon.wakeup import Wakeup
from tmemfs.cache.pagecache import PAGE_SIZE, USED, PageCache, PageTable
from tmemfs.cache.precache import Precache
from tmemfs.cache.stocking import Stocking

PAGES_A_SLAB = SLAB_SIZE // PAGE_SIZE


@dataclass(frozen=True, slots=True)
class Sizes:
    """Pages that cache and pool hold; the pool's are whole slabs."""

    cache: int
    pool: int

    @classmethod
    def of(cls, footprint: int, cache_share: float, pool_share: float) -> Sizes:
        """Return the sizes for shares of a trace's distinct pages."""
        slabs = max(1, round(footprint * pool_share / PAGES_A_SLAB))
        return cls(max(1, round(footprint * cache_share)), slabs * PAGES_A_SLAB)


class _File:
    """The file that the trace reads."""

    def __init__(self) -> None:
        self.pages = PageTable()


def replay_real(trace: Iterable[int], sizes: Sizes) -> int:
    """Return the misses of the real cache and pool."""
    arena = EmbeddedArena(sizes.pool * PAGE_SIZE)
    tmem = Tmem(arena)
    victims_wait = Wakeup()
    cache = PageCache(sizes.cache * PAGE_SIZE, limit=sizes.cache * PAGE_SIZE, on_victims=victims_wait.set)
    precache = Precache(cache, tmem.new_pool(name="precache"), Stocking(None), victims_wait)
    file = _File()
    content = random.Random(1).randbytes(PAGE_SIZE)
    frames, ref, victims = file.pages, cache.ref, cache.victims
    misses = 0
    try:
        for page in trace:
            frame = frames.get(page)
            if frame is not None:
                ref[frame] = USED
                continue
            found = precache.get(file, page)
            if found is None:
                misses += 1
                cache.announce(0)
                precache.drain(len(victims))
                cache.insert(file, page, content)
            else:
                cache.insert(file, page, found, pool_bit=True)
            precache.drain(len(victims))
        cache.check()
        tmem.check()
        assert tmem.stats().pages <= sizes.pool
    finally:
        cache.close()
        arena.close()
    return misses
