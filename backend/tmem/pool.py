"""Pools, objects, handles: the contract of transcendent memory.

    put, get    copy a page in and out
    ephemeral   a page may vanish at any time; a private get removes it, a shared one leaves it
    persistent  an accepted page stays until it is flushed or its pool destroyed; a get leaves it
    put, put    the second replaces the page or, refused for whatever reason, removes the first
    frozen      puts act as flushes; flush and destroy work as ever

The verbs are plain calls of one thread: no await, no lock, no message. Measured on a busy 2-CPU machine, with
2:1 pages in a full pool of 16 MiB, best of 30 runs of 2000: a put that evicts 13.7 us (lz4 1.6-3.2 of it,
pwrite 1.1), a get that removes 4.0 us (pread 1.0, lz4 0.7), a get that fails 0.9 us.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from tmem.arena import PAGE_SIZE, SLAB_SIZE, SlabSource
from tmem.entries import ENTRY_BYTES, ObjectPages
from tmem.ghosts import tag_of
from tmem.stats import PageCorrupt, PoolCounters, PoolStats, Reason, Refused, TmemStats
from tmem.store import SAME_CHARGE, Store

Buffer = bytes | bytearray | memoryview

# Index memory beyond the arrays, fitted to the RSS of 131,072 pages: two ints and a dict entry a page, a
# dict, its key and its entry an object, a Slab with its two lists a slab.
_PAGE_BYTES = 125
_OBJECT_BYTES = 400
_SLAB_BYTES = 500


class Pool:
    """One set of pages with one set of rules; made by Tmem.new_pool."""

    def __init__(self, store: Store, number: int, persistent: bool, shared: bool, name: str) -> None:
        self.name = name
        self.persistent = persistent
        self.shared = shared
        self.frozen = False
        self._destroyed = False
        self._number = number
        self._store = store
        self._objects: dict[int, ObjectPages] = {}
        self._counters = PoolCounters()
        self._exclusive = not persistent and not shared

    def put(self, obj: int, index: int, page: Buffer, pool_bit: bool = False) -> bool:
        """Copy a page in; False when it is refused, and then no page has this handle.

        `pool_bit` says that the page came from the pool before. ValueError when it is not PAGE_SIZE long.
        """
        counters, store = self._counters, self._store
        counters.puts += 1
        pages = self._objects.get(obj)
        if pages is not None and index in pages:
            # First of all, so that no later failure can leave the old page behind.
            store.remove(pages[index])
        copy = page if type(page) is bytes else bytes(page)
        if len(copy) != PAGE_SIZE:
            raise ValueError(f"a page of {len(copy)} bytes")
        try:
            if self.frozen:
                raise Refused(Reason.FROZEN)
            hot = pool_bit or (not self.persistent and self._came_back(obj, index))
            entry = store.put(copy, self.persistent, hot)
            # Only now: eviction for this very page may have removed the object.
            pages = self._objects.get(obj)
            if pages is None:
                pages = ObjectPages(self._objects, self._number, obj, counters)
            store.link(entry, pages, index)
        except Refused as refusal:
            counters.refuse(refusal.reason)
            return False
        except MemoryError:
            counters.refuse(Reason.MEMORY)
            return False
        return True

    def _came_back(self, obj: int, index: int) -> bool:
        """Tell whether the handle was evicted lately, and take its ghost."""
        queue, tag = self._store.queue, tag_of(self._number, obj, index)
        if not queue.ghosts.holds(tag, queue.pages):
            return False
        queue.ghosts.discard(tag)
        return True

    def get(self, obj: int, index: int) -> bytes | None:
        """Copy a page out, None when there is none; PageCorrupt for a persistent page with other bytes.

        A private ephemeral page is removed by it. A corrupt ephemeral page is removed and is a miss.
        """
        pages = self._objects.get(obj)
        entry = pages.get(index) if pages is not None else None
        if entry is None:
            self._miss(obj, index)
            return None
        store, counters = self._store, self._counters
        page = store.read(entry)
        if page is None:
            counters.corrupt += 1
            counters.failed_gets += 1
            if self.persistent:
                raise PageCorrupt(self.name, obj, index)
            store.remove(entry)
            return None
        counters.succ_gets += 1
        if self._exclusive:
            store.remove(entry)
        elif self.shared and not self.persistent:
            store.queue.touch(entry)
        return page

    def _miss(self, obj: int, index: int) -> None:
        """Count a failed get, and a ghost hit when the page was evicted lately."""
        self._counters.failed_gets += 1
        if not self.persistent:
            queue = self._store.queue
            if queue.ghosts.holds(tag_of(self._number, obj, index), queue.pages):
                self._counters.ghost_hits += 1

    def holds(self, obj: int, index: int) -> bool:
        """Tell whether the page is there; counts nothing and changes nothing."""
        return index in self._objects.get(obj, ())

    def pages_of(self, obj: int) -> int:
        """Count the pages of an object."""
        return len(self._objects.get(obj, ()))

    def has_object(self, obj: int) -> bool:
        """Tell whether any page of the object is there."""
        return obj in self._objects

    def flush_page(self, obj: int, index: int) -> bool:
        """Remove a page; False when there was none."""
        pages = self._objects.get(obj)
        if pages is None or index not in pages:
            return False
        self._store.remove(pages[index])
        self._counters.flushes += 1
        return True

    def flush_object(self, obj: int, most: int | None = None) -> int:
        """Remove all pages of an object, or up to `most`, those that were put last; give how many."""
        removed = self._remove_object(obj, most)
        self._counters.flushes += removed
        return removed

    def _remove_object(self, obj: int, most: int | None = None) -> int:
        pages = self._objects.get(obj)
        if pages is None:
            return 0
        count = len(pages) if most is None else min(most, len(pages))
        for _ in range(count):
            self._store.remove_last(pages)
        return count

    def freeze(self) -> None:
        """Refuse new pages from now on."""
        self.frozen = True

    def thaw(self) -> None:
        """Accept pages again, unless the pool was destroyed."""
        self.frozen = self._destroyed

    def destroy(self) -> None:
        """Remove all pages, and refuse new ones for good."""
        for obj in list(self._objects):
            self._remove_object(obj)
        self.frozen = self._destroyed = True

    @property
    def reach(self) -> int:
        """About how many pages all slabs that may ever be had can hold, at the compression of those that are held."""
        store = self._store
        most = store.source.ceiling // PAGE_SIZE
        return most * PAGE_SIZE * store.pages // store.used_bytes if store.used_bytes else most

    @property
    def objects(self) -> int:
        """Objects that have a page."""
        return len(self._objects)

    @property
    def stats(self) -> PoolStats:
        """The pool's counts at this moment."""
        return PoolStats(**dataclasses.asdict(self._counters))

    def check(self) -> None:
        """Raise AssertionError unless the objects, the entries and the count of pages agree."""
        table = self._store.entries
        for obj, pages in self._objects.items():
            assert pages, f"object {obj} is empty"
            assert pages.obj == obj, f"object {obj}"
            assert pages.home is self._objects, f"object {obj}"
            for index, entry in pages.items():
                assert table.pages[entry] is pages, f"entry {entry}"
                assert table.index[entry] == index, f"entry {entry}"
        assert self._counters.pages == sum(len(pages) for pages in self._objects.values())


