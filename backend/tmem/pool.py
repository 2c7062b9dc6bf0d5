"""Pools, objects, handles: the contract of transcendent memory, on the C engine.

    put, get    copy a page in and out
    ephemeral   a page may vanish at any time; a private get removes it, a shared one leaves it
    persistent  an accepted page stays until it is flushed or its pool destroyed; a get leaves it
    put, put    the second replaces the page or, refused for any reason, removes the first
    frozen      puts act as flushes; flush and destroy work as ever

Slabs come from a source in Python. A put that needs one asks for it before it evicts; the engine's own thread takes
slabs that `restock` granted ahead of it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tmem.arena import PAGE_SIZE, SLAB_SIZE, SlabSource
from tmem.engine import ffi, lib
from tmem.stats import PageCorrupt, PoolStats, TmemStats

Buffer = bytes | bytearray | memoryview

# No slab changes its kind for so many seconds after one was given up for that and not lent back.
_DENIED_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class CacheFrames:
    """The cache of an engine: frames now, and the largest number that a resize may ask for."""

    frames: int
    limit: int
    thread: bool = True  # moves pages into the pool; without it, that is done in calls that need frames


class Pool:
    """One set of pages with one set of rules; made by Tmem.new_pool."""

    def __init__(self, tmem: Tmem, number: int, persistent: bool, shared: bool, name: str) -> None:
        self.name = name
        self.persistent = persistent
        self.shared = shared
        self._tmem = tmem
        self._engine = tmem.engine
        self._number = number
        self._page = ffi.new("uint8_t[]", PAGE_SIZE)
        self._bytes = ffi.buffer(self._page)

    @property
    def frozen(self) -> bool:
        """Whether the pool refuses new pages."""
        return bool(lib.tmem_pool_frozen(self._engine, self._number))

    def put(self, obj: int, index: int, page: Buffer, pool_bit: bool = False) -> bool:
        """Copy a page in. Return False if it is refused: then no page has this handle.

        `pool_bit` says that the page came from the pool before. Raise ValueError unless it is PAGE_SIZE long.
        """
        tmem, engine, number = self._tmem, self._engine, self._number
        copy = page if type(page) is bytes else ffi.from_buffer(page)
        if len(copy) != PAGE_SIZE:
            lib.tmem_flush_page(engine, number, obj, index)
            raise ValueError(f"a page of {len(copy)} bytes")
        tmem.set_time()
        flags = lib.TMEM_HOT if pool_bit else 0
        result = lib.tmem_put(engine, number, obj, index, copy, flags | lib.TMEM_ASK)
        if result == lib.TMEM_NEEDS_SLAB:
            flags |= lib.TMEM_AGAIN | tmem.supply(self.persistent)
            result = lib.tmem_put(engine, number, obj, index, copy, flags | lib.TMEM_ASK)
        if result == lib.TMEM_NEEDS_SLAB:
            flags |= tmem.exchange_slab()
            result = lib.tmem_put(engine, number, obj, index, copy, flags)
        return bool(result == lib.TMEM_OK)

    def get(self, obj: int, index: int) -> bytes | None:
        """Copy a page out. Return None if there is none; raise PageCorrupt for a persistent page with other bytes.

        A private ephemeral page is removed. A corrupt ephemeral page is removed and is a miss.
        """
        result = lib.tmem_get(self._engine, self._number, obj, index, self._page)
        if result == lib.TMEM_OK:
            return bytes(self._bytes)
        if result == lib.TMEM_CORRUPT and self.persistent:
            raise PageCorrupt(self.name, obj, index)
        return None

    def holds(self, obj: int, index: int) -> bool:
        """Return whether the page is there; counts nothing and changes nothing."""
        return bool(lib.tmem_holds(self._engine, self._number, obj, index))

    def pages_of(self, obj: int) -> int:
        """Return the number of pages of an object."""
        return int(lib.tmem_pages_of(self._engine, self._number, obj))

    def has_object(self, obj: int) -> bool:
        """Return whether any page of the object is there."""
        return self.pages_of(obj) > 0

    def flush_page(self, obj: int, index: int) -> bool:
        """Remove a page; return False if there was none."""
        return bool(lib.tmem_flush_page(self._engine, self._number, obj, index))

    def flush_object(self, obj: int) -> int:
        """Remove all pages of an object; return how many."""
        return int(lib.tmem_flush_object(self._engine, self._number, obj))

    def freeze(self) -> None:
        """Refuse new pages from now on."""
        lib.tmem_pool_freeze(self._engine, self._number, True)

    def thaw(self) -> None:
        """Accept pages again, unless the pool was destroyed."""
        lib.tmem_pool_freeze(self._engine, self._number, False)

    def destroy(self) -> None:
        """Remove all pages, and refuse new ones for good."""
        lib.tmem_pool_destroy(self._engine, self._number)

    @property
    def stats(self) -> PoolStats:
        """The pool's counts at this moment."""
        counts = ffi.new("struct tmem_pool_stats *")
        lib.tmem_pool_stats(self._engine, self._number, counts)
        return PoolStats(**{name: getattr(counts, name) for name in PoolStats.__dataclass_fields__})


