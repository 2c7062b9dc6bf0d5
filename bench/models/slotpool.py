"""Simulate a guest page by page: a trace, an LRU cache, and a pool in the real pool's order.

The pool uses tmem.policy and its ghosts, without bytes: every page takes one of the sixteen slots of a slab. What an
LRU cache misses and evicts does not depend on the pool behind it. So it is computed once for a trace and a cache size
(`Stream`), and only the misses are replayed.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from tmem.arena import PAGE_SIZE, SLAB_SIZE
from tmem.ghosts import tag_of
from tmem.policy import FIRST, MAIN, NOWHERE, PROBATION, TwoQueue

PAGES_A_SLAB = SLAB_SIZE // PAGE_SIZE


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


class SlotPool:
    """An exclusive pool of `slots` slots in the order of tmem.policy, for pages 0 to `footprint`."""

    def __init__(self, footprint: int, slots: int, number: int = 0) -> None:
        self.slots = slots
        self.queue = TwoQueue()
        self.queue.reach(FIRST + footprint)
        self.puts = self.hits = self.misses = self.ghost_hits = 0
        self._tags = array("I", (tag_of(0, number, page) for page in range(footprint)))
        self._pool_bit = bytearray(footprint)

    def get(self, page: int) -> None:
        """Remove a page that the cache missed, or count a miss."""
        queue = self.queue
        if queue.where[page + FIRST] != NOWHERE:
            queue.remove(page + FIRST)
            self._pool_bit[page] = 1
            self.hits += 1
            return
        self._pool_bit[page] = 0
        self.misses += 1
        if queue.ghosts.holds(self._tags[page], queue.pages):
            self.ghost_hits += 1

    def put(self, page: int, now: float) -> None:
        """Insert a page that the cache evicted."""
        queue, tag = self.queue, self._tags[page]
        self.puts += 1
        if not self.slots:
            return
        hot = self._pool_bit[page]
        if not hot and queue.ghosts.holds(tag, queue.pages):
            queue.ghosts.discard(tag)
            hot = 1
        if queue.pages >= self.slots:
            self.evict()
        queue.insert(page + FIRST, MAIN if hot else PROBATION, now)

    def evict(self) -> None:
        """Drop the next victim and keep its ghost."""
        queue = self.queue
        victim = queue.victim()
        assert victim is not None
        queue.ghosts.add(self._tags[victim - FIRST], queue.pages)
        queue.remove(victim)

    def resize(self, slots: int) -> None:
        """Change the number of slots; evict the pages that no longer fit."""
        self.slots = slots
        while self.queue.pages > slots:
            self.evict()

    def age(self, now: float) -> float | None:
        """Return the seconds since the put of the oldest page."""
        oldest = self.queue.oldest()
        return None if oldest is None else max(0.0, now - oldest)
