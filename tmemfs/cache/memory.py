"""The memory of one guest: the frames of the cache and the pool below them, in one engine.

The engine's own thread moves pages between them. What is left to the event loop: slabs for the pool, which come from a
source in Python, and a resize in steps.
"""

from __future__ import annotations

import errno
import time

import trio

from tmem import Tmem
from tmem.arena import PAGE_SHIFT, PAGE_SIZE
from tmem.engine import ffi, lib
from tmemfs.cache.admission import Admission
from tmemfs.cache.file import File, Fill

FRAMES = 1024  # of a cache that has shrunk, given back between two checkpoints
SWEEP = 4096  # entries looked at between two checkpoints
STOCK_WAIT = 0.002  # seconds for the stock of slabs to be filled, during a shrink
STOCK_WAITS = 25
PIN_WAIT = 0.001  # seconds for pages that are pinned, during a shrink
RETRY = 0.5  # seconds after which a source that had no slab is asked again


class Memory:
    """Cache and pool. Pages are counted in both; sizes are bytes."""

    def __init__(self, tmem: Tmem) -> None:
        """Use an engine that has frames."""
        self._tmem = tmem
        self.engine = tmem.engine
        self.alive = alive = tmem.alive  # empty once the engine has ended
        engine = tmem.engine

        def free(lease: object, engine: object = engine) -> None:  # the engine has to live as long
            if alive:
                lib.tmem_lease_free(lease)

        self.lease = ffi.gc(lib.tmem_lease_new(engine), free)
        limit = tmem.frame_limit << PAGE_SHIFT
        self.view = memoryview(ffi.buffer(lib.tmem_frames(engine), limit)) if limit else memoryview(b"")
        self.reply = ffi.new("struct tmem_reply *")
        self.facts = ffi.new("struct tmem_facts *")
        self.version = ffi.new("struct tmem_version *")
        self.fills: dict[int, Fill] = {}
        self.admission = Admission()
        self.pool = tmem.files_pool()  # of the pages that leave the cache
        self.has_pool = tmem.has_pool

    def new_file(self) -> File:
        """Return a file without pages."""
        return File(self)

    def should_bypass(self, file: File, first: int, last: int, started: float) -> bool:
        """Return whether pages whose reading ahead began at `started` are not worth a put when they are evicted."""
        if not self.has_pool:
            return False
        now, busy = trio.current_time(), time.thread_time()
        capacity_pages = self._tmem.counts().capacity_pages
        return self.admission.should_bypass(
            file.content, first, last, capacity_pages=capacity_pages, now=now, busy=busy, took=now - started
        )

    # -- counters and sizes --------------------------------------------------------------------------------------

    @property
    def hits(self) -> int:
        """Requested pages that were in the cache."""
        return int(self._tmem.counts().hits)

    @property
    def readahead_hits(self) -> int:
        """Those of the hits that were read ahead and asked for the first time."""
        return int(self._tmem.counts().readahead_hits)

    @property
    def misses(self) -> int:
        """Requested pages that were not in the cache, wherever they came from."""
        return int(self._tmem.counts().misses)

    @property
    def capacity(self) -> int:
        """Bytes that the cache may hold."""
        return self.frames << PAGE_SHIFT

    @property
    def frames(self) -> int:
        """Pages that the cache may hold."""
        return int(self._tmem.counts().frames)

    @property
    def reserve_frames(self) -> int:
        """Frames that are kept free ahead of the readers."""
        return int(self._tmem.counts().reserve_frames)

    @property
    def resident(self) -> int:
        """Pages in the cache."""
        return int(self._tmem.counts().used_frames)

    @property
    def dirty_pages(self) -> int:
        """Pages in the cache that are not written back yet."""
        return int(self._tmem.counts().dirty_pages)

    @property
    def evictions(self) -> int:
        """Pages that have left the cache to make room."""
        return int(self._tmem.counts().cache_evictions)

    @property
    def dropped(self) -> int:
        """Those of the evictions that the pool was not offered for lack of time."""
        return int(self._tmem.counts().dropped)

    @property
    def bypassed(self) -> int:
        """Those of the evictions that the pool was not offered because of `should_bypass`."""
        return int(self._tmem.counts().bypassed)

    @property
    def unused(self) -> int:
        """Pages that were read ahead, and gone before anybody asked for them."""
        return int(self._tmem.counts().unused)

    @property
    def settled(self) -> bool:
        """Whether no shrink waits for dirty pages."""
        return bool(self._tmem.counts().settled)

    # -- changing ------------------------------------------------------------------------------------------------

    async def resize(self, capacity: int) -> None:
        """Resize the cache to so many bytes; what no longer fits goes into the pool."""
        lib.tmem_resize(self.engine, capacity // PAGE_SIZE)
        waits = STOCK_WAITS
        while True:
            lib.tmem_release(self.lease)
            # The engine cannot ask while it runs in this thread, and without slabs it would drop pages.
            if not self._tmem.restock() and waits:
                waits -= 1
                await trio.sleep(STOCK_WAIT)
                continue
            left = lib.tmem_shrink(self.engine, FRAMES)
            if left == -errno.EBUSY:  # the engine's thread compresses some of the pages: they are free soon
                await trio.sleep(PIN_WAIT)
            elif left == 1:
                await trio.lowlevel.checkpoint()
            else:
                return

    async def free_dropped(self) -> None:
        """Free all pages that files have dropped."""
        while lib.tmem_sweep(self.engine, SWEEP):
            await trio.lowlevel.checkpoint()

    def evict(self, count: int) -> int:
        """Move up to `count` of the coldest clean pages out of the cache; return how many."""
        lib.tmem_release(self.lease)
        self._tmem.restock()
        return int(lib.tmem_evict_from_cache(self.engine, count))

    async def run(self) -> None:
        """Bring the slabs that the engine's thread wants, until cancelled."""
        event_fd = lib.tmem_event_fd(self.engine)
        while True:
            await trio.lowlevel.wait_readable(event_fd)
            lib.tmem_clear_event(self.engine)
            if not self._tmem.restock():
                await trio.sleep(RETRY)
            lib.tmem_ask_again(self.engine)

    def check(self) -> None:
        """End the process with a message if an invariant of the engine is broken."""
        self._tmem.check()

    def close(self) -> None:
        """End the engine. Files and buffers of it may not be used any more."""
        ffi.release(self.lease)
        self._tmem.close()