class Tmem:
    """One slab source and the pools in it. `clock` gives seconds, for the age of pages; `compress` is for new pages."""

    def __init__(self, slabs: SlabSource, clock: Callable[[], float] = time.monotonic, compress: bool = True) -> None:
        self._store = Store(slabs, clock, compress)
        self._clock = clock
        self._pools: list[Pool] = []
        self.frozen = False

    def new_pool(self, *, persistent: bool = False, shared: bool = False, name: str = "") -> Pool:
        """Make an empty pool, frozen if all others are."""
        number = len(self._pools)
        pool = Pool(self._store, number, persistent, shared, name or f"pool{number}")
        pool.frozen = self.frozen
        self._pools.append(pool)
        return pool

    def freeze(self) -> None:
        """Freeze all pools, and those that are made later."""
        self.frozen = True
        for pool in self._pools:
            pool.freeze()

    def thaw(self) -> None:
        """Thaw all pools."""
        self.frozen = False
        for pool in self._pools:
            pool.thaw()

    def give_up(self, slabs: int, persistent: bool | None = None) -> int:
        """Release up to that many slabs (of one kind), if need be for the coldest ephemeral pages; give how many."""
        return self._store.room.give_up(slabs, persistent)

    def spares(self, persistent: bool) -> int:
        """Give how many slabs of one kind hold no page."""
        return len((self._store.persistent if persistent else self._store.ephemeral).spares)

    def lose(self, slab: int) -> int:
        """Forget an ephemeral slab that was taken away; give how many pages went with it."""
        return self._store.lose(slab)

    def oldest_age(self) -> float | None:
        """Give the seconds since the put of the oldest page; None when no ephemeral page has a slot."""
        oldest = self._store.queue.oldest()
        return None if oldest is None else self._clock() - oldest

    def ephemeral_stats(self) -> list[PoolStats]:
        """The counts of each ephemeral pool at this moment."""
        return [pool.stats for pool in self._pools if not pool.persistent]

    def stats(self) -> TmemStats:
        """What is held, and what was lost, at this moment."""
        store = self._store
        return TmemStats(
            slabs=store.slabs,
            lent_bytes=store.slabs * SLAB_SIZE,
            used_bytes=store.used_bytes,
            pages=store.pages,
            original_bytes=store.pages * PAGE_SIZE,
            compressed_bytes=store.used_bytes + store.same_pages * SAME_CHARGE,
            same_filled_pages=store.same_pages,
            raw_pages=store.raw_pages,
            evictions=store.evictions,
            revoked_slabs=store.revoked_slabs,
            index_bytes=self._index_bytes(),
            ghost_hits=sum(pool.stats.ghost_hits for pool in self._pools),
        )

    def _index_bytes(self) -> int:
        """Estimate the Python memory of index, queues, slot maps and ghosts."""
        store = self._store
        objects = sum(pool.objects for pool in self._pools)
        table = len(store.entries.pages) * ENTRY_BYTES + store.queue.ghosts.bytes
        slot_maps = store.slabs * _SLAB_BYTES
        return table + store.pages * _PAGE_BYTES + objects * _OBJECT_BYTES + slot_maps

    def check(self) -> None:
        """Raise AssertionError when sums differ, a page is in two lists, or a budget is broken."""
        self._store.check()
        for pool in self._pools:
            pool.check()
        assert self._store.pages == sum(pool.stats.pages for pool in self._pools), "pages of no pool"
