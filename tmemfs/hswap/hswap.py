"""The swap-like file: pages in a persistent pool, in the overflow file when the pool refuses them, or nowhere.

Each page is in exactly one place (`places.py`). A request holds its pages (`rangelock.py`) from the first look to the
last change; where everything is in the pool there is no await in between. What was in the pool is copied before a
put, because a put that is refused removes it: if the overflow file then fails too, the copy goes back. A page whose
copy is refused as well is lost, and reads as an error until it is written again, never as zeros.

When the persistent memory has to shrink, the coldest pages move to the overflow file and their slabs go back. Pages
that are read from there return to the pool while it takes them.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import trio

from tmem import PAGE_SIZE, PageCorrupt, Tmem
from tmemfs.hswap.overflow import OverflowFile
from tmemfs.hswap.places import FIRST_SLOT, LOST, NOWHERE, POOL, Places
from tmemfs.hswap.rangelock import RangeLock

log = logging.getLogger(__name__)

OBJECT = 0  # the one object of the pool
ZEROS = bytes(PAGE_SIZE)
BATCH = 32  # pages moved to the overflow file in one write
CLEARED = 256  # pages of the pool that are flushed in one stretch
FULL_SECONDS = 0.1  # after a refusal, pages that are read stay where they are for so long


@dataclass(slots=True)
class HswapCounters:
    """What the file has done."""

    puts: int = 0  # pages written that are not zeros, offered to the pool
    rejected_puts: int = 0  # of these, refused by the pool
    gets: int = 0  # pages read
    flushes: int = 0  # pages freed: overwritten with zeros, or cleared
    overflow_reads: int = 0  # pages read from the overflow file
    overflow_writes: int = 0  # pages written to it
    overflow_errors: int = 0  # calls on it that failed
    moved_out: int = 0  # pages moved to it so that the pool could shrink
    moved_in: int = 0  # pages that returned to the pool when they were read
    corrupt: int = 0  # reads of pages whose bytes in the pool were not those that were put


class _Refusal(NamedTuple):
    """A page that the pool refused: its content, and where and what it was before."""

    page: int
    content: bytes
    before: int
    old: bytes | None


class Hswap:
    """A file of fixed size whose content ends with the mount.

    `clock` gives seconds; `ready` waits for memory that is on its way to the pool, for so many pages.
    """

    def __init__(
        self,
        tmem: Tmem,
        overflow: OverflowFile,
        size: int,
        clock: Callable[[], float],
        ready: Callable[[int], Awaitable[None]],
    ) -> None:
        self.size = size
        self.counters = HswapCounters()
        self.places = Places(size // PAGE_SIZE)
        self.opens = 0
        self.on_last_close: Callable[[], None] = lambda: None
        self._tmem = tmem
        self._pool = tmem.new_pool(persistent=True, name="hswap")
        self._overflow = overflow
        self._clock = clock
        self._ready = ready
        self._lock = RangeLock()
        self._full_until = float("-inf")

    # -- the file ------------------------------------------------------------------------------------------------

    def opened(self) -> None:
        """Count an open."""
        self.opens += 1

    def closed(self) -> None:
        """Count a close."""
        self.opens -= 1
        if not self.opens:
            self.on_last_close()

    async def read(self, offset: int, size: int) -> bytes:
        """Read bytes; fewer only at the end of the file. OSError names the page that cannot be given."""
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
        """Write bytes; give how many, fewer at the end of the file. OSError: a page keeps its content, or is lost."""
        end = min(offset + len(data), self.size)
        if offset >= end:
            if data:
                raise OSError(errno.ENOSPC, "the swap-like file has a fixed size")
            return 0
        first, last = offset // PAGE_SIZE, (end - 1) // PAGE_SIZE
        async with self._lock.hold(first, last):
            pages = await self._merge(first, last, offset, data[: end - offset])
            await self._ready(last - first + 1)
            refused = [refusal for page in range(first, last + 1) if (refusal := self._put(page, pages(page)))]
            if refused:
                await self._overflow_write(refused)
        return end - offset

    async def _merge(self, first: int, last: int, offset: int, data: bytes) -> Callable[[int], bytes]:
        """Complete the data to whole pages with what the first and the last page hold around it."""
        start, end = offset - first * PAGE_SIZE, offset + len(data) - last * PAGE_SIZE
        # A page that is overwritten whole need not be readable.
        edges = sorted({page for page, needed in ((first, start > 0), (last, end < PAGE_SIZE)) if needed})
        if edges:
            held = dict(zip(edges, await self._get(edges), strict=True))
            data = held.get(first, b"")[:start] + data + held.get(last, b"")[end:]
        if first == last:
            return lambda page: data
        return lambda page: data[(page - first) * PAGE_SIZE : (page - first + 1) * PAGE_SIZE]

    # -- pages that are held -------------------------------------------------------------------------------------

    async def _get(self, pages: Sequence[int]) -> list[bytes]:
        """Give the content of held pages, and let those of the overflow file return to the pool."""
        found: list[bytes] = []
        slots: dict[int, int] = {}  # position -> slot
        for position, page in enumerate(pages):
            place = self.places.where(page)
            if place == POOL:
                self.places.touch(page)
                found.append(self._pool_get(page))
            elif place == LOST:
                raise OSError(errno.EIO, f"page {page} of the swap-like file was lost")
            else:
                found.append(ZEROS)
                if place != NOWHERE:
                    slots[position] = place
        if slots:
            contents = await self._overflow_read(list(slots.values()))
            for position, content in zip(slots, contents, strict=True):
                found[position] = content
                self._move_in(pages[position], content)
        return found

    def _pool_get(self, page: int) -> bytes:
        try:
            content = self._pool.get(OBJECT, page)
        except PageCorrupt:
            content = None
        if content is None:
            self.counters.corrupt += 1
            log.error("page %d of the swap-like file: its bytes in memory are not those that were written", page)
            raise OSError(errno.EIO, f"page {page} of the swap-like file is corrupt")
        return content

    def _put(self, page: int, content: bytes) -> _Refusal | None:
        """Put a held page into the pool; give what is needed to go on when it is refused."""
        if content == ZEROS:
            self._discard(page)
            return None
        before, old = self.places.where(page), None
        if self._pool.frozen:
            # Its put would only flush: what the page holds stays until the overflow file has the new content.
            self.counters.puts += 1
            self._note_refusal()
            return _Refusal(page, content, before, None)
        if before == POOL:
            try:
                old = self._pool.get(OBJECT, page)
            except PageCorrupt:
                self.counters.corrupt += 1  # it is being replaced
        self.counters.puts += 1
        if self._pool.put(OBJECT, page, content):
            self._settle(page, before, POOL)
            return None
        self._note_refusal()
        if before == POOL:
            self.places.move(page, LOST)  # until it is decided: the pool has nothing any more
        return _Refusal(page, content, before, old)

    def _note_refusal(self) -> None:
        self.counters.rejected_puts += 1
        self._full_until = self._clock() + FULL_SECONDS

    def _settle(self, page: int, before: int, place: int) -> None:
        """Record the new place of a page, and free its old slot."""
        self.places.move(page, place)
        if FIRST_SLOT <= before < LOST:
            self._overflow.free([before])

    def _discard(self, page: int) -> None:
        before = self.places.where(page)
        if before != NOWHERE:
            self._pool.flush_page(OBJECT, page)
            self._settle(page, before, NOWHERE)
            self.counters.flushes += 1

    def _move_in(self, page: int, content: bytes) -> None:
        """Let a held page that was read return to the pool, unless the pool was full a moment ago."""
        if self._clock() < self._full_until:
            return
        if self._pool.put(OBJECT, page, content):
            self._settle(page, self.places.where(page), POOL)
            self.counters.moved_in += 1
        else:
            self._full_until = self._clock() + FULL_SECONDS

    # -- the overflow file ---------------------------------------------------------------------------------------

    async def _overflow_read(self, slots: Sequence[int]) -> list[bytes]:
        try:
            pages = await self._overflow.read(slots)
        except OSError as error:
            self._note(error)
            raise
        self.counters.overflow_reads += len(pages)
        return pages

    async def _overflow_write(self, refused: Sequence[_Refusal]) -> None:
        """Write held pages that the pool refused; when that fails, give them back what they were."""
        try:
            slots = await self._overflow.write([refusal.content for refusal in refused])
        except BaseException as error:
            for refusal in refused:
                self._restore(refusal)
            if isinstance(error, OSError):
                self._note(error)
            raise
        self.counters.overflow_writes += len(slots)
        for refusal, slot in zip(refused, slots, strict=True):
            self._pool.flush_page(OBJECT, refusal.page)  # there still if the pool is frozen
            self._settle(refusal.page, refusal.before, slot)

    def _restore(self, refusal: _Refusal) -> None:
        """Put the copy of what was in the pool back; the other places were not changed."""
        if self.places.where(refusal.page) != LOST or refusal.before == LOST:
            return
        if refusal.old is not None and self._pool.put(OBJECT, refusal.page, refusal.old):
            self.places.move(refusal.page, POOL)
        else:
            log.error("page %d of the swap-like file is lost: pool and overflow file both refused it", refusal.page)

    def _note(self, error: OSError) -> None:
        """Log the first failure of many."""
        self.counters.overflow_errors += 1
        if self.counters.overflow_errors & (self.counters.overflow_errors - 1) == 0:
            log.error("overflow file: %s (failure %d)", error.strerror, self.counters.overflow_errors)

    # -- memory that is wanted back ------------------------------------------------------------------------------

    async def give_back(self, slabs: int) -> int:
        """Release that many persistent slabs, moving the coldest pages to the overflow file; give how many it were.

        Fewer when the overflow file fails or no page is left.
        """
        given = self._tmem.give_up(slabs, persistent=True)
        while given < slabs and await self._move_out():
            given += self._tmem.give_up(slabs - given, persistent=True)
        return given

    async def _move_out(self) -> int:
        """Move some of the coldest pages; give how many, 0 when none is left or the overflow file fails."""
        coldest = self.places.coldest(BATCH)
        held = [hold for page in coldest if (hold := self._lock.try_hold(page))]
        if coldest and not held:
            async with self._lock.hold(coldest[0], coldest[0]):
                return len(coldest)  # they were in use: look again
        try:
            return await self._move_held([hold.first for hold in held])
        finally:
            for hold in held:
                hold.release()

    async def _move_held(self, pages: Sequence[int]) -> int:
        contents = {}
        for page in pages:
            try:
                contents[page] = self._pool_get(page)
            except OSError:  # it stays corrupt wherever it is
                self._pool.flush_page(OBJECT, page)
                self.places.move(page, LOST)
        if not contents:
            return len(pages)
        try:
            slots = await self._overflow.write(list(contents.values()))
        except OSError as error:
            self._note(error)
            return 0
        self._full_until = self._clock() + FULL_SECONDS
        for page, slot in zip(contents, slots, strict=True):
            self._pool.flush_page(OBJECT, page)
            self.places.move(page, slot)
        self.counters.moved_out += len(slots)
        return len(pages)

    async def lose_all(self) -> int:
        """Mark the pages of the pool as lost, because their memory is; give how many."""
        lost = self.places.pool_pages
        async with self._lock.hold(0, len(self.places) - 1):
            while pages := self.places.coldest(CLEARED):
                for page in pages:
                    self._pool.flush_page(OBJECT, page)
                    self.places.move(page, LOST)
                await trio.lowlevel.checkpoint()
        self._tmem.give_up(lost, persistent=True)
        return lost

    # -- as a whole ----------------------------------------------------------------------------------------------

    async def reserve(self, pool_bytes: int) -> None:
        """Have room in the overflow file for every page, or at least for those that the pool cannot hold. OSError."""
        try:
            await self._overflow.reserve(len(self.places))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            await self._overflow.reserve(max(0, len(self.places) - pool_bytes // PAGE_SIZE))

    async def clear(self) -> None:
        """Empty the file; OSError while somebody has it open, who may be about to write."""
        async with self._lock.hold(0, len(self.places) - 1):
            if self.opens:
                raise OSError(errno.EBUSY, "the swap-like file is open")
            self.counters.flushes += self.places.pool_pages + self.places.overflow_pages + self.places.lost_pages
            while pages := self.places.coldest(CLEARED):
                for page in pages:
                    self._pool.flush_page(OBJECT, page)
                    self.places.move(page, NOWHERE)
                await trio.lowlevel.checkpoint()
            self.places.clear()
            self._overflow.clear()

    def check(self) -> None:
        """Raise AssertionError unless pool, slots and places agree."""
        self.places.check()
        places = [self.places.where(page) for page in range(len(self.places))]
        assert self._pool.stats.pages == self.places.pool_pages
        for page, place in enumerate(places):
            assert (place == POOL) == self._pool.holds(OBJECT, page), f"page {page} is in two places"
        if not self._lock.ranges:  # else slots may be on their way
            self._overflow.check([place for place in places if FIRST_SLOT <= place < LOST])