class Tmem:
    """One engine: its slab source, the pools in it, and the frames of a cache.

    `clock` returns seconds, for the age of pages; None: the engine's own. `compress` is for new pages. `cache` is None
    for pools alone; with one, pages move from its frames into the first pool.
    """

    def __init__(
        self,
        slabs: SlabSource | None,
        clock: Callable[[], float] | None = None,
        compress: bool = True,
        *,
        cache: CacheFrames | None = None,
    ) -> None:
        self._source = slabs
        self._clock = clock
        self._now = clock or time.monotonic
        self._pools: list[Pool] = []
        self._denied_until = float("-inf")
        self.frozen = False
        self.short = False  # the source had no slab for the last `restock`
        frames = cache or CacheFrames(0, 0, thread=False)
        self.frame_limit = frames.limit
        config = ffi.new(
            "struct tmem_config *",
            {
                "arena_fd": slabs.fd if slabs is not None else -1,
                "arena_slabs": os.fstat(slabs.fd).st_size // SLAB_SIZE if slabs is not None else 0,
                "arena_mapped": slabs is not None and slabs.private,
                "compress": compress,
                "thread": frames.thread,
                "frames": frames.frames,
                "frame_limit": frames.limit,
            },
        )
        error = ffi.new("int *")
        engine = lib.tmem_new(config, error)
        if engine == ffi.NULL:
            raise OSError(-error[0], "the engine cannot be started")
        self.alive = alive = [True]

        def free(engine: object) -> None:
            # The garbage collector finalizes an unreachable cycle in any order: its other objects ask `alive`.
            alive.clear()
            lib.tmem_free(engine)

        self.engine = ffi.gc(engine, free)
        self._capacity = (0, 0)
        self.follow_capacity()

    def close(self) -> None:
        """End the engine and its thread. Nothing of it may be used afterwards."""
        ffi.release(self.engine)

    def set_time(self) -> None:
        """Tell the engine the time, if it is not to use its own clock."""
        if self._clock is not None:
            lib.tmem_set_time(self.engine, self._clock())

    # -- pools ---------------------------------------------------------------------------------------------------

    @property
    def has_pool(self) -> bool:
        """Whether there is an arena for pools."""
        return self._source is not None

    def new_pool(self, *, persistent: bool = False, shared: bool = False, name: str = "") -> Pool:
        """Make an empty pool, frozen if all others are."""
        number = lib.tmem_pool_new(self.engine, persistent, shared)
        if number < 0:
            raise OSError(-number, "too many pools")
        return self._add(number, persistent, shared, name)

    def files_pool(self) -> Pool:
        """Return the private ephemeral pool of the pages that leave the cache."""
        return self._add(0, False, False, "precache")

    def _add(self, number: int, persistent: bool, shared: bool, name: str) -> Pool:
        pool = Pool(self, number, persistent, shared, name or f"pool{number}")
        if self.frozen:
            pool.freeze()
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

    # -- slabs ---------------------------------------------------------------------------------------------------

    def follow_capacity(self) -> None:
        """Tell the engine how many bytes the source has at most, where that changed."""
        if self._source is not None and (capacity := (self._source.capacity, self._source.ceiling)) != self._capacity:
            self._capacity = capacity
            lib.tmem_set_capacity(self.engine, *capacity)

    def supply(self, persistent: bool) -> int:
        """Grant the engine a slab, if need be in exchange for a spare of the other kind; return flags for the put."""
        assert self._source is not None
        self.follow_capacity()
        try:
            slab = self._source.acquire(persistent)
            if slab is None and self._now() >= self._denied_until:
                slab = self._exchange_spare(persistent)
        except OSError:
            return int(lib.TMEM_FAILED)
        self._grant(slab, persistent)
        return 0

    def _grant(self, slab: int | None, persistent: bool) -> None:
        if slab is None:
            lib.tmem_deny(self.engine)
        elif lib.tmem_grant(self.engine, slab, persistent) < 0:
            raise AssertionError(f"slab {slab} was granted twice")

    def _exchange_spare(self, persistent: bool) -> int | None:
        """Release a spare of the other kind and acquire a slab of this one."""
        assert self._source is not None
        number = ffi.new("uint32_t *")
        if lib.tmem_take_spare(self.engine, not persistent, number) < 0:
            return None
        try:
            self._source.release(number[0], not persistent)
        except OSError:
            self._grant(number[0], not persistent)
            raise
        slab = self._source.acquire(persistent)
        if slab is None:
            self._denied_until = self._now() + _DENIED_SECONDS
        return slab

    def exchange_slab(self) -> int:
        """Free an ephemeral slab for a persistent page, and grant it as persistent; return flags for the put."""
        assert self._source is not None
        if self._now() < self._denied_until or not self.give_up(1, False):
            return 0
        try:
            slab = self._source.acquire(True)
            if slab is not None:
                self._grant(slab, True)
                return 0
            # A cap, or another guest was faster. Take a slab back for what it was.
            self._denied_until = self._now() + _DENIED_SECONDS
            self._grant(self._source.acquire(False), False)
        except OSError:
            return int(lib.TMEM_FAILED)
        return 0

    def restock(self) -> bool:
        """Grant the slabs that the engine's thread wants; return False if the source has none."""
        wanted = lib.tmem_wanted(self.engine)
        if self._source is None:
            return True
        self.follow_capacity()
        self.short = False
        try:
            while wanted and not self.short:
                slab = self._source.acquire(False)
                self._grant(slab, False)
                self.short = slab is None
                wanted -= 1
        except OSError:
            lib.tmem_deny(self.engine)
            self.short = True
        return not self.short

    def give_up(self, slabs: int, persistent: bool | None = None, *, only_spares: bool = False) -> int:
        """Release up to that many slabs (of one kind), if need be for the coldest ephemeral pages; return how many.

        `only_spares`: only slabs without a page.
        """
        assert self._source is not None
        kinds = (3 if persistent is None else 2 if persistent else 1) | (4 if only_spares else 0)
        found = ffi.new("uint32_t[]", max(1, slabs))
        count = lib.tmem_give_up(self.engine, slabs, kinds, found)
        released = 0
        for place in range(count):
            slab, kind = found[place] >> 1, bool(found[place] & 1)
            try:
                self._source.release(slab, kind)
                released += 1
            except OSError:
                self._grant(slab, kind)
        return released

    def spares(self, persistent: bool) -> int:
        """Return how many slabs of one kind hold no page."""
        return int(lib.tmem_spares(self.engine, persistent))

    def lose(self, slab: int) -> int:
        """Forget an ephemeral slab that was taken away; return how many pages went with it.

        Raise ValueError for a persistent one.
        """
        lost = lib.tmem_lose(self.engine, slab)
        if lost < 0:
            raise ValueError(f"slab {slab} is persistent")
        return int(lost)

    # -- counts --------------------------------------------------------------------------------------------------

    def oldest_age(self) -> float | None:
        """Return the seconds since the last use of the coldest page, as far as the policy knows; None without pages."""
        self.set_time()
        oldest = lib.tmem_oldest(self.engine)
        return None if oldest != oldest else max(0.0, self._now() - oldest)

    def ephemeral_stats(self) -> list[PoolStats]:
        """Return the counts of each ephemeral pool at this moment."""
        return [pool.stats for pool in self._pools if not pool.persistent]

    def counts(self) -> Any:
        """Return the engine's counts, a `struct tmem_stats`."""
        counts = ffi.new("struct tmem_stats *")
        lib.tmem_stats(self.engine, counts)
        return counts

    def stats(self) -> TmemStats:
        """Return what is held, and what was lost, at this moment."""
        now = self.counts()
        return TmemStats(
            slabs=now.slabs,
            lent_bytes=now.slabs * SLAB_SIZE,
            used_bytes=now.used_bytes,
            pages=now.pool_pages,
            original_bytes=now.pool_pages * PAGE_SIZE,
            compressed_bytes=now.used_bytes + now.same_filled_pages * SAME_CHARGE,
            same_filled_pages=now.same_filled_pages,
            raw_pages=now.raw_pages,
            duplicate_pages=now.duplicate_pages,
            evictions=now.evictions,
            revoked_slabs=now.lost_slabs,
            index_bytes=now.index_bytes,
            ghost_hits=now.ghost_hits,
        )

    def check(self) -> None:
        """End the process with a message if an invariant of the engine is broken."""
        lib.tmem_check(self.engine)


SAME_CHARGE = 64  # bytes that a same-filled page is charged
