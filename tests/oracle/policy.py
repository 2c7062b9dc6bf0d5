"""Which page goes first: two queues and a ghost list.

A private ephemeral get removes the page, so a reference bit in the pool would never be set: what is known
about reuse travels with the page. A page is *hot* when it carries the pool bit (it came from the pool once)
or when its handle is in the ghost list (it was evicted a short while ago and came back). Hot pages enter
main, the others probation; the victim comes from probation while that holds over a tenth of the pages, else
from main. Both are FIFO. The scan of a big file so passes through a tenth of the pool.

Measured on eight block and file traces, a CLOCK cache of 1, 2.5, 5, 10 % of the footprint
over a pool of 2, 5, 10, 20 %, misses against an LRU cache over a plain FIFO pool; mean of the traces, worst
trace (mean of its sizes), worst single pair. The first line is this class; the variants are a plain
simulation with an exact ghost list, where the first line is -6.4 to -6.5 %, +0.7 to +0.9 %, +6.4 to +7.1 %:

    this                                         -6.5 %   +0.8 %   +7.0 %
    probation 5 / 7 / 15 / 20 / 30 %             -6.1 / -6.2 / -6.4 / -6.0 / -5.4 %
    ghosts for half / 1.5 / 2 / 3 times as many pages     -5.0 / -6.0 / -6.3 / -5.8 %
    a ghost hit at the get sets the pool bit     -6.1 %
    a ghost stays after it sent its page to main -6.5 %

No clock: times are handed in. No pages either: entries are numbers, the lists are arrays keyed by them, so an
entry costs 17 bytes here and linking one is six array stores.
"""

from __future__ import annotations

from array import array

from tests.oracle.ghosts import GhostList

# Heads of the circular lists; entries are numbered from FIRST on.
PROBATION, MAIN, SAME = 0, 1, 2
FIRST = 3
NOWHERE = 255

# Probation may hold one page in this many.
PROBATION_PARTS = 10


class TwoQueue:
    """The order of eviction of the ephemeral entries.

    SAME is a third FIFO for same-filled pages: they hold no slot, so evicting one frees no memory, and they
    count for no queue's share. `where` gives each entry's queue, NOWHERE for entries that are in none.
    """

    def __init__(self) -> None:
        self.ghosts = GhostList()
        self.sizes = [0, 0, 0]
        self._next = array("I", range(FIRST))
        self._prev = array("I", range(FIRST))
        self._stamp = array("d", bytes(8 * FIRST))
        self.where = array("B", [PROBATION, MAIN, SAME])

    @property
    def pages(self) -> int:
        """Entries that hold slots."""
        probation, main, _ = self.sizes
        return probation + main

    def reach(self, end: int) -> None:
        """Make room for entries up to `end`; what an earlier try had no memory for is made up."""
        for facts in (self._next, self._prev, self._stamp):
            facts.frombytes(bytes(facts.itemsize * (end - len(facts))))
        self.where.frombytes(bytes([NOWHERE]) * (end - len(self.where)))

    def insert(self, entry: int, queue: int, now: float) -> None:
        """Link an entry as the newest of a queue; `now` is seconds on any one clock."""
        following, preceding = self._next, self._prev
        after = following[queue]
        following[queue] = preceding[after] = entry
        following[entry] = after
        preceding[entry] = queue
        self._stamp[entry] = now
        self.where[entry] = queue
        self.sizes[queue] += 1

    def remove(self, entry: int) -> None:
        """Unlink an entry."""
        following, preceding, where = self._next, self._prev, self.where
        after = following[entry]
        preceding[after] = before = preceding[entry]
        following[before] = after
        self.sizes[where[entry]] -= 1
        where[entry] = NOWHERE

    def touch(self, entry: int) -> None:
        """Count a hit that left the page in the pool: it becomes the newest of main, its put time kept."""
        if self.where[entry] != SAME:
            stamp = self._stamp[entry]
            self.remove(entry)
            self.insert(entry, MAIN, stamp)

    def victim(self) -> int | None:
        """Give the entry to evict next, still linked; None when no entry holds a slot."""
        probation, main, _ = self.sizes
        if probation * PROBATION_PARTS > probation + main or not main:
            return self._prev[PROBATION] if probation else None
        return self._prev[MAIN]

    def oldest(self) -> float | None:
        """Give the earliest time that an entry with a slot was inserted with; None when no entry holds one.

        By this guests are compared, not by the next victim: while probation is over its share that is a young page,
        and main may end in pages that were of no use for hours.
        """
        tails = [self._stamp[self._prev[queue]] for queue in (PROBATION, MAIN) if self.sizes[queue]]
        return min(tails, default=None)

    def oldest_same(self) -> int | None:
        """Give the oldest same-filled entry, still linked; None when there is none."""
        return self._prev[SAME] if self.sizes[SAME] else None

    def stamp(self, entry: int) -> float:
        """Give the time that the entry was inserted with."""
        return self._stamp[entry]

    def check(self) -> None:
        """Raise AssertionError unless every entry is in the one list it says, and the sizes are right."""
        linked = 0
        for queue, size in enumerate(self.sizes):
            entry, seen = self._next[queue], 0
            while entry != queue:
                assert self.where[entry] == queue, f"entry {entry} is in two lists"
                assert self._prev[self._next[entry]] == entry, f"entry {entry} is linked one way"
                entry, seen = self._next[entry], seen + 1
                assert seen <= size, f"queue {queue} is longer than its size"
            assert seen == size, f"queue {queue} has {seen} entries, not {size}"
            linked += seen
        assert linked == len(self.where) - FIRST - self.where[FIRST:].count(NOWHERE)
        self.ghosts.check()
