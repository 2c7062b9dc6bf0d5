"""The replacement policy in Python: the oracle of backend/engine/policy.c, written to be read.

    page:   in small or main; uses (0..3); stamp
    ghost:  tag of the page's hash; stamp; turn of its eviction
    tick = misses / (C/256); turn = evictions from small / (C/256)

It counts exactly what `tmem_replay` counts. Ticks and turns are unbounded here and have 16 bits there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

MAX_USES = 3
TICKS = 256
WAYS = 8
CORRELATED = 0.3
SHARES = (0.03, 0.1, 0.3, 0.9)
SAMPLED_PAGES = 512
MAX_SHIFT = 6

_WORD = (1 << 64) - 1


def hash_of(page: int) -> int:
    """Return the hash that `tmem_replay` gives a page."""
    mixed = (page + 1) * 0x9E3779B97F4A7C15 & _WORD
    mixed = (mixed ^ mixed >> 32) * 0xD6E8FEB86659FD93 & _WORD
    return mixed ^ mixed >> 32


@dataclass(slots=True)
class Page:
    """What is known of a resident page."""

    hash: int
    uses: int
    stamp: int


@dataclass(slots=True)
class Ghost:
    """What is known of a page that left from small."""

    tag: int
    stamp: int
    turn: int


class Ghosts:
    """The last 2 C pages that left from small, as far as their bucket of eight has room."""

    def __init__(self, capacity: int, tick_pages: int) -> None:
        buckets = 2 * capacity // WAYS + 1
        if buckets > 1:
            buckets += buckets // 8
        self._buckets: list[list[Ghost | None]] = [[] for _ in range(buckets)]
        self._tick_pages = tick_pages
        self._turns_kept = 2 * (capacity // tick_pages)
        self._evictions = self._turn = 0

    def _bucket(self, hashed: int) -> tuple[int, list[Ghost | None]]:
        tag = hashed >> 32 or 1
        return tag, self._buckets[tag * len(self._buckets) >> 32]

    def add(self, hashed: int, stamp: int) -> None:
        """Note an eviction; the oldest of the bucket falls out."""
        self._evictions += 1
        if self._evictions >= self._tick_pages:
            self._evictions = 0
            self._turn += 1
        tag, bucket = self._bucket(hashed)
        bucket.insert(0, Ghost(tag, stamp, self._turn))
        del bucket[WAYS:]

    def take(self, hashed: int) -> Ghost | None:
        """Return the ghost of a page and forget it; None if there is none."""
        tag, bucket = self._bucket(hashed)
        for way, ghost in enumerate(bucket):
            if ghost is not None and ghost.tag == tag:
                bucket[way] = None  # its place is used up
                return ghost if self._turn - ghost.turn <= self._turns_kept else None
        return None


class Model:
    """A cache of `capacity` pages. `share` is the part of it for new pages; None: chosen by miniatures."""

    def __init__(self, capacity: int, share: float | None) -> None:
        self.capacity = capacity
        self.share = SHARES[1] if share is None else share
        self.small: OrderedDict[int, Page] = OrderedDict()  # by hash, oldest first
        self.main: OrderedDict[int, Page] = OrderedDict()
        self.misses = self.tick = self.misses_in_tick = 0
        self.tick_pages = max(1, capacity // TICKS)
        self.ticks_in_capacity = capacity // self.tick_pages
        self.ghosts = Ghosts(capacity, self.tick_pages)
        self.chooser = Chooser(capacity) if share is None else None

    @property
    def small_pages(self) -> int:
        """Return s."""
        return max(1, int(self.share * self.capacity))

    def access(self, hashed: int) -> None:
        """Use a page; it becomes resident."""
        resident = self.small.get(hashed) or self.main.get(hashed)
        if resident is None:
            self.misses += 1
            while len(self.small) + len(self.main) >= self.capacity:
                self.evict()
            self.insert(hashed)
            return
        self.choose(hashed)
        age = self.tick - resident.stamp
        new = hashed in self.small and resident.uses == 0
        if new and age < CORRELATED * self.share * self.ticks_in_capacity:
            return  # soon after the insertion
        resident.uses = min(MAX_USES, resident.uses + 1)
        resident.stamp = self.tick

    def choose(self, hashed: int) -> None:
        """Let the miniatures see an access."""
        if self.chooser is not None:
            self.share = self.chooser.access(hashed)

    def insert(self, hashed: int) -> None:
        """Insert a page that misses; there is room."""
        self.choose(hashed)
        self.misses_in_tick += 1
        if self.misses_in_tick >= self.tick_pages:
            self.misses_in_tick = 0
            self.tick += 1
        ghost = self.ghosts.take(hashed)
        if ghost is not None:
            to_main = self.passes(ghost.stamp)
        else:
            to_main = len(self.small) + len(self.main) + 1 + self.small_pages <= self.capacity
        (self.main if to_main else self.small)[hashed] = Page(hashed, 0, self.tick)

    def passes(self, stamp: int) -> bool:
        """Return whether a ghost was used since the coldest page of main was."""
        if len(self.main) + self.small_pages < self.capacity:
            return True
        self.settle()
        return not self.main or stamp > next(iter(self.main.values())).stamp

    def settle(self) -> None:
        """Give main's oldest pages another round for each of their uses."""
        while self.main and (oldest := next(iter(self.main.values()))).uses:
            oldest.uses -= 1
            self.main.move_to_end(oldest.hash)

    def evict(self) -> None:
        """Remove a page."""
        while self.small and (len(self.small) >= self.small_pages or not self.main):
            hashed, victim = self.small.popitem(last=False)
            if not victim.uses:
                self.ghosts.add(hashed, victim.stamp)
                return
            victim.uses = 0
            self.main[hashed] = victim
        self.settle()
        self.main.popitem(last=False)


class Chooser:
    """Miniatures with fixed shares over a sample of the pages: the one with the fewest misses lately is right."""

    def __init__(self, capacity: int) -> None:
        self.shift = 0
        if capacity > SAMPLED_PAGES * 5 // 2:
            while self.shift < MAX_SHIFT and capacity >> (self.shift + 1) >= SAMPLED_PAGES:
                self.shift += 1
        self.miniatures = [Model(capacity >> self.shift, share) for share in SHARES]
        self.scores = [0.0 for _ in SHARES]
        self.misses = [0 for _ in SHARES]
        self.accesses = 0
        self.chosen = 1

    def access(self, hashed: int) -> float:
        """Simulate an access if the page is sampled; return the share."""
        if hashed >> 8 & ((1 << self.shift) - 1):
            return SHARES[self.chosen]
        for miniature in self.miniatures:
            miniature.access(hashed)
        self.accesses += 1
        if self.accesses == self.miniatures[0].capacity:
            self.accesses = 0
            for at, miniature in enumerate(self.miniatures):
                self.scores[at] = 0.7 * self.scores[at] + (miniature.misses - self.misses[at])
                self.misses[at] = miniature.misses
            best = min(self.scores)
            if best < 0.98 * self.scores[self.chosen]:
                self.chosen = self.scores.index(best)
        return SHARES[self.chosen]


def replay(pages: Iterable[int], capacity: int, share: float | None) -> int:
    """Return the misses of a trace."""
    cache = Model(capacity, share)
    for page in pages:
        cache.access(hash_of(page))
    return cache.misses
