"""Change what is held of one file, in all places at once: frames, victim queue, pool, fills in flight.

The race that must not be: a reader starts a backing read, a write to those pages completes, the reader then caches
the old bytes. So whoever changes a file poisons the fills that overlap the change; a poisoned fill still answers the
requests that were waiting for it (they were concurrent with the change), but its bytes enter no cache and nobody
joins it any more.
"""

from __future__ import annotations

from typing import Protocol

import trio

from tmemfs.cache.pagecache import NONE, PAGE_SHIFT, PAGE_SIZE, USED, PageCache, PageOwner
from tmemfs.cache.precache import MANY, Precache


class Fill:
    """A backing read in flight for the pages first..last."""

    __slots__ = ("ahead", "data", "done", "error", "first", "hollow", "last", "poisoned", "unread")

    def __init__(self, first: int, last: int, *, ahead: bool, unread: int = NONE) -> None:
        self.first = first
        self.last = last
        self.ahead = ahead  # of a stream: some of it was not asked for yet
        self.unread = unread  # from this page on, nobody had asked for them when the read began
        self.done = trio.Event()
        self.poisoned = False
        self.hollow = False  # begun while pages behind it were dirty: what the backing lacks reads as zeros
        self.data: bytearray | None = None
        self.error: OSError | None = None


class CachedFile(PageOwner, Protocol):
    """A file with cached pages and reads in flight."""

    fills: dict[int, Fill]
    dirty: set[int]
    size: int


class Content:
    """The pages of all files: the cache and the precache seen as one."""

    def __init__(self, cache: PageCache, precache: Precache) -> None:
        self.cache = cache
        self.precache = precache

    def held_pages(self, file: CachedFile) -> int:
        """Count the pages of a file that are in memory: in the cache or in the pool."""
        pool = self.precache.pool
        return len(file.pages) + (pool.pages_of(file.pages.oid) if pool is not None else 0)

    def poison(self, file: CachedFile, first: int, last: int) -> None:
        """Keep the fills that overlap pages first..last from entering the cache."""
        if not file.fills:
            return
        for fill in set(file.fills.values()):
            if fill.first <= last and fill.last >= first:
                fill.poisoned = True
                self.detach(file, fill)

    @staticmethod
    def detach(file: CachedFile, fill: Fill) -> None:
        """Let nobody join a fill any more."""
        for index in range(fill.first, fill.last + 1):
            if file.fills.get(index) is fill:
                del file.fills[index]

    def drop(self, file: CachedFile, first: int, last: int) -> None:
        """Forget pages first..last everywhere, dirty ones too; where they are many, all clean ones."""
        self.poison(file, first, last)
        self._remove(file, first, last)
        self.precache.flush(file, first, last)

    def _remove(self, file: CachedFile, first: int, last: int) -> None:
        """Forget cached pages first..last, dirty ones too; where they are many, all clean ones."""
        for index in [index for index in file.dirty if first <= index <= last]:
            file.dirty.discard(index)
            self.cache.clean(file.pages[index])
        if min(last - first, len(file.pages)) > MANY:
            self.renew(file)
        else:
            self.cache.remove(file, first, last)

    def renew(self, file: CachedFile) -> None:
        """Forget all clean pages: the file changed underneath. Its page table and its object are new ones.

        A put of the old generation that comes late is left out.
        """
        self.poison(file, 0, _LAST)
        old, pool = file.pages, self.precache.pool
        if old or (pool is not None and pool.has_object(old.oid)):
            file.pages = self.cache.split(old, file.dirty)
            self.precache.discards.add(old)

    def holds(self, file: CachedFile) -> bool:
        """Tell whether anything of a file is held, or on its way."""
        pool = self.precache.pool
        return bool(file.pages or file.fills or file.dirty) or (pool is not None and pool.has_object(file.pages.oid))

    def forget(self, file: CachedFile) -> None:
        """Forget everything of a file that nobody can open any more."""
        for index in file.dirty:
            self.cache.clean(file.pages[index])
        file.dirty.clear()
        self.renew(file)

    def overwrite(self, file: CachedFile, offset: int, data: bytes | memoryview) -> None:
        """Bring resident pages up to date with bytes that the backing has taken."""
        source, cache, pages = memoryview(data), self.cache, file.pages
        first, last = offset >> PAGE_SHIFT, (offset + len(source) - 1) >> PAGE_SHIFT
        self.poison(file, first, last)
        self.precache.flush(file, first, last)
        for index in range(first, last + 1):
            frame = pages.get(index)
            if frame is None:
                continue
            start = max(offset, index << PAGE_SHIFT)
            end = min(offset + len(source), (index + 1) << PAGE_SHIFT)
            base = (frame << PAGE_SHIFT) - (index << PAGE_SHIFT)
            cache.view[base + start : base + end] = source[start - offset : end - offset]
            cache.ref[frame] = USED  # an overwritten page leaves the victim queue

    def truncate(self, file: CachedFile, size: int) -> None:
        """Follow a truncation: nothing beyond `size` stays, and the last page ends in zeros."""
        boundary = size >> PAGE_SHIFT
        self.poison(file, boundary, _LAST)
        old_last = max(0, max(file.size, size) - 1) >> PAGE_SHIFT
        self.precache.flush(file, boundary, old_last)
        beyond = boundary + bool(size & (PAGE_SIZE - 1))  # the first page without a byte of the file
        self._remove(file, beyond, old_last if len(file.pages) > MANY else _LAST)
        frame = file.pages.get(boundary)
        if frame is not None:
            start = size & (PAGE_SIZE - 1)
            self.cache.page(frame)[start:] = bytes(PAGE_SIZE - start)
            self.cache.ref[frame] = USED
        file.size = size


_LAST = 1 << 52  # beyond the last page of any file
