"""Room for a page: which slot it gets, and who gives way when there is none.

The rungs of the ladder, in the order of what they cost:

1. a spare slab, or a new one from the source (costs nothing but memory that is ours anyway);
2. a free slot of a slightly larger class (wastes an eighth of the slot at most);
3. compaction: a class with a slab's worth of free slots empties its emptiest slab (two system calls a page);
4. eviction in the policy's order until one of these works. A put evicts at most half of the pages, and is
   refused after that: in a pool of two slabs a page of another class could otherwise cost everything.

So free slots never exceed one slab a class, and a put evicts about as many bytes as it needs, amortised. A
source that raises OSError counts as one that has no slab to give.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from tests.oracle.counters import Refused
from tests.oracle.entries import EntryTable
from tests.oracle.policy import TwoQueue
from tests.oracle.slots import FREE, RAW_CLASS, SLOT_SIZES, Slab, SlotSpace
from tmem.arena import SLAB_SIZE, SlabSource
from tmem.stats import Reason

# Seconds for which no slab changes its kind after one was given up for that and not lent back.
_DENIED_SECONDS = 1.0


# An arena of n slabs uses about n / 2 classes: this over its capacity is how many classes become one. In one
# slab all slots are raw, so that no page has to drive out all others to get a slot.
_COARSE = 2 * RAW_CLASS * SLAB_SIZE


class Room:
    """Finds slots, and slabs to give back. `evict` removes an ephemeral entry."""

    def __init__(
        self,
        source: SlabSource,
        entries: EntryTable,
        queue: TwoQueue,
        ephemeral: SlotSpace,
        persistent: SlotSpace,
        evict: Callable[[int], None],
        clock: Callable[[], float],
    ) -> None:
        self._source = source
        self._fd = source.fd
        self._entries = entries
        self._queue = queue
        self._ephemeral = ephemeral
        self._persistent = persistent
        self._evict = evict
        self._clock = clock
        self._source_failed = False
        self._denied_until = float("-inf")

    def find(self, space: SlotSpace, size_class: int, entry: int) -> int:
        """Find a slot by the module's ladder; give its offset, or raise Refused."""
        self._source_failed = False
        offset = -1
        step = _COARSE // self._source.capacity
        if step > 1:
            size_class = min((size_class // step + 1) * step - 1, RAW_CLASS)
            offset = space.take(size_class, entry)
        if offset < 0 and not space.spares:
            self._grow(space)
        if offset < 0 and (space.spares or space.ripe or space.open >> size_class):
            offset = self._free_slot(space, size_class, entry)
        if offset < 0:
            find = self._by_sacrifice if space.persistent else self._by_eviction
            offset = find(space, size_class, entry)
        if offset < 0:
            raise Refused(Reason.SOURCE if self._source_failed else Reason.NO_SLOT)
        return offset

    def _free_slot(self, space: SlotSpace, size_class: int, entry: int) -> int:
        """Find a slot without losing a page; -1 when there is none."""
        if space.spares:
            return space.take_spare(size_class, entry)
        offset = space.take_larger(size_class, entry, self._most(space, size_class))
        if offset < 0 and space.ripe and self._compact(space):
            offset = space.take_spare(size_class, entry)
        return offset

    def _most(self, space: SlotSpace, size_class: int) -> int:
        """Give the largest slot to use for a class: an eighth larger, and more in a pool of few slabs.

        Each class can keep up to a slab's worth of slots free, which is nothing in a thousand slabs and half
        of the memory in twenty.
        """
        size = SLOT_SIZES[size_class]
        return size + size // 8 + size * 16 // (space.held or 1)

    def _by_eviction(self, space: SlotSpace, size_class: int, entry: int) -> int:
        """Evict until a slot is free, half of the pages at most; -1 when that was not enough."""
        queue, offset = self._queue, -1
        for _ in range((queue.pages + 1) // 2):
            victim = queue.victim()
            if victim is None:
                break
            self._evict(victim)
            if (offset := space.take(size_class, entry)) >= 0:
                break
            if space.spares or space.ripe or space.open >> size_class:
                offset = self._free_slot(space, size_class, entry)
            if offset >= 0:
                break
        return offset

    def _by_sacrifice(self, space: SlotSpace, size_class: int, entry: int) -> int:
        """Free an ephemeral slab for a persistent page, or waste part of a larger slot; -1 for neither."""
        if self._clock() >= self._denied_until and self._free_ephemeral_slab():
            if self._grow(space):
                return space.take_spare(size_class, entry)
            # A cap, or another guest was faster. Take a slab back for what it was.
            self._grow(self._ephemeral)
        return space.take_larger(size_class, entry, SLOT_SIZES[RAW_CLASS])

    def _grow(self, space: SlotSpace) -> bool:
        """Add a slab of the source to the spares, if need be against a spare of the other kind."""
        other = self._ephemeral if space.persistent else self._persistent
        try:
            number = self._source.acquire(space.persistent)
            if number is None and other.spares and self._clock() >= self._denied_until:
                self._source.release(other.spares[-1], other.persistent)
                other.spares.pop()
                number = self._source.acquire(space.persistent)
                if number is None:
                    self._denied_until = self._clock() + _DENIED_SECONDS
        except OSError:
            self._source_failed = True
            return False
        if number is not None:
            space.spares.append(number)
        return number is not None

    def _compact(self, space: SlotSpace) -> bool:
        """Move the pages of one slab to others of its class; True when a spare came of it."""
        slab = space.emptiest()
        if slab is None:
            return False
        space.detach(slab)
        try:
            self._move_pages(space, slab)
        except OSError:
            return False
        finally:
            if len(slab.free) == len(slab.entries):
                space.retire(slab)
            else:
                space.attach(slab)
        return bool(space.spares)

    def _move_pages(self, space: SlotSpace, slab: Slab) -> None:
        """Move every page of a detached slab; OSError leaves the page at hand and the rest in place.

        Short of memory, the kernel may read or write a part only.
        """
        offsets, lengths = self._entries.offset, self._entries.length
        for slot, entry in enumerate(slab.entries):
            if entry == FREE:
                continue
            stored = os.pread(self._fd, lengths[entry], offsets[entry])
            offset = space.take(slab.size_class, entry)
            try:
                if not len(stored) == lengths[entry] == os.pwrite(self._fd, stored, offset):
                    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
            except OSError:
                space.drop(offset)
                raise
            offsets[entry] = offset
            slab.entries[slot] = FREE
            slab.free.append(slot)

    def give_up(self, slabs: int, persistent: bool | None = None) -> int:
        """Release up to that many slabs to the source: spares, then compacted ones, then (ephemeral) by eviction.

        Of one kind, or of both. Slabs with persistent pages are never among them.
        """
        kinds = [space for space in (self._ephemeral, self._persistent) if persistent in (None, space.persistent)]
        released = 0
        while released < slabs and (space := self._find_spare(kinds)) is not None:
            try:
                self._source.release(space.spares[-1], space.persistent)
            except OSError:
                break
            space.spares.pop()
            released += 1
        return released

    def _find_spare(self, kinds: list[SlotSpace]) -> SlotSpace | None:
        """Get a spare of one of the kinds; None when only slabs with persistent pages are left."""
        for space in kinds:
            if space.spares or self._compact(space):
                return space
        return self._ephemeral if self._ephemeral in kinds and self._free_ephemeral_slab() else None

    def _free_ephemeral_slab(self) -> bool:
        """Evict and compact until there is an ephemeral spare; False when there is no ephemeral slab."""
        space, queue = self._ephemeral, self._queue
        while not (space.spares or self._compact(space)):
            victim = queue.victim()
            if victim is None:
                return False
            self._evict(victim)
        return True
