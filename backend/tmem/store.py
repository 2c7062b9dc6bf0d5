"""The store: pages to slots, and who gives way when there is none.

The one owner of slots and entries. Every path that removes a page ends in `remove`, every path that finds room is a
rung of the ladder in `_make_room`, and the order of the rungs is the order of what they cost:

1. a spare slab, or a new one from the source (costs nothing but memory that is ours anyway);
2. a free slot of a slightly larger class (wastes an eighth of the slot at most);
3. compaction: a class that has a slab's worth of free slots empties its emptiest slab (30 moves of 3 us);
4. eviction in the policy's order until one of these works. A put evicts at most half of the pages, and is refused
   after that: in a pool of one slab a page of another class would otherwise cost everything.

So free slots never exceed one slab a class, and a put evicts about as many bytes as it needs, amortised.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from tmem.arena import SLAB_SIZE, SlabSource
from tmem.codec import COMPRESSED_MAX, CodecError, checksum, decode, encode, fill
from tmem.entries import EntryTable, ObjectPages
from tmem.ghosts import tag_of
from tmem.policy import MAIN, NOWHERE, PROBATION, SAME, TwoQueue
from tmem.slots import FREE, RAW_CLASS, SLOT_SIZES, Slab, SlotSpace, class_of
from tmem.stats import Reason, Refused

# What a same-filled page is charged, and the part of the capacity that all of them may be charged.
SAME_CHARGE = 64
SAME_PARTS = 64

# Seconds for which persistent puts evict nothing after a slab given up for one was not lent back.
_DENIED_SECONDS = 1.0


class Store:
    """Pages in slots of one slab source. A single thread at a time."""

    def __init__(self, slabs: SlabSource, clock: Callable[[], float]) -> None:
        self.source = slabs
        self.entries = EntryTable()
        self.queue = TwoQueue()
        self.ephemeral = SlotSpace(persistent=False)
        self.persistent = SlotSpace(persistent=True)
        self.used_bytes = self.raw_pages = self.same_pages = self.pages = 0
        self.evictions = self.revoked_slabs = 0
        self._clock = clock
        self._fd = slabs.fd
        self._source_failed = False
        self._denied_until = float("-inf")

    def put(self, page: bytes, persistent: bool, hot: bool) -> int:
        """Store a page and give its entry, which `link` must name next; Refused, with nothing kept."""
        try:
            stored, digest = encode(page)
        except CodecError as error:
            raise Refused(Reason.CODEC) from error
        entries = self.entries
        if not entries.free:
            self.queue.grow(entries.grow())
        entry = entries.free.pop()
        try:
            if stored:
                entries.offset[entry] = self._place(entry, stored, persistent)
            else:
                self._make_room_for_same(persistent)
        except BaseException:
            entries.free.append(entry)
            raise
        entries.length[entry] = length = len(stored)
        entries.checksum[entry] = digest
        self.pages += 1
        self.used_bytes += length
        if length > COMPRESSED_MAX:
            self.raw_pages += 1
        elif not length:
            self.same_pages += 1
        if not persistent:
            queue = (MAIN if hot else PROBATION) if length else SAME
            self.queue.insert(entry, queue, self._clock())
        return entry

    def link(self, entry: int, pages: ObjectPages, index: int) -> None:
        """Name the entry: from here on it can be found and evicted."""
        self.entries.pages[entry] = pages
        self.entries.index[entry] = index
        pages[index] = entry
        pages.counters.pages += 1

    def read(self, entry: int) -> bytes | None:
        """Give the entry's page; None when its stored bytes are not those that were put."""
        entries = self.entries
        length, digest = entries.length[entry], entries.checksum[entry]
        if not length:
            return fill(digest)
        try:
            stored = os.pread(self._fd, length, entries.offset[entry])
            return decode(stored) if checksum(stored) == digest else None
        except (OSError, CodecError):
            return None

    def remove(self, entry: int) -> None:
        """Remove an entry from its object, its queue and its slot."""
        entries, queue = self.entries, self.queue
        pages = entries.pages[entry]
        assert pages is not None
        del pages[entries.index[entry]]
        if not pages:
            del pages.home[pages.obj]
        pages.counters.pages -= 1
        entries.pages[entry] = None
        ephemeral = queue.queue_of(entry) != NOWHERE
        if ephemeral:
            queue.remove(entry)
        length = entries.length[entry]
        if length:
            (self.ephemeral if ephemeral else self.persistent).drop(entries.offset[entry])
        self.pages -= 1
        self.used_bytes -= length
        if length > COMPRESSED_MAX:
            self.raw_pages -= 1
        elif not length:
            self.same_pages -= 1
        entries.free.append(entry)

    def evict(self, entry: int) -> None:
        """Remove an ephemeral entry to make room, and remember its ghost."""
        pages = self.entries.pages[entry]
        assert pages is not None
        pages.counters.evictions += 1
        self.evictions += 1
        if self.entries.length[entry]:
            tag = tag_of(pages.pool, pages.obj, self.entries.index[entry])
            self.queue.ghosts.add(tag, self.queue.pages)
        self.remove(entry)

    def _place(self, entry: int, stored: bytes, persistent: bool) -> int:
        """Write stored bytes into a slot and give its offset; Refused when there is none or the write fails."""
        space = self.persistent if persistent else self.ephemeral
        size_class = class_of(len(stored))
        offset = space.take(size_class, entry)
        if offset < 0:
            offset = self._make_room(space, size_class, entry)
        try:
            if os.pwrite(self._fd, stored, offset) == len(stored):
                return offset
        except OSError as error:
            space.drop(offset)
            raise Refused(Reason.MEMORY) from error
        space.drop(offset)
        raise Refused(Reason.MEMORY)

    def _make_room_for_same(self, persistent: bool) -> None:
        """Evict the oldest same-filled pages until one more is within the bound; Refused when none is left."""
        most = self.source.capacity // SAME_PARTS // SAME_CHARGE
        while self.same_pages >= most:
            oldest = self.queue.oldest_same()
            if oldest is None:
                raise Refused(Reason.SAME_FILLED)
            self.evict(oldest)

    def _make_room(self, space: SlotSpace, size_class: int, entry: int) -> int:
        """Find a slot by the ladder of the module's docstring; give its offset, or raise Refused."""
        self._source_failed = False
        if not space.spares:
            self._grow(space)
        offset = self._free_slot(space, size_class, entry)
        if offset < 0:
            find = self._by_sacrifice if space.persistent else self._by_eviction
            offset = find(space, size_class, entry)
        if offset < 0:
            raise Refused(Reason.SOURCE if self._source_failed else Reason.NO_SLOT)
        return offset

    def _free_slot(self, space: SlotSpace, size_class: int, entry: int) -> int:
        """Find a slot without losing a page; -1 when there is none."""
        offset = space.take_spare(size_class, entry)
        if offset < 0:
            offset = space.take_larger(size_class, entry, self._most(space, size_class))
        if offset < 0 and space.ripe and self._compact(space):
            offset = space.take_spare(size_class, entry)
        return offset

    def _most(self, space: SlotSpace, size_class: int) -> int:
        """Give the largest slot to use for a class: an eighth larger, and more in a pool of few slabs.

        Each class can keep up to a slab's worth of slots free, which is nothing in a thousand slabs and half of
        the memory in twenty.
        """
        size = SLOT_SIZES[size_class]
        return size + size // 8 + size * 16 // (space.held or 1)

    def _by_eviction(self, space: SlotSpace, size_class: int, entry: int) -> int:
        """Evict until a slot is free, half of the pages at most; -1 when that was not enough."""
        queue = self.queue
        for _ in range((queue.pages + 1) // 2):
            victim = queue.victim()
            if victim is None:
                break
            self.evict(victim)
            offset = space.take(size_class, entry)
            if offset < 0:
                offset = self._free_slot(space, size_class, entry)
            if offset >= 0:
                return offset
        return -1

    def _by_sacrifice(self, space: SlotSpace, size_class: int, entry: int) -> int:
        """Free an ephemeral slab for a persistent page, or waste part of a larger slot; -1 when neither works."""
        if self._clock() >= self._denied_until and self.give_up(1):
            if self._grow(space):
                return space.take_spare(size_class, entry)
            # The source gives no persistent slab although it has one: a cap. Take it back for what it was.
            self._denied_until = self._clock() + _DENIED_SECONDS
            self._grow(self.ephemeral)
        return space.take_larger(size_class, entry, SLOT_SIZES[RAW_CLASS])

    def _grow(self, space: SlotSpace) -> bool:
        """Add a slab of the source to the spares, if need be against a spare of the other kind."""
        try:
            number = self.source.acquire(space.persistent)
            other = self.ephemeral if space.persistent else self.persistent
            if number is None and other.spares:
                self.source.release(other.spares[-1], other.persistent)
                other.spares.pop()
                number = self.source.acquire(space.persistent)
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
        """Move every page of a detached slab; OSError leaves the page at hand, and the rest, where they are."""
        offsets, lengths = self.entries.offset, self.entries.length
        for slot, entry in enumerate(slab.entries):
            if entry == FREE:
                continue
            stored = os.pread(self._fd, lengths[entry], offsets[entry])
            offset = space.take(slab.size_class, entry)
            try:
                os.pwrite(self._fd, stored, offset)
            except OSError:
                space.drop(offset)
                raise
            offsets[entry] = offset
            slab.entries[slot] = FREE
            slab.free.append(slot)

    def give_up(self, slabs: int) -> int:
        """Release up to that many slabs to the source: spares, then compacted ones, then by eviction."""
        released = 0
        while released < slabs and self._find_spare():
            space = self.ephemeral if self.ephemeral.spares else self.persistent
            try:
                self.source.release(space.spares[-1], space.persistent)
            except OSError:
                break
            space.spares.pop()
            released += 1
        return released

    def _find_spare(self) -> bool:
        """Get a spare of either kind, the ephemeral one first; False when only persistent pages are left."""
        ephemeral, persistent, queue = self.ephemeral, self.persistent, self.queue
        while not (ephemeral.spares or persistent.spares or self._compact(ephemeral)):
            if self._compact(persistent):
                break
            victim = queue.victim()
            if victim is None:
                return False
            self.evict(victim)
        return True

    def lose(self, slab: int) -> int:
        """Forget an ephemeral slab that was taken away; give how many pages went with it.

        A slab that is not held (given up meanwhile) is nothing lost; ValueError for a persistent one.
        """
        space = self.ephemeral
        if slab in self.persistent.slabs or slab in self.persistent.spares:
            raise ValueError(f"slab {slab} is persistent")
        held = space.slabs.get(slab)
        lost = [entry for entry in held.entries if entry != FREE] if held else []
        for entry in lost:
            self.remove(entry)
        if slab in space.spares:
            space.spares.remove(slab)
            self.revoked_slabs += 1
        return len(lost)

    @property
    def slabs(self) -> int:
        """Slabs held, in use and spare."""
        return self.ephemeral.held + self.persistent.held

    def check(self) -> None:
        """Raise AssertionError unless slots, entries, queues and sums agree."""
        for part in (self.entries, self.queue, self.ephemeral, self.persistent):
            part.check()
        table = self.entries
        used = [entry for entry, pages in enumerate(table.pages) if pages is not None]
        lengths = [table.length[entry] for entry in used]
        assert self.pages == len(used) and self.used_bytes == sum(lengths)
        assert self.same_pages == lengths.count(0)
        assert self.raw_pages == sum(length > COMPRESSED_MAX for length in lengths)
        slots = 0
        for space in (self.ephemeral, self.persistent):
            for slab in space.slabs.values():
                for slot, entry in enumerate(slab.entries):
                    if entry != FREE:
                        slots += 1
                        assert table.offset[entry] == slab.base + slot * slab.size
                        assert 0 < table.length[entry] <= slab.size
                        assert (self.queue.queue_of(entry) == NOWHERE) == space.persistent
        assert slots == len(used) - self.same_pages, "an entry has no slot"
        assert self.used_bytes <= self.slabs * SLAB_SIZE
