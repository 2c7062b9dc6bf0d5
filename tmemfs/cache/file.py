"""What is known of one file's content: its size and version, its pages, its dirty pages, its backing reads in flight.

Everybody outside of this folder reads and changes the pages of a file through the calls of `File`. A change is made in
all places at once: frames, victim queue, pool, fills in flight.

The race that must not be: a reader starts a backing read, a write to those pages completes, the reader then caches
the old bytes. So whoever changes a file poisons the fills that overlap the change; a poisoned fill still answers the
requests that were waiting for it (they were concurrent with the change), but its bytes enter no cache and nobody
joins it any more.

Nothing in here awaits: between two awaits of its users a file does not change.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable
from typing import cast

import trio

from tmemfs.cache.pagecache import PAGE_SHIFT, PAGE_SIZE, USED, Buffer, PageTable
from tmemfs.cache.precache import MANY, Precache

Version = tuple[int, ...]  # of a file's stat: the size first, then what else `--version-by` selects

_OFFSET = PAGE_SIZE - 1
_LAST = 1 << 52  # beyond the last page of any file


class Merge(enum.Enum):
    """What a stat that was merged into a file showed."""

    STALE = enum.auto()  # nothing: a newer one is known, or a change of our own is in progress
    SAME = enum.auto()  # the recorded version
    NEW = enum.auto()  # the first version of this file
    CHANGED = enum.auto()  # another version: others changed the file


class Fill:
    """A backing read in flight for the pages first..last. `File.begin_fill` makes it; `finish` or `abandon` ends it."""

    __slots__ = ("_file", "_poisoned", "ahead", "data", "done", "error", "first", "hollow", "last", "unread")

    def __init__(self, file: File, first: int, last: int, *, ahead: bool, unread: int) -> None:
        self._file: File | None = file  # None: no longer in flight
        self._poisoned = False
        self.first = first
        self.last = last
        self.ahead = ahead  # of a stream: some of it was not asked for yet
        self.unread = unread  # from this page on, nobody had asked for them when the read began
        self.done = trio.Event()
        self.hollow = False  # begun while pages behind it were dirty: what the backing lacks reads as zeros
        self.data: bytearray | None = None
        self.error: OSError | None = None

    @property
    def poisoned(self) -> bool:
        """Whether a change overtook this read: its pages do not enter the cache."""
        return self._poisoned

    def finish(self, data: bytes | bytearray, *, bypass: bool) -> None:
        """Put the pages that were read into the cache, unless poisoned, and take the fill out of flight.

        `bypass`: they are dropped when they are evicted, instead of put into the pool.
        """
        assert self._file is not None
        if data and not self._poisoned:
            self._file._insert(self, data, bypass)
        self.abandon()

    def abandon(self) -> None:
        """Take the fill out of flight, if it still is: the read failed."""
        if self._file is not None:
            self._file._end_fill(self)
            self._file = None


class File:
    """The content of one file, or of another node: these have a size of 0, no version and no pages."""

    __slots__ = (
        "_cache",
        "_dirty",
        "_fills",
        "_precache",
        "_version",
        "change_seq",
        "own_changes",
        "pages",
        "provisional",
        "settles_at",
        "size",
        "stat_seq",
        "true_size",
    )

    def __init__(self, precache: Precache) -> None:
        self._precache = precache
        self._cache = precache.cache
        self.pages = PageTable()  # for the modules of this folder
        self._fills: dict[int, Fill] = {}
        self._dirty: set[int] = set()
        self.size = 0
        self.true_size: int | None = None  # where reads of this version ended, if the stat may be wrong
        self._version: Version | None = None
        self.settles_at = 0.0  # from then on (monotonic), every change changes the version
        self.provisional = False  # pages were read, or changed by us, before that: the next open drops them
        self.stat_seq = 0  # tick of the last stat accepted, or of the last change of our own
        self.change_seq = 0  # tick of the last `record_own_change`
        self.own_changes = 0  # in progress

    # -- version -------------------------------------------------------------------------------------------------

    @property
    def version(self) -> Version | None:
        """The recorded version; None before the first stat."""
        return self._version

    def is_stale(self, started: int) -> bool:
        """Return whether a stat is outdated: a newer one is known, or a change of our own is in progress."""
        return bool(self.own_changes) or started < self.stat_seq

    def matches(self, version: Version) -> bool:
        """Return whether a version is the recorded one; True also when none is recorded."""
        return self._version is None or self._version == version

    def merge_stat(self, version: Version, size: int, started: int) -> Merge:
        """Accept a stat that began at tick `started`, unless it is stale, and drop the clean pages if it differs.

        After NEW and CHANGED the version is recorded, but not settled: the caller sets `settles_at`. The size stays
        while pages are dirty: until they are written back it is ours.
        """
        if self.is_stale(started):
            return Merge.STALE
        self.stat_seq = started
        merge = Merge.SAME
        if self._version is None:
            merge = Merge.NEW
        elif self._version != version:
            merge = Merge.CHANGED
            self.drop_clean()
            self.provisional = False
        if merge is not Merge.SAME:
            self._version, self.true_size, self.settles_at = version, None, math.inf
        if not self._dirty:
            self.size = size if self.true_size is None else self.true_size
        return merge

    def begin_change(self) -> None:
        """Ignore all stats until `end_change`: a change of our own is in progress."""
        self.own_changes += 1

    def end_change(self, seq: int) -> None:
        """End a change of our own at tick `seq`; stats that began before are stale."""
        self.own_changes -= 1
        self.stat_seq = seq

    def record_own_change(self, version: Version | None, seq: int) -> None:
        """Record the version after a change of our own, at tick `seq`; None: keep the recorded one."""
        self.stat_seq = self.change_seq = seq
        if version is not None:
            self._version, self.true_size = version, None
            if not self._dirty and not self.own_changes:  # else it is a change of names, whose stat may be older
                self.size = version[0]

    # -- reading -------------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int, *, sequential: bool) -> memoryview | None:
        """Return bytes that are all in the cache, or of a single page in the pool; None otherwise, uncounted.

        They are valid until the next await. The caller has clipped the range to the size; `sequential` says that the
        read continues a stream.
        """
        first, skip = offset >> PAGE_SHIFT, offset & _OFFSET
        if skip + size > PAGE_SIZE:
            return self._read_pages(first, (offset + size - 1) >> PAGE_SHIFT, skip, size)
        frame = self.pages.get(first)
        if frame is None:
            return self._read_from_pool(first, skip, size)
        cache = self._cache
        cache.ref[frame] = USED
        if not sequential:
            cache.bypassing[frame] = 0  # used apart from the stream that brought it
        cache.hits += 1
        if cache.unread[frame]:
            cache.unread[frame] = 0
            cache.readahead_hits += 1
        start = (frame << PAGE_SHIFT) + skip
        return cache.view[start : start + size]

    def _read_pages(self, first: int, last: int, skip: int, size: int) -> memoryview | None:
        """Return bytes of several pages in the cache; None unless all are there."""
        count, cache = last - first + 1, self._cache
        frames = list(map(self.pages.get, range(first, last + 1)))
        base = frames[0]
        if base is None:
            return None
        if frames == list(range(base, base + count)):
            cache.use_run(base, count)
            cache.hits += count
            start = (base << PAGE_SHIFT) + skip
            return cache.view[start : start + size]
        if None in frames:
            return None
        cache.hits += count
        return cache.join(cast("list[int]", frames))[skip : skip + size]

    def _read_from_pool(self, index: int, skip: int, size: int) -> memoryview | None:
        """Return bytes of one page from the pool, and move it into the cache; None when it is not there.

        Not left to `gather`: that costs 15 µs more, of the 25 that a page in the pool may cost beyond one in the cache.
        """
        if index in self._fills or not self._precache.holds(self, index):
            return None
        page = self._precache.get(self, index)
        if page is None:
            return None  # its checksum was wrong
        self._cache.misses += 1
        self._precache.accept(self, index, page)
        return memoryview(page)[skip : skip + size]

    def gather(self, first: int, last: int, out: bytearray, *, sequential: bool) -> list[tuple[int, int, Fill | None]]:
        """Copy those of the pages first..last that are in memory into `out`, and count hits and misses.

        Return the runs (first, last) of the others, each with the fill to wait for; None: the caller has to read it.
        `sequential` says that the read continues a stream; this cache serves both in the same way.
        """
        cache, precache, pages = self._cache, self._precache, self.pages
        rest: list[tuple[int, int, Fill | None]] = []
        for index in range(first, last + 1):
            start = (index - first) << PAGE_SHIFT
            frame = pages.get(index)
            if frame is not None:
                cache.ref[frame] = USED
                out[start : start + PAGE_SIZE] = cache.page(frame)
                cache.hits += 1
                if cache.unread[frame]:
                    cache.unread[frame] = 0
                    cache.readahead_hits += 1
                continue
            cache.misses += 1
            fill = self._fills.get(index)
            page = precache.get(self, index) if fill is None else None
            if page is not None:
                out[start : start + PAGE_SIZE] = page
                precache.accept(self, index, page)
            elif rest and rest[-1][1:] == (index - 1, fill):
                rest[-1] = (rest[-1][0], index, fill)
            else:
                rest.append((index, index, fill))
        return rest

    def has(self, index: int) -> bool:
        """Return whether a page is in the cache, in flight or in the pool."""
        return index in self.pages or index in self._fills or self._precache.holds(self, index)

    def is_cached(self, index: int) -> bool:
        """Return whether a page is in the cache, its victim queue included."""
        return index in self.pages

    def held_pages(self) -> int:
        """Return the number of pages in memory: in the cache or in the pool."""
        pool = self._precache.pool
        return len(self.pages) + (pool.pages_of(self.pages.oid) if pool is not None else 0)

    def holds(self) -> bool:
        """Return whether any page is in memory or in flight."""
        pool = self._precache.pool
        return bool(self.pages or self._fills) or (pool is not None and pool.has_object(self.pages.oid))

    def mark_read(self, first: int, last: int) -> None:
        """Count pages as asked for: they were read ahead, and a request waited for them."""
        for index in range(first, last + 1):
            frame = self.pages.get(index)
            if frame is not None:
                self._cache.unread[frame] = 0

    # -- fills ---------------------------------------------------------------------------------------------------

    def begin_fill(self, first: int, last: int, *, ahead: bool, unread: int) -> Fill:
        """Register a backing read of pages first..last: later requests for them wait for it.

        `ahead`: some of it was not asked for yet; from page `unread` on, nothing was. Where another fill has a page,
        the new one is poisoned: a change of that page would poison only the other.
        """
        fill = Fill(self, first, last, ahead=ahead, unread=unread)
        for index in range(first, last + 1):
            if self._fills.setdefault(index, fill) is not fill:
                fill._poisoned = True
        self._cache.announce(last - first + 1)
        return fill

    def fill_of(self, index: int) -> Fill | None:
        """Return the fill that a page is in flight with."""
        return self._fills.get(index)

    def _insert(self, fill: Fill, data: Buffer, bypass: bool) -> None:
        """Put the pages of a fill into the cache."""
        self._cache.insert(self, fill.first, data, ahead=fill.ahead, bypassing=bypass, unread=fill.unread)

    def _end_fill(self, fill: Fill) -> None:
        """Take a fill out of flight."""
        self._cache.announce(fill.first - fill.last - 1)
        self._detach(fill)

    def _detach(self, fill: Fill) -> None:
        """Let nobody join a fill any more."""
        for index in range(fill.first, fill.last + 1):
            if self._fills.get(index) is fill:
                del self._fills[index]

    def _poison(self, first: int, last: int) -> None:
        """Keep the fills that overlap pages first..last from entering the cache."""
        if not self._fills:
            return
        for fill in set(self._fills.values()):
            if fill.first <= last and fill.last >= first:
                fill._poisoned = True
                self._detach(fill)

    # -- dropping ------------------------------------------------------------------------------------------------

    def drop(self, first: int, last: int) -> None:
        """Drop pages first..last everywhere, dirty ones too; where they are many, all clean ones."""
        self._poison(first, last)
        self._remove(first, last)
        self._precache.flush(self, first, last)

    def _remove(self, first: int, last: int) -> None:
        """Drop cached pages first..last, dirty ones too; where they are many, all clean ones."""
        self._mark_clean([index for index in self._dirty if first <= index <= last])
        if min(last - first, len(self.pages)) > MANY:
            self.drop_clean()
        else:
            self._cache.remove(self, first, last)

    def drop_clean(self) -> None:
        """Drop all clean pages, in constant time: the file takes a new page table and a new object.

        A put of the old generation that comes late is left out.
        """
        self._poison(0, _LAST)
        old, pool = self.pages, self._precache.pool
        if old or (pool is not None and pool.has_object(old.oid)):
            self.pages = self._cache.split(old, self._dirty)
            self._precache.discards.add(old)

    def forget(self) -> None:
        """Drop everything, dirty pages too: nobody can open the file any more."""
        self._mark_clean(list(self._dirty))
        self.drop_clean()

    def flush_pool(self, first: int, last: int) -> None:
        """Drop pages first..last from the pool; where they are many, all."""
        self._precache.flush(self, first, last)

    # -- changing ------------------------------------------------------------------------------------------------

    def overwrite(self, offset: int, data: bytes | memoryview) -> None:
        """Bring resident pages up to date with bytes that the backing has taken."""
        source, cache, pages = memoryview(data), self._cache, self.pages
        first, last = offset >> PAGE_SHIFT, (offset + len(source) - 1) >> PAGE_SHIFT
        self._poison(first, last)
        self._precache.flush(self, first, last)
        for index in range(first, last + 1):
            frame = pages.get(index)
            if frame is None:
                continue
            start = max(offset, index << PAGE_SHIFT)
            end = min(offset + len(source), (index + 1) << PAGE_SHIFT)
            base = (frame << PAGE_SHIFT) - (index << PAGE_SHIFT)
            cache.view[base + start : base + end] = source[start - offset : end - offset]
            cache.ref[frame] = USED  # an overwritten page leaves the victim queue

    def truncate(self, size: int) -> None:
        """Follow a truncation: no page beyond `size` stays, and the last page ends in zeros."""
        boundary = size >> PAGE_SHIFT
        self._poison(boundary, _LAST)
        old_last = max(0, max(self.size, size) - 1) >> PAGE_SHIFT
        self._precache.flush(self, boundary, old_last)
        beyond = boundary + bool(size & _OFFSET)  # the first page without a byte of the file
        self._remove(beyond, old_last if len(self.pages) > MANY else _LAST)
        frame = self.pages.get(boundary)
        if frame is not None:
            start = size & _OFFSET
            self._cache.page(frame)[start:] = bytes(PAGE_SIZE - start)
            self._cache.ref[frame] = USED
        self.size = size

    # -- dirty pages ---------------------------------------------------------------------------------------------

    @property
    def has_dirty(self) -> bool:
        """Whether any page is dirty."""
        return bool(self._dirty)

    def is_dirty(self, index: int) -> bool:
        """Return whether a page is dirty."""
        return index in self._dirty

    def dirty_pages(self) -> list[int]:
        """Return the numbers of the dirty pages, sorted."""
        return sorted(self._dirty)

    def make_dirty(self, first: int, last: int) -> bool:
        """Make pages first..last resident and dirty. Return False, with nothing changed, if frames run out."""
        missing = [index for index in range(first, last + 1) if index not in self.pages]
        clean = [index for index in range(first, last + 1) if index in self.pages and index not in self._dirty]
        self._mark_dirty(clean)  # before the inserts, which could evict them
        for position, index in enumerate(missing):
            self._precache.flush(self, index, index)
            if not self._cache.insert(self, index, bytes(PAGE_SIZE)):
                for placed in missing[:position]:
                    self.drop(placed, placed)
                self._mark_clean(clean)
                return False
            self._mark_dirty((index,))
        return True

    def mark_clean(self, first: int, last: int) -> None:
        """Mark those of the pages first..last that are dirty as written back."""
        self._mark_clean([index for index in range(first, last + 1) if index in self._dirty])

    def copy_out(self, first: int, last: int) -> bytes:
        """Return the bytes of pages first..last, which are in the cache."""
        return b"".join([self._cache.page(self.pages[index]) for index in range(first, last + 1)])

    def _mark_dirty(self, indexes: Iterable[int]) -> None:
        for index in indexes:
            self._cache.mark_dirty(self.pages[index])
            self._dirty.add(index)

    def _mark_clean(self, indexes: Iterable[int]) -> None:
        for index in indexes:
            self._dirty.discard(index)
            self._cache.mark_clean(self.pages[index])

    def check(self) -> None:
        """Raise AssertionError if a page is in two places, or dirty in one table and clean in another."""
        assert self._dirty <= self.pages.keys()
        for index, frame in self.pages.items():
            assert not self._precache.holds(self, index), f"page {index} is in the cache and in the pool"
            assert bool(self._cache.dirty[frame]) == (index in self._dirty), f"page {index} is dirty in one table only"
