"""The page map of the swap-like file: the location of each page, and the order in which pages of the pool were used.

A page has exactly one location, in 4 bytes: a hole (it reads as zeros), the pool, a slot of the overflow file, or lost
(it reads as an error).

The order of use is kept as generations, one byte a page. An access stamps the page with the current generation. A new
generation begins after as many accesses as a sixteenth of the pool's pages. To find the coldest pages we search a
bytearray for one byte value, at memory speed, from where the last search stopped: no page ever gets an old generation
again. A linked list would cost 8 bytes a page and be exact, which is not needed here.
"""

from __future__ import annotations

from array import array

HOLE = 0
LOST = 0xFFFFFFFE
POOL = 0xFFFFFFFF
FIRST_SLOT = 1

_NONE = 0  # the generation of pages that are not in the pool
_MAX_GENERATION = 255
_KEPT_GENERATIONS = 127  # that stay apart when the numbers run out; all older ones are merged
_GENERATION_SHARE = 16  # a generation ends after accesses to 1/16 of the pool's pages
_MIN_GENERATION_ACCESSES = 64


class PageMap:
    """The location of every page, and the generation of those in the pool."""

    def __init__(self, pages: int) -> None:
        self._pages = pages
        self.clear()

    def clear(self) -> None:
        """Make every page a hole."""
        self._locations = array("I", bytes(4 * self._pages))
        self._generations = bytearray(self._pages)
        self._generation = 1
        self._oldest = (1, 0)  # (generation, page): no page of the pool comes before it in the order of use
        self._accesses = 0  # in this generation
        self.pool_pages = 0
        self.overflow_pages = 0
        self.lost_pages = 0

    def __len__(self) -> int:
        """Return the number of pages."""
        return self._pages

    def location(self, page: int) -> int:
        """Return HOLE, POOL, LOST or a slot."""
        return self._locations[page]

    def set_location(self, page: int, location: int) -> None:
        """Record a page's new location; in the pool, this counts as an access."""
        self._count(self._locations[page], -1)
        self._count(location, 1)
        self._locations[page] = location
        if location == POOL:
            self.record_access(page)
        else:
            self._generations[page] = _NONE

    def _count(self, location: int, change: int) -> None:
        if location == POOL:
            self.pool_pages += change
        elif location == LOST:
            self.lost_pages += change
        elif location != HOLE:
            self.overflow_pages += change

    def record_access(self, page: int) -> None:
        """Stamp a page of the pool with the current generation."""
        self._generations[page] = self._generation
        self._accesses += 1
        if self._accesses > max(_MIN_GENERATION_ACCESSES, self.pool_pages // _GENERATION_SHARE):
            self._accesses = 0
            self._generation += 1
            if self._generation > _MAX_GENERATION:
                self._renumber()

    def _renumber(self) -> None:
        """Lower all generations, so that there are numbers for new ones; merge the oldest into generation 1."""
        drop = _MAX_GENERATION - _KEPT_GENERATIONS
        table = bytes([_NONE, *(max(1, generation - drop) for generation in range(1, _MAX_GENERATION + 1))])
        self._generations = self._generations.translate(table)
        self._generation = _KEPT_GENERATIONS + 1
        self._oldest = (1, 0)

    def coldest(self, count: int) -> list[int]:
        """Return up to `count` pages of the pool, the least recently used first."""
        found: list[int] = []
        oldest, start = self._oldest
        for generation in range(oldest, self._generation + 1):
            page = self._generations.find(generation, start)
            start = 0
            while page >= 0:
                if not found:
                    self._oldest = (generation, page if generation < self._generation else 0)
                found.append(page)
                if len(found) == count:
                    return found
                page = self._generations.find(generation, page + 1)
        return found

    def check(self) -> None:
        """Raise AssertionError unless counts and generations match the locations and no slot is used twice."""
        slots = [location for location in self._locations if location not in (HOLE, POOL, LOST)]
        assert len(set(slots)) == len(slots) == self.overflow_pages, "a slot belongs to two pages"
        assert self._locations.count(POOL) == self.pool_pages
        assert self._locations.count(LOST) == self.lost_pages
        oldest, start = self._oldest
        for page, location in enumerate(self._locations):
            generation = self._generations[page]
            assert not 0 < generation < oldest, f"page {page} is older than the oldest"
            assert generation != oldest or page >= start, f"page {page} would not be found by a search"
            assert (generation != _NONE) == (location == POOL), f"page {page}: generation {generation} does not fit"
            assert generation <= self._generation
