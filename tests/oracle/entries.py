"""The entry table: what is known of each stored page, as arrays keyed by entry number."""

from __future__ import annotations

from array import array
from collections.abc import Callable

from tests.oracle.counters import PoolCounters
from tests.oracle.policy import FIRST

# New entries come a chunk at a time, of an eighth of the table but at least this many.
_CHUNK_MIN = 512

# Bytes of one entry in the arrays here (offset, length, checksum, index, pages, free) and in TwoQueue's. All
# in all, as RSS with 148,480 pages of 2:1 data in 290 MiB and 115,000 ghosts: 186 bytes a page in objects of
# 256 pages, 196 in objects of 16, 237 in one object, whose dict had just grown.
ENTRY_BYTES = 8 + 2 + 8 + 8 + 8 + 4 + 17


class ObjectPages(dict[int, int]):
    """The pages of one object: index -> entry. Entries refer back to it, so that eviction needs no search."""

    __slots__ = ("counters", "home", "obj", "pool")

    def __init__(self, home: dict[int, ObjectPages], pool: int, obj: int, counters: PoolCounters) -> None:
        super().__init__()
        self.home = home
        self.pool = pool
        self.obj = obj
        self.counters = counters


class EntryTable:
    """Dense entry numbers with a free list, and one array per fact.

    A same-filled page has length 0 and its word in `checksum`. `pages` is None exactly for free entries.
    """

    def __init__(self) -> None:
        self.offset = array("Q", bytes(8 * FIRST))
        self.length = array("H", bytes(2 * FIRST))
        self.checksum = array("Q", bytes(8 * FIRST))
        self.index = array("q", bytes(8 * FIRST))
        self.pages: list[ObjectPages | None] = [None] * FIRST
        self.free = array("I")

    def grow(self, reach: Callable[[int], None]) -> None:
        """Add a chunk of free entries; `reach` makes other tables so long. Where memory ends, none is free."""
        start = len(self.pages)
        end = start + max(_CHUNK_MIN, start // 8)
        reach(end)
        for facts in (self.offset, self.length, self.checksum, self.index):
            facts.frombytes(bytes(facts.itemsize * (end - len(facts))))
        free = array("I", range(end - 1, start - 1, -1))
        self.pages.extend([None] * (end - start))
        try:
            self.free.extend(free)
        except BaseException:
            del self.pages[start:]
            raise

    def check(self) -> None:
        """Raise AssertionError unless free entries are free and the others are in their object."""
        free = set(self.free)
        assert len(free) == len(self.free), "an entry is free twice"
        for entry in range(FIRST, len(self.pages)):
            pages = self.pages[entry]
            assert (pages is None) == (entry in free), f"entry {entry} is lost"
            if pages is not None:
                assert pages.get(self.index[entry]) == entry, f"entry {entry} is not in its object"
                assert pages.home.get(pages.obj) is pages, f"entry {entry} is in a removed object"
