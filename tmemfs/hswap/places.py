"""Where each page of the swap-like file is, and which pages of the pool were used longest ago.

A page is in exactly one place: nowhere (it reads as zeros), in the pool, in a slot of the overflow file, or lost (it
reads as an error). That is 4 bytes a page. Age is a generation, one byte a page: every touch stamps the page with the
present generation, which moves on when a sixteenth of the pool's pages was touched. Finding the oldest ones is then a
search for one byte value in a bytearray, at memory speed, that begins where the last one found some: no page ever gets
an old generation again. A linked list would cost 8 bytes a page and be exact, which nothing here needs.
"""

from __future__ import annotations

from array import array

NOWHERE = 0
LOST = 0xFFFFFFFE
POOL = 0xFFFFFFFF
FIRST_SLOT = 1
MAX_PAGES = LOST - FIRST_SLOT

_ABSENT = 0  # the generation of pages that are not in the pool
_LAST_GENERATION = 255
_KEPT_GENERATIONS = 127  # when the numbers run out, older ones become one
_PARTS = 16
_STEP_MIN = 64


class Places:
    """The place and the age of every page."""

    def __init__(self, pages: int) -> None:
        self._pages = pages
        self.clear()

    def clear(self) -> None:
        """Have every page nowhere."""
        self._where = array("I", bytes(4 * self._pages))
        self._age = bytearray(self._pages)
        self._generation = 1
        self._oldest = (1, 0)  # no page has a lower generation, nor this one and a lower number
        self._touches = 0
        self.pool_pages = 0
        self.overflow_pages = 0
        self.lost_pages = 0

    def __len__(self) -> int:
        """Give the number of pages."""
        return self._pages

    def where(self, page: int) -> int:
        """Give NOWHERE, POOL, LOST or a slot."""
        return self._where[page]

    def move(self, page: int, place: int) -> None:
        """Record that the page is now there; one that comes into the pool is the youngest."""
        self._count(self._where[page], -1)
        self._count(place, 1)
        self._where[page] = place
        if place == POOL:
            self.touch(page)
        else:
            self._age[page] = _ABSENT

    def _count(self, place: int, change: int) -> None:
        if place == POOL:
            self.pool_pages += change
        elif place == LOST:
            self.lost_pages += change
        elif place != NOWHERE:
            self.overflow_pages += change

    def touch(self, page: int) -> None:
        """Record a use of a page of the pool."""
        self._age[page] = self._generation
        self._touches += 1
        if self._touches > max(_STEP_MIN, self.pool_pages // _PARTS):
            self._touches = 0
            self._generation += 1
            if self._generation > _LAST_GENERATION:
                self._renumber()

    def _renumber(self) -> None:
        """Give the generations low numbers again."""
        drop = _LAST_GENERATION - _KEPT_GENERATIONS
        table = bytes([_ABSENT, *(max(1, age - drop) for age in range(1, _LAST_GENERATION + 1))])
        self._age = self._age.translate(table)
        self._generation = _KEPT_GENERATIONS + 1
        self._oldest = (1, 0)

    def coldest(self, count: int) -> list[int]:
        """Find up to that many pages of the pool, those used longest ago first."""
        found: list[int] = []
        oldest, start = self._oldest
        for age in range(oldest, self._generation + 1):
            page = self._age.find(age, start)
            start = 0
            while page >= 0:
                if not found:
                    self._oldest = (age, page if age < self._generation else 0)
                found.append(page)
                if len(found) == count:
                    return found
                page = self._age.find(age, page + 1)
        return found

    def check(self) -> None:
        """Raise AssertionError unless the counts and ages follow from the places, and no slot is used twice."""
        places = list(self._where)
        slots = [place for place in places if place not in (NOWHERE, POOL, LOST)]
        assert len(set(slots)) == len(slots) == self.overflow_pages, "a slot belongs to two pages"
        assert places.count(POOL) == self.pool_pages
        assert places.count(LOST) == self.lost_pages
        oldest, start = self._oldest
        for page, place in enumerate(places):
            assert not 0 < self._age[page] < oldest, f"page {page} is older than the oldest"
            assert self._age[page] != oldest or page >= start, f"page {page} is not found any more"
            assert (self._age[page] != _ABSENT) == (place == POOL), f"page {page} is in the pool and has no age"
            assert self._age[page] <= self._generation
