"""Slots within slabs: size classes, and the slabs of one kind.

A slab belongs to one class, so that freeing a slot needs no search and an emptied slab can serve any class.
Classes are 64 bytes apart up to 3072, which wastes 1-2 % on file pages (zbud-like pairing wastes 9-15 %), and
one for raw pages.
"""

from __future__ import annotations

from array import array
from itertools import islice

from tests.oracle.codec import COMPRESSED_MAX
from tmem.arena import PAGE_SIZE, SLAB_SIZE

_UNIT = 64
RAW_CLASS = COMPRESSED_MAX // _UNIT
SLOT_SIZES: tuple[int, ...] = (*range(_UNIT, COMPRESSED_MAX + 1, _UNIT), PAGE_SIZE)
SLOT_COUNTS = tuple(SLAB_SIZE // size for size in SLOT_SIZES)
FREE = 0xFFFFFFFF

# Slabs that compaction looks at to find an empty one; more would make it a search.
_CANDIDATES = 16


def class_of(length: int) -> int:
    """Give the smallest class whose slots hold `length` bytes, 1 to PAGE_SIZE."""
    return (length - 1) // _UNIT if length <= COMPRESSED_MAX else RAW_CLASS


class Slab:
    """One slab cut into slots: which entry is in each, and which are free."""

    __slots__ = ("base", "entries", "free", "number", "size", "size_class")

    def __init__(self, number: int, size_class: int) -> None:
        count = SLOT_COUNTS[size_class]
        self.number = number
        self.base = number * SLAB_SIZE
        self.size_class = size_class
        self.size = SLOT_SIZES[size_class]
        self.entries = array("I", [FREE]) * count
        self.free = list(range(count - 1, -1, -1))


class SlotSpace:
    """All slabs of one kind, ephemeral or persistent: never both in one slab.

    A class with any free slot has a current slab, which has one; its other slabs with free slots are its
    partial ones. A slab without entries leaves its class and is a spare. `open` has a bit for each class with
    a free slot: in a full pool one shift of it tells a put that no larger class can help.
    """

    def __init__(self, persistent: bool) -> None:
        self.persistent = persistent
        self.slabs: dict[int, Slab] = {}
        self.spares: list[int] = []
        self.ripe: set[int] = set()
        self.open = 0
        self._current: list[Slab | None] = [None] * len(SLOT_SIZES)
        self._partial: list[dict[int, Slab]] = [{} for _ in SLOT_SIZES]
        self._free = [0] * len(SLOT_SIZES)

    @property
    def held(self) -> int:
        """Slabs in use and spare."""
        return len(self.slabs) + len(self.spares)

    def take(self, size_class: int, entry: int) -> int:
        """Put the entry into a free slot of the class; give its offset in the memfd, -1 if there is none."""
        slab = self._current[size_class]
        if slab is None:
            return -1
        free = slab.free
        slot = free.pop()
        slab.entries[slot] = entry
        self._free[size_class] -= 1
        if not free:
            self._next(size_class)
        return slab.base + slot * slab.size

    def _next(self, size_class: int) -> None:
        """Make a partial slab the current one of its class."""
        partial = self._partial[size_class]
        if partial:
            self._current[size_class] = partial.popitem()[1]
        else:
            self._current[size_class] = None
            self.open ^= 1 << size_class

    def take_larger(self, size_class: int, entry: int, most: int) -> int:
        """Take a slot of a larger class, of at most `most` bytes; -1 when there is none."""
        last = RAW_CLASS if most >= PAGE_SIZE else min(most // _UNIT, RAW_CLASS) - 1
        larger = self.open >> (size_class + 1)
        if not larger:
            return -1
        smallest = size_class + (larger & -larger).bit_length()
        return self.take(smallest, entry) if smallest <= last else -1

    def take_spare(self, size_class: int, entry: int) -> int:
        """Cut a spare slab into slots of the class and take one; -1 when there is no spare."""
        if not self.spares:
            return -1
        slab = Slab(self.spares[-1], size_class)
        self.slabs[slab.number] = slab
        self.attach(slab)
        self.spares.pop()  # not before there was memory for all of that: a slab must not get lost
        return self.take(size_class, entry)

    def drop(self, offset: int) -> None:
        """Free the slot at an offset; the last one makes its slab a spare."""
        slab = self.slabs[offset // SLAB_SIZE]
        slot = offset % SLAB_SIZE // slab.size
        slab.entries[slot] = FREE
        free, size_class = slab.free, slab.size_class
        free.append(slot)
        self._free[size_class] = total = self._free[size_class] + 1
        if len(free) == 1:
            if self._current[size_class] is None:
                self._current[size_class] = slab
                self.open |= 1 << size_class
            else:
                self._partial[size_class][slab.number] = slab
        if total >= len(slab.entries):
            if len(free) == len(slab.entries):
                self.detach(slab)
                self.retire(slab)
            else:
                self.ripe.add(size_class)

    def emptiest(self) -> Slab | None:
        """Give a slab whose pages fit into the free slots of its class's other slabs, or None.

        `ripe` may name classes that have filled up since; they leave it here.
        """
        while self.ripe:
            size_class = next(iter(self.ripe))
            partial = self._partial[size_class]
            if self._free[size_class] >= SLOT_COUNTS[size_class] and partial:
                return max(islice(partial.values(), _CANDIDATES), key=lambda slab: len(slab.free))
            self.ripe.discard(size_class)
        return None

    def detach(self, slab: Slab) -> None:
        """Take a slab out of its class, so that no entry is put into it."""
        size_class, free = slab.size_class, len(slab.free)
        self._free[size_class] -= free
        if self._current[size_class] is slab:
            self._next(size_class)
        elif free:
            del self._partial[size_class][slab.number]

    def attach(self, slab: Slab) -> None:
        """Give a slab to its class, with the slots that it has free."""
        size_class = slab.size_class
        self._free[size_class] += len(slab.free)
        if slab.free and self._current[size_class] is None:
            self._current[size_class] = slab
            self.open |= 1 << size_class
        elif slab.free:
            self._partial[size_class][slab.number] = slab

    def retire(self, slab: Slab) -> None:
        """Make a detached slab without entries a spare."""
        del self.slabs[slab.number]
        self.spares.append(slab.number)

    def check(self) -> None:
        """Raise AssertionError unless the classes' lists and sums follow from the slabs."""
        assert len(set(self.spares)) == len(self.spares)
        assert not self.slabs.keys() & set(self.spares)
        free = [0] * len(SLOT_SIZES)
        listed = 0
        for number, slab in self.slabs.items():
            empty = [slot for slot, entry in enumerate(slab.entries) if entry == FREE]
            assert slab.number == number
            assert sorted(slab.free) == empty, f"slab {number}: slots"
            assert len(empty) < len(slab.entries), f"slab {number} is empty and no spare"
            free[slab.size_class] += len(empty)
            current = self._current[slab.size_class] is slab
            partial = self._partial[slab.size_class].get(number) is slab
            assert current + partial == bool(empty), f"slab {number} is in {current + partial} lists"
            listed += partial
        assert free == self._free, "free slots"
        assert listed == sum(len(partial) for partial in self._partial), "a partial slab is not ours"
        for size_class, count in enumerate(SLOT_COUNTS):
            some = free[size_class] > 0
            assert (self._current[size_class] is not None) == some == bool(self.open >> size_class & 1)
            assert free[size_class] < count or size_class in self.ripe, "a ripe class is not known"
