"""Change what is held of one file, in all places at once: frames, victim queue, pool, fills in flight.

The race that must not be: a reader starts a backing read, a write to those pages completes, the reader then caches
the old bytes. So whoever changes a file poisons the fills that overlap the change; a poisoned fill still answers the
requests that were waiting for it (they were concurrent with the change), but its bytes enter no cache and nobody
joins it any more.
"""

from __future__ import annotations

import itertools
from typing import Protocol

import trio

from tmemfs.cache.pagecache import PAGE_SHIFT, PAGE_SIZE, USED, PageCache
from tmemfs.cache.precache import PooledOwner, Precache

_object_numbers = itertools.count(1)


def next_object_number() -> int:
    """Return a number that no object of this guest ever had."""
    return next(_object_numbers)


class Fill:
    """A backing read in flight for the pages first..last."""

    __slots__ = ("ahead", "data", "done", "error", "first", "hollow", "last", "poisoned")

    def __init__(self, first: int, last: int, *, ahead: bool) -> None:
        self.first = first
        self.last = last
        self.ahead = ahead  # of a stream: some of it was not asked for yet
        self.done = trio.Event()
        self.poisoned = False
        self.hollow = False  # begun while pages behind it were dirty: what the backing lacks reads as zeros
        self.data: bytearray | None = None
        self.error: OSError | None = None


class CachedFile(PooledOwner, Protocol):
    """A file with cached pages and reads in flight."""

    fills: dict[int, Fill]
    dirty: set[int]
    size: int


class Content:
    """The pages of all files: the cache and the precache seen as one."""

    def __init__(self, cache: PageCache, precache: Precache) -> None:
        self.cache = cache
        self.precache = precache

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
        """Forget pages first..last everywhere, dirty ones too."""
        self.poison(file, first, last)
        self.cache.remove(file, first, last)
        file.dirty = {index for index in file.dirty if not first <= index <= last}
        self.precache.flush(file, first, last)

    def renew(self, file: CachedFile) -> None:
        """Forget all clean pages: the file changed underneath. The object gets a new number.

        A put of the old generation that comes late goes under the old number and is never found.
        """
        self.poison(file, 0, _LAST)
        self.cache.remove_clean(file)
        self.precache.flush_object(file)
        file.oid = next_object_number()

    def forget(self, file: CachedFile) -> None:
        """Forget everything of a file that nobody can open any more."""
        pool = self.precache.pool
        if not (file.pages or file.fills or file.dirty or (pool is not None and pool.has_object(file.oid))):
            return
        self.poison(file, 0, _LAST)
        self.cache.remove(file, 0, _LAST)
        file.dirty.clear()
        self.precache.flush_object(file)

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
        keep = boundary if size & (PAGE_SIZE - 1) else boundary - 1  # the last page with a byte of the file
        self.cache.remove(file, keep + 1, _LAST)
        file.dirty = {index for index in file.dirty if index <= keep}
        if self.precache.pool is not None and self.precache.pool.has_object(file.oid):
            old_last = max(0, max(file.size, size) - 1) >> PAGE_SHIFT
            if old_last - boundary > 4096:
                self.precache.flush_object(file)
            else:
                self.precache.flush(file, boundary, old_last)
        frame = file.pages.get(boundary)
        if frame is not None:
            start = size & (PAGE_SIZE - 1)
            self.cache.page(frame)[start:] = bytes(PAGE_SIZE - start)
            self.cache.ref[frame] = USED
        file.size = size


_LAST = 1 << 52  # beyond the last page of any file
