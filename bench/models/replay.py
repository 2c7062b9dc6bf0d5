"""Count the misses of a trace under the policy of the engine: alone, and in the cache and pool that serve a mount.

`replay_policy` runs the engine's policy over page numbers, with all memory as one. `replay_engine` reads the pages of a
file through an engine. All pages have the same incompressible content and are stored as they are, sixteen a slab: the
pool holds an exact number of pages. Frames are freed after each miss, as the engine's thread does when reads leave it
time.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from tmem import Tmem
from tmem.arena import PAGE_SHIFT, PAGE_SIZE, SLAB_SIZE, EmbeddedArena
from tmem.engine import ffi, lib
from tmem.pool import CacheFrames
from tmemfs.cache.memory import Memory

PAGES_A_SLAB = SLAB_SIZE // PAGE_SIZE
CHOSEN = -1.0  # the share of new pages: chosen by the miniatures

# The engine keeps one frame of 32 free, at least 1 and at most 512.
_FRAMES_A_FREE_ONE = 32
_MAX_FREE = 512


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

    @property
    def pages(self) -> int:
        """Pages of both."""
        return self.cache + self.pool


def replay_policy(trace: Sequence[int], capacity: int, share: float = CHOSEN) -> int:
    """Return the misses of the policy alone. `share` is the part of the capacity that is for new pages."""
    pages = trace if isinstance(trace, array) and trace.itemsize == 8 else array("q", trace)
    buffer = ffi.cast("uint64_t *", ffi.from_buffer(pages))
    misses: int = lib.tmem_replay(buffer, len(pages), capacity, share)
    if misses < 0:
        raise MemoryError
    return misses


def replay_engine(trace: Sequence[int], sizes: Sizes) -> int:
    """Return the misses of the real cache and pool."""
    arena = EmbeddedArena(sizes.pool * PAGE_SIZE)
    free = min(_MAX_FREE, max(1, sizes.cache // (_FRAMES_A_FREE_ONE - 1)))
    frames = sizes.cache + free
    memory = Memory(tmem := Tmem(arena, compress=False, cache=CacheFrames(frames, frames, thread=False)))
    content = random.Random(1).randbytes(PAGE_SIZE)
    misses = 0
    try:
        while (slab := arena.acquire(False)) is not None:
            lib.tmem_grant(tmem.engine, slab, False)
        lib.tmem_deny(tmem.engine)
        file = memory.new_file()
        file.size = (max(trace, default=0) + 1) << PAGE_SHIFT
        for page in trace:
            if file.hit(page << PAGE_SHIFT, PAGE_SIZE, sequential=False) is not None:
                continue
            if file.read(page << PAGE_SHIFT, PAGE_SIZE, sequential=False) is None:
                misses += 1
                file.begin_fill(page, page, ahead=False, unread=page + 1).finish(content, bypass=False)
            lib.tmem_drain(tmem.engine, frames)
        memory.check()
        counts = tmem.counts()
        assert counts.reserve_frames == free
        assert counts.resident_pages <= sizes.pages
    finally:
        memory.close()
        arena.close()
    return misses
