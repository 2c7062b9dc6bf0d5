"""Simulate a guest page by page: a trace, an LRU cache, and the real pool.

The pool is the engine's. Its pages are not compressed, so each takes one of the sixteen slots of a slab. What an LRU
cache misses and evicts does not depend on the pool behind it. So it is computed once for a trace and a cache size
(`Stream`), and only the misses are replayed.
"""

from __future__ import annotations

import os
import random
from array import array
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from tmem import Tmem
from tmem.arena import PAGE_SIZE, SLAB_SIZE, SlabSource, make_arena

PAGES_A_SLAB = SLAB_SIZE // PAGE_SIZE
_PAGE = random.Random(1).randbytes(PAGE_SIZE)


@dataclass(frozen=True, slots=True)
class Stream:
    """The misses of a guest's cache, and for each the page that it evicted, -1 for none.

    Pages are numbered from 0 on. `at` is the number of the request that missed, of `requests`.
    """

    name: str
    footprint: int
    requests: int
    cache: int
    misses: array[int]
    evicted: array[int]
    at: array[int]


def stream(name: str, trace: Iterable[int], cache_share: float) -> Stream:
    """Return what an LRU cache misses and evicts; its size is a share of the trace's distinct pages."""
    numbers: dict[int, int] = {}
    pages = array("i", (numbers.setdefault(page, len(numbers)) for page in trace))
    size = max(1, round(len(numbers) * cache_share))
    cache: OrderedDict[int, None] = OrderedDict()
    misses, evicted, at = array("i"), array("i"), array("i")
    for request, page in enumerate(pages):
        if page in cache:
            cache.move_to_end(page)
            continue
        cache[page] = None
        misses.append(page)
        at.append(request)
        evicted.append(cache.popitem(last=False)[0] if len(cache) > size else -1)
    return Stream(name, len(numbers), len(pages), size, misses, evicted, at)


class _Slabs(SlabSource):
    """Slabs of a memfd, as many as the pool may have now."""

    def __init__(self, most: int, fd: int) -> None:
        self.allowed = 0
        self.most = most
        self._fd = fd
        self._free = list(range(most))

    @property
    def fd(self) -> int:
        return self._fd

    @property
    def capacity(self) -> int:
        return max(1, self.allowed) * SLAB_SIZE

    @property
    def ceiling(self) -> int:
        return self.capacity

    @property
    def private(self) -> bool:
        return True

    @property
    def out(self) -> int:
        """The slabs that the pool has."""
        return self.most - len(self._free)

    def acquire(self, persistent: bool) -> int | None:
        return self._free.pop() if self.out < self.allowed else None

    def release(self, slab: int, persistent: bool) -> None:
        self._free.append(slab)


class SlotPool:
    """An exclusive pool of the engine, of `slots` slots in whole slabs, for pages 0 to `footprint`."""

    def __init__(self, footprint: int, slots: int, number: int = 0) -> None:
        most = -(-footprint // PAGES_A_SLAB) + 1
        fd = make_arena(most)
        self._source = _Slabs(most, fd)
        self._now = 0.0
        self._tmem = Tmem(self._source, lambda: self._now, compress=False)
        os.close(fd)  # the engine has its own
        self._pool = self._tmem.new_pool()
        self._number = number
        self.slots = 0
        self.puts = self.hits = self.misses = 0
        self._pool_bit = bytearray(footprint)
        self.resize(slots)

    @property
    def pages(self) -> int:
        """The pages in the pool."""
        return int(self._pool.stats.pages)

    @property
    def ghost_hits(self) -> int:
        """Misses on pages that the pool evicted a short while ago."""
        return int(self._pool.stats.ghost_hits)

    @property
    def full(self) -> bool:
        """Whether the next page needs another slab."""
        return self.pages >= self.slots

    def get(self, page: int) -> None:
        """Remove a page that the cache missed, or count a miss."""
        found = self._pool.get(self._number, page) is not None
        self._pool_bit[page] = found
        self.hits += found
        self.misses += not found

    def put(self, page: int, now: float) -> None:
        """Insert a page that the cache evicted."""
        self._now = now
        self.puts += 1
        if self.slots:
            self._pool.put(self._number, page, _PAGE, bool(self._pool_bit[page]))

    def resize(self, slots: int) -> None:
        """Change the number of slots; evict the pages that no longer fit."""
        self.slots = slots
        self._source.allowed = min(self._source.most, slots // PAGES_A_SLAB)
        over = self._source.out - self._source.allowed
        if over > 0:
            self._tmem.give_up(over)
        self._tmem.follow_capacity()

    def age(self, now: float) -> float | None:
        """Return the seconds since the last use of the coldest page."""
        self._now = now
        return self._tmem.oldest_age()

    def check(self) -> None:
        """Check the engine, and that it has no more slabs than it may have."""
        self._tmem.check()
        assert self._source.out <= self._source.allowed
