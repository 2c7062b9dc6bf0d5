"""The store: pages in slots, by entry.

Every path that adds a page goes through `put` and `link`, every path that removes one ends in `remove`; in
between the entry table, the queues and the slots agree, whatever raises.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from tests.oracle.codec import COMPRESSED_MAX, CodecError, checksum, decode, encode, fill
from tests.oracle.counters import Refused
from tests.oracle.entries import EntryTable, ObjectPages
from tests.oracle.ghosts import tag_of
from tests.oracle.policy import MAIN, NOWHERE, PROBATION, SAME, TwoQueue
from tests.oracle.room import Room
from tests.oracle.slots import FREE, SlotSpace, class_of
from tmem.arena import SLAB_SIZE, SlabSource
from tmem.stats import Reason

# What a same-filled page is charged, and the part of the capacity that all of them may be charged.
SAME_CHARGE = 64
SAME_PARTS = 64


class Store:
    """Pages in slots of one slab source. A single thread at a time."""

    def __init__(self, slabs: SlabSource, clock: Callable[[], float], compress: bool) -> None:
        self.source = slabs
        self.entries = EntryTable()
        self.queue = TwoQueue()
        self.ephemeral = SlotSpace(persistent=False)
        self.persistent = SlotSpace(persistent=True)
        self.used_bytes = self.raw_pages = self.same_pages = self.pages = 0
        self.evictions = self.revoked_slabs = 0
        self._clock = clock
        self._compress = compress
        self._fd = slabs.fd
        self.room = Room(slabs, self.entries, self.queue, self.ephemeral, self.persistent, self.evict, clock)

    def put(self, page: bytes, persistent: bool, hot: bool) -> int:
        """Store a page and give its entry, which `link` must name next; Refused, with nothing kept."""
        try:
            stored, digest = encode(page, self._compress)
        except CodecError as error:
            raise Refused(Reason.CODEC) from error
        entries = self.entries
        if not entries.free:
            entries.grow(self.queue.reach)
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
        """Name the entry: from here on it can be found and evicted. What raises leaves nothing of it behind."""
        try:
            if not pages:
                pages.home[pages.obj] = pages
            pages[index] = entry
        except BaseException:  # these tables grow: they are what there may be no memory for
            if not pages:
                pages.home.pop(pages.obj, None)
            self._drop(entry)
            raise
        self.entries.pages[entry] = pages
        self.entries.index[entry] = index
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
        entries = self.entries
        pages = entries.pages[entry]
        assert pages is not None
        del pages[entries.index[entry]]
        self._unlink(entry, pages)

    def remove_last(self, pages: ObjectPages) -> None:
        """Remove the entry of an object that was linked last."""
        # Not one of the first: a dict walks over what was deleted at its beginning, again for each step of many.
        self._unlink(pages.popitem()[1], pages)

    def _unlink(self, entry: int, pages: ObjectPages) -> None:
        """Remove an entry that its object has no more."""
        if not pages:
            del pages.home[pages.obj]
        pages.counters.pages -= 1
        self.entries.pages[entry] = None
        self._drop(entry)

    def _drop(self, entry: int) -> None:
        """Take an entry without a name out of its queue and its slot, and free it."""
        entries, queue = self.entries, self.queue
        ephemeral = queue.where[entry] != NOWHERE
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
        entries, queue = self.entries, self.queue
        if entries.length[entry]:
            queue.ghosts.add(tag_of(pages.pool, pages.obj, entries.index[entry]), queue.pages)
        self.remove(entry)

    def _place(self, entry: int, stored: bytes, persistent: bool) -> int:
        """Write stored bytes into a slot and give its offset; Refused when there is none or it cannot."""
        space = self.persistent if persistent else self.ephemeral
        size_class = class_of(len(stored))
        offset = space.take(size_class, entry)
        if offset < 0:
            offset = self.room.find(space, size_class, entry)
        try:
            if os.pwrite(self._fd, stored, offset) != len(stored):
                raise Refused(Reason.MEMORY)
        except BaseException as error:
            space.drop(offset)
            if isinstance(error, OSError):
                raise Refused(Reason.MEMORY) from error
            raise
        return offset

    def _make_room_for_same(self, persistent: bool) -> None:
        """Evict the oldest same-filled pages until one more is within the bound; Refused if it cannot be."""
        most = self.source.capacity // SAME_PARTS // SAME_CHARGE
        while self.same_pages >= most:
            oldest = self.queue.oldest_same()
            if oldest is None:
                raise Refused(Reason.SAME_FILLED)
            self.evict(oldest)

    def lose(self, slab: int) -> int:
        """Forget an ephemeral slab that was taken away; give how many pages went with it, as evictions.

        No entry refers to the slab from here on: when it is lent again, nothing is taken for its old content. One
        that is not held (given up meanwhile) is nothing lost; ValueError for a persistent one.
        """
        space = self.ephemeral
        if slab in self.persistent.slabs or slab in self.persistent.spares:
            raise ValueError(f"slab {slab} is persistent")
        held = space.slabs.get(slab)
        lost = [entry for entry in held.entries if entry != FREE] if held else []
        for entry in lost:
            self.evict(entry)
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
        assert self.pages == len(used)
        assert self.used_bytes == sum(lengths)
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
                        assert (self.queue.where[entry] == NOWHERE) == space.persistent
        assert slots == len(used) - self.same_pages, "an entry has no slot"
        assert self.used_bytes <= self.slabs * SLAB_SIZE
