"""The swap-like file: each page is in a persistent pool, in the overflow file, lost, or a hole.

`PageMap` has the location of each page. A request locks its pages (`rangelock.py`) from the first look at their
locations to the last change; while everything is in the pool, it never awaits in between.

A put that is refused removes the page from the pool, so a page of the pool is copied before a put over it. A refused
page is written to the overflow file. If that fails, the copy is put back; if the pool refuses the copy too, the page is
lost: it reads as an error, never as zeros, until it is written whole.

When the persistent memory has to shrink, the coldest pages move to the overflow file and their slabs are released. A
page that is read from the overflow file moves back to the pool while the pool accepts it.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import trio

from tmem import PAGE_SIZE, PageCorrupt, Tmem
from tmemfs.hswap.overflow import SlotStore
from tmemfs.hswap.pagemap import FIRST_SLOT, HOLE, LOST, POOL, PageMap
from tmemfs.hswap.rangelock import RangeLock

log = logging.getLogger(__name__)

OBJECT = 0  # the only object of the pool
ZEROS = bytes(PAGE_SIZE)
MOVE_BATCH = 32  # pages moved to the overflow file in one write
FLUSH_BATCH = 256  # pages of the pool that are flushed between two checkpoints
REFUSAL_SECONDS = 0.1  # after a refusal, pages that are read stay in the overflow file for this long


@dataclass(slots=True)
class HswapCounters:
    """The counters of the swap-like file."""

    puts: int = 0  # pages written that are not zeros: each is offered to the pool
    rejected_puts: int = 0  # of these, refused by the pool
    gets: int = 0  # pages read
    flushes: int = 0  # pages freed: overwritten with zeros, or cleared
    overflow_reads: int = 0  # pages read from the overflow file
    overflow_writes: int = 0  # refused pages written to it
    overflow_errors: int = 0  # reads and writes of it that failed
    moved_out: int = 0  # pages moved to it so that the pool could shrink
    moved_in: int = 0  # pages that moved back to the pool when they were read
    corrupt: int = 0  # gets of pages whose checksum did not match


class _RefusedPage(NamedTuple):
    """A page that the pool refused, and what is needed to write it elsewhere or to undo the put."""

    page: int
    content: bytes
    location: int  # before the put
    old: bytes | None  # the copy of what the pool had


class Hswap:
    """The swap-like file: a fixed size, and content that ends with the mount.

    `clock` returns seconds. `wait_for_stock` waits until the pool can take so many pages, or gives up.
    """

    def __init__(
        self,
        tmem: Tmem,
        overflow: SlotStore,
        size: int,
        clock: Callable[[], float],
        wait_for_stock: Callable[[int], Awaitable[None]],
    ) -> None:
        self.size = size
        self.counters = HswapCounters()
        self.pagemap = PageMap(size // PAGE_SIZE)
        self.opens = 0
        self._unused = trio.Event()  # set by the last close
        self._tmem = tmem
        self._pool = tmem.new_pool(persistent=True, name="hswap")
        self._overflow = overflow
        self._clock = clock
        self._wait_for_stock = wait_for_stock
        self._lock = RangeLock()
        self._refusing_until = float("-inf")

    # -- the file ------------------------------------------------------------------------------------------------

    def opened(self) -> None:
        """Count an open."""
        self.opens += 1

    def closed(self) -> None:
        """Count a close."""
        self.opens -= 1
        if not self.opens:
            self._unused.set()

    async def wait_until_closed(self) -> None:
        """Wait until the file is not open."""
        while self.opens:
            self._unused = trio.Event()
            await self._unused.wait()

    async def read(self, offset: int, size: int) -> bytes:
        """Return bytes, fewer only at the end of the file. Raises OSError for a page that is lost or unreadable."""
        end = min(offset + size, self.size)
        if offset >= end:
            return b""
        first, last = offset // PAGE_SIZE, (end - 1) // PAGE_SIZE
        async with self._lock.hold(first, last):
            pages = await self._get(range(first, last + 1))
        self.counters.gets += len(pages)
        if len(pages) == 1 and end - offset == PAGE_SIZE:
            return pages[0]
        start = offset - first * PAGE_SIZE
        return b"".join(pages)[start : start + end - offset]

    async def write(self, offset: int, data: bytes) -> int:
        """Write bytes and return how many, fewer only at the end of the file.

        Raises OSError when a page can be stored nowhere: it then has its old content, or is lost.
        """
        end = min(offset + len(data), self.size)
        if offset >= end:
            if data:
                raise OSError(errno.ENOSPC, "the swap-like file has a fixed size")
            return 0
        first, last = offset // PAGE_SIZE, (end - 1) // PAGE_SIZE
        async with self._lock.hold(first, last):
            pages = await self._whole_pages(first, last, offset, data[: end - offset])
            await self._wait_for_stock(last - first + 1)
            refused = [refusal for page in range(first, last + 1) if (refusal := self._put(page, pages(page)))]
            if refused:
                await self._overflow_write(refused)
        return end - offset

    async def _whole_pages(self, first: int, last: int, offset: int, data: bytes) -> Callable[[int], bytes]:
        """Extend the data to whole pages by reading the first and the last; return a function page -> content."""
        start, end = offset - first * PAGE_SIZE, offset + len(data) - last * PAGE_SIZE
        # A page that is overwritten whole is not read: it may be lost.
        edges = sorted({page for page, needed in ((first, start > 0), (last, end < PAGE_SIZE)) if needed})
        if edges:
            contents = dict(zip(edges, await self._get(edges), strict=True))
            data = contents.get(first, b"")[:start] + data + contents.get(last, b"")[end:]
        if first == last:
            return lambda page: data
        return lambda page: data[(page - first) * PAGE_SIZE : (page - first + 1) * PAGE_SIZE]

    # -- pages that the caller has locked ------------------------------------------------------------------------

    async def _get(self, pages: Sequence[int]) -> list[bytes]:
        """Return the content of pages; those of the overflow file move back to the pool if it accepts them."""
        found: list[bytes] = []
        slots: dict[int, int] = {}  # index in `pages` -> slot
        for index, page in enumerate(pages):
            location = self.pagemap.location(page)
            if location == POOL:
                self.pagemap.record_access(page)
                found.append(self._pool_get(page))
            elif location == LOST:
                raise OSError(errno.EIO, f"page {page} of the swap-like file was lost")
            else:
                found.append(ZEROS)
                if location != HOLE:
                    slots[index] = location
        if slots:
            contents = await self._overflow_read(list(slots.values()))
            for index, content in zip(slots, contents, strict=True):
                found[index] = content
                self._move_in(pages[index], content)
        return found

    def _pool_get(self, page: int) -> bytes:
        try:
            content = self._pool.get(OBJECT, page)
        except PageCorrupt:
            content = None
        if content is None:
            self.counters.corrupt += 1
            log.error("page %d of the swap-like file is corrupt: its checksum does not match", page)
            raise OSError(errno.EIO, f"page {page} of the swap-like file is corrupt")
        return content

    def _put(self, page: int, content: bytes) -> _RefusedPage | None:
        """Put a page into the pool; return it if the pool refuses it."""
        if content == ZEROS:
            self._make_hole(page)
            return None
        before, old = self.pagemap.location(page), None
        if self._pool.frozen:
            # A put would only remove the old page: keep that until the new content is in the overflow file.
            self.counters.puts += 1
            self._count_refusal()
            return _RefusedPage(page, content, before, None)
        if before == POOL:
            try:
                old = self._pool.get(OBJECT, page)
            except PageCorrupt:
                self.counters.corrupt += 1  # no error: it is being overwritten
        self.counters.puts += 1
        if self._pool.put(OBJECT, page, content):
            self._relocate(page, before, POOL)
            return None
        self._count_refusal()
        if before == POOL:
            # The refused put removed it. It is lost until it is stored elsewhere: an exception must not make it zeros.
            self.pagemap.set_location(page, LOST)
        return _RefusedPage(page, content, before, old)

    def _count_refusal(self) -> None:
        self.counters.rejected_puts += 1
        self._refusing_until = self._clock() + REFUSAL_SECONDS

    def _relocate(self, page: int, before: int, location: int) -> None:
        """Record the new location of a page, and free its old slot if it had one."""
        self.pagemap.set_location(page, location)
        if FIRST_SLOT <= before < LOST:
            self._overflow.free([before])

    def _make_hole(self, page: int) -> None:
        before = self.pagemap.location(page)
        if before != HOLE:
            self._pool.flush_page(OBJECT, page)
            self._relocate(page, before, HOLE)
            self.counters.flushes += 1

    def _move_in(self, page: int, content: bytes) -> None:
        """Move a page that was read from the overflow file back to the pool, unless the pool has just refused one."""
        if self._clock() < self._refusing_until:
            return
        if self._pool.put(OBJECT, page, content):
            self._relocate(page, self.pagemap.location(page), POOL)
            self.counters.moved_in += 1
        else:
            self._refusing_until = self._clock() + REFUSAL_SECONDS

    # -- the overflow file ---------------------------------------------------------------------------------------

    async def _overflow_read(self, slots: Sequence[int]) -> list[bytes]:
        try:
            pages = await self._overflow.read(slots)
        except OSError as error:
            self._count_overflow_error(error)
            raise
        self.counters.overflow_reads += len(pages)
        return pages

    async def _overflow_write(self, refused: Sequence[_RefusedPage]) -> None:
        """Write refused pages to the overflow file; if that fails, restore what they were before the put."""
        try:
            slots = await self._overflow.write([refusal.content for refusal in refused])
        except BaseException as error:
            for refusal in refused:
                self._restore(refusal)
            if isinstance(error, OSError):
                self._count_overflow_error(error)
            raise
        self.counters.overflow_writes += len(slots)
        for refusal, slot in zip(refused, slots, strict=True):
            self._pool.flush_page(OBJECT, refusal.page)  # a frozen pool still has the old content
            self._relocate(refusal.page, refusal.location, slot)

    def _restore(self, refusal: _RefusedPage) -> None:
        """Put the copy of the old content back, if the refused put removed it from the pool."""
        if self.pagemap.location(refusal.page) != LOST or refusal.location == LOST:
            return
        if refusal.old is not None and self._pool.put(OBJECT, refusal.page, refusal.old):
            self.pagemap.set_location(refusal.page, POOL)
        else:
            log.error("page %d of the swap-like file is lost: pool and overflow file both refused it", refusal.page)

    def _count_overflow_error(self, error: OSError) -> None:
        """Count a failure, and log the 1st, 2nd, 4th, 8th…: a full disk would fill the log too."""
        self.counters.overflow_errors += 1
        if self.counters.overflow_errors & (self.counters.overflow_errors - 1) == 0:
            log.error("overflow file: %s (failure %d)", error.strerror, self.counters.overflow_errors)

    # -- shrinking the pool --------------------------------------------------------------------------------------

    async def release_slabs(self, slabs: int) -> int:
        """Release persistent slabs by moving the coldest pages to the overflow file; return how many were released.

        Fewer than asked for when the overflow file fails or no page is left.
        """
        released = self._tmem.give_up(slabs, persistent=True)
        while released < slabs and await self._move_out():
            released += self._tmem.give_up(slabs - released, persistent=True)
        return released

    async def _move_out(self) -> int:
        """Move a batch of the coldest pages; return how many, 0 when none is left or the overflow file fails."""
        coldest = self.pagemap.coldest(MOVE_BATCH)
        held = [hold for page in coldest if (hold := self._lock.try_hold(page))]
        if coldest and not held:
            async with self._lock.hold(coldest[0], coldest[0]):
                return len(coldest)  # all were locked: the caller tries again
        try:
            return await self._move_out_locked([hold.first for hold in held])
        finally:
            for hold in held:
                hold.release()

    async def _move_out_locked(self, pages: Sequence[int]) -> int:
        contents = {}
        for page in pages:
            try:
                contents[page] = self._pool_get(page)
            except OSError:  # corrupt
                self._pool.flush_page(OBJECT, page)
                self.pagemap.set_location(page, LOST)
        if not contents:
            return len(pages)
        try:
            slots = await self._overflow.write(list(contents.values()))
        except OSError as error:
            self._count_overflow_error(error)
            return 0
        self._refusing_until = self._clock() + REFUSAL_SECONDS
        for page, slot in zip(contents, slots, strict=True):
            self._pool.flush_page(OBJECT, page)
            self.pagemap.set_location(page, slot)
        self.counters.moved_out += len(slots)
        return len(pages)

    async def lose_pool_pages(self) -> int:
        """Mark all pages of the pool as lost, because their memory was taken; return how many."""
        lost = self.pagemap.pool_pages
        async with self._lock.hold(0, len(self.pagemap) - 1):
            await self._empty_pool(LOST)
        self._tmem.give_up(lost, persistent=True)
        return lost

    async def _empty_pool(self, location: int) -> None:
        """Flush all pages from the pool and record their new location."""
        while pages := self.pagemap.coldest(FLUSH_BATCH):
            for page in pages:
                self._pool.flush_page(OBJECT, page)
                self.pagemap.set_location(page, location)
            await trio.lowlevel.checkpoint()

    # -- the whole file ------------------------------------------------------------------------------------------

    async def reserve(self, pool_bytes: int) -> None:
        """Allocate disk space for every page, or if the disk is too small, for those that the pool cannot hold.

        Raises OSError when there is not even space for these.
        """
        try:
            await self._overflow.reserve(len(self.pagemap))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            await self._overflow.reserve(max(0, len(self.pagemap) - pool_bytes // PAGE_SIZE))

    async def clear(self) -> None:
        """Make every page a hole. Raises OSError while the file is open: a new user may be about to write."""
        async with self._lock.hold(0, len(self.pagemap) - 1):
            if self.opens:
                raise OSError(errno.EBUSY, "the swap-like file is open")
            pagemap = self.pagemap
            self.counters.flushes += pagemap.pool_pages + pagemap.overflow_pages + pagemap.lost_pages
            await self._empty_pool(HOLE)
            pagemap.clear()
            self._overflow.clear()

    def check(self) -> None:
        """Raise AssertionError unless pool, overflow file and page map agree."""
        self.pagemap.check()
        locations = [self.pagemap.location(page) for page in range(len(self.pagemap))]
        assert self._pool.stats.pages == self.pagemap.pool_pages
        for page, location in enumerate(locations):
            assert (location == POOL) == self._pool.holds(OBJECT, page), f"page {page} has two locations"
        if not self._lock.ranges:  # else a request may be writing to slots that no page has yet
            self._overflow.check([location for location in locations if FIRST_SLOT <= location < LOST])
