"""Keep dirty pages for a while, for `--writeback`.

Dirty pages stay in their frames (they are not evicted, a quarter of the cache at most), and are written back by age,
on fsync, on close, before any change of the file's attributes, and when they become too many. Store and flush both
run under the inode's write lock, so a page does not become dirty again while it is being written.

A write-back that fails leaves the pages dirty: they are tried again, and the error is owed to every open file
(`writeerrors.py`). After a crash exactly what was fsynced is guaranteed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterator

import trio

from tmemfs.backing import Backing, write_some
from tmemfs.cache.content import Content
from tmemfs.cache.pagecache import PAGE_SHIFT, PAGE_SIZE
from tmemfs.inodes.inode import Inode
from tmemfs.inodes.inodes import InodeTable
from tmemfs.io.files import OpenFile

log = logging.getLogger(__name__)

MAX_AGE = 5.0  # seconds that a page may stay dirty
MAX_RUN = 256  # pages in one backing write

Read = Callable[[OpenFile, int, int], Awaitable[object]]


class Writeback:
    """The dirty pages of one guest."""

    def __init__(self, content: Content, backing: Backing, inodes: InodeTable, read: Read) -> None:
        self._content = content
        self._cache = content.cache
        self._backing = backing
        self._inodes = inodes
        self._read = read
        self._dirty_since: dict[Inode, float] = {}  # when the oldest dirty page became so
        self._files: dict[Inode, OpenFile] = {}  # whose descriptor writes back; kept open until the inode is clean
        self._flush_requested = trio.Event()  # too many pages are dirty, or none may be from now on
        self._untried: set[Inode] = set()  # dirty files that have not been tried since `suspend`
        self.suspended = False
        self._given_up = False  # what is dirty at the end is not written back
        self.dirty_mtime_ns: dict[Inode, int] = {}  # the mtime that a dirty file shows

    @property
    def limit(self) -> int:
        """How many pages may be dirty."""
        return max(1, self._cache.frames // 4)

    # -- storing -------------------------------------------------------------------------------------------------

    async def store(self, file: OpenFile, offset: int, data: bytes) -> bool:
        """Take bytes into dirty pages (write lock held); False when they must be written through."""
        inode = file.inode
        first, last = offset >> PAGE_SHIFT, (offset + len(data) - 1) >> PAGE_SHIFT
        if self.suspended or last - first + 1 > self.limit or not _can_write_back(file):
            return False
        await self._revalidate_partial_pages(file, offset, offset + len(data))
        for edge in self._missing_partial_pages(inode, offset, offset + len(data)):
            start = edge << PAGE_SHIFT
            await self._read(file, start, min(PAGE_SIZE, inode.size - start))
        if inode.virtual:
            return False  # a page would be written back whole
        if not self._fits(last - first + 1):  # asked after the reads: others may have become dirty meanwhile
            await self._make_room(inode)
        if not self._fits(last - first + 1) or self._missing_partial_pages(inode, offset, offset + len(data)):
            return False  # in a cache under pressure a page that was just read may have gone again
        if not self._allocate_frames(inode, first, last):
            return False
        self._record_write(file, first, last)
        self._content.overwrite(inode, offset, data)
        inode.size = max(inode.size, offset + len(data))
        return True

    def _fits(self, pages: int) -> bool:
        return not self.suspended and self._cache.dirty_pages + pages <= self.limit

    async def _revalidate_partial_pages(self, file: OpenFile, start: int, end: int) -> None:
        """Drop clean pages that a write keeps bytes of if others may have changed them: they are written back whole."""
        inode = file.inode
        if not any(self._has_clean_copy(inode, index) for index in _partial_pages(inode, start, end)):
            return
        started = self._inodes.start()
        with file.borrowed() as fd:
            st = await self._backing.meta(os.fstat, fd)
        self._inodes.observe(inode, st, started)
        if inode.provisional:
            for index in _partial_pages(inode, start, end):
                if index not in inode.dirty:
                    self._content.drop(inode, index, index)

    def _has_clean_copy(self, inode: Inode, index: int) -> bool:
        if index in inode.pages:
            return index not in inode.dirty
        return index in inode.fills or self._content.precache.holds(inode, index)

    @staticmethod
    def _missing_partial_pages(inode: Inode, start: int, end: int) -> list[int]:
        """Return the pages that a write of the bytes start..end keeps bytes of and that are not in the cache."""
        return [index for index in _partial_pages(inode, start, end) if index not in inode.pages]

    def _allocate_frames(self, inode: Inode, first: int, last: int) -> bool:
        """Give every page of the range a dirty frame; False, and nothing placed, when there are not enough."""
        fresh = [index for index in range(first, last + 1) if index not in inode.pages]
        soiled = [index for index in range(first, last + 1) if index in inode.pages and index not in inode.dirty]
        self._mark_dirty(inode, soiled)  # before the others are inserted, which could evict them
        for position, index in enumerate(fresh):
            self._content.precache.flush(inode, index, index)
            if not self._cache.insert(inode, index, bytes(PAGE_SIZE)):
                for placed in fresh[:position]:
                    self._content.drop(inode, placed, placed)
                for unchanged in soiled:
                    inode.dirty.discard(unchanged)
                    self._cache.clean(inode.pages[unchanged])
                return False
            self._mark_dirty(inode, [index])
        return True

    def _mark_dirty(self, inode: Inode, pages: list[int]) -> None:
        for index in pages:
            self._cache.soil(inode.pages[index])
        inode.dirty.update(pages)

    def _record_write(self, file: OpenFile, first: int, last: int) -> None:
        inode = file.inode
        self._dirty_since.setdefault(inode, trio.current_time())
        if inode not in self._files:
            file.acquire()
            self._files[inode] = file
        self.dirty_mtime_ns[inode] = time.time_ns()
        self._inodes.touch(inode)

    async def _make_room(self, inode: Inode) -> None:
        """Write back this inode's pages; have those of others written back without waiting for them (they may hang)."""
        if inode.dirty:
            await self.flush(inode)
        else:
            self._flush_requested.set()

    # -- writing back --------------------------------------------------------------------------------------------

    async def flush(self, inode: Inode) -> OSError | None:
        """Write back the inode's dirty pages (write lock held). Return the error if that failed; it is owed, too."""
        if not inode.dirty:
            self.forget(inode)
            return None
        file, dirty_mtime_ns = self._files[inode], self.dirty_mtime_ns[inode]
        stats: list[os.stat_result] = []  # of just before each call and of just after it
        started = self._inodes.start()
        inode.writers += 1
        try:
            with file.borrowed() as fd:
                for first, last in list(_runs(inode.dirty)):
                    if inode.dirty.issuperset((first, last)):  # else forgotten: the last name and user are gone
                        stats += await self._write_run(inode, fd, first, last)
                stats += await self._backing.data(inode, 0, _set_mtime, fd, dirty_mtime_ns)
        except OSError as error:
            if inode.errors.record_failure(error):
                log.warning("%s: write-back failed: %s; it will be tried again", inode.display_path, error.strerror)
            self._dirty_since[inode] = trio.current_time()
            self._untried.discard(inode)
            return error
        finally:
            inode.writers -= 1
            self._inodes.touch(inode)
        if self._inodes.changed_since_recorded(inode, *stats[:-1]):
            self._inodes.invalidate(inode)
        self.forget(inode)
        expected, after = inode.size, stats[-1]
        self._inodes.record(inode, after, started)
        if after.st_size < expected:
            self._inodes.mark_virtual(inode)
        if not self._cache.settled:  # a shrink waited for these pages
            await self._content.precache.resize(self._cache.capacity)
        return None

    async def _write_run(self, inode: Inode, fd: int, first: int, last: int) -> tuple[os.stat_result, os.stat_result]:
        """Write back a run of pages; return the file's stats of just before and just after."""
        cache = self._cache
        data = b"".join([cache.page(inode.pages[index]) for index in range(first, last + 1)])
        data = data[: max(0, inode.size - (first << PAGE_SHIFT))]
        stats = await self._backing.write(inode, len(data), _write_all, fd, data, first << PAGE_SHIFT)
        for index in range(first, last + 1):
            inode.dirty.discard(index)
            frame = inode.pages.get(index)
            if frame is not None:
                cache.clean(frame)
        return stats

    def forget(self, inode: Inode) -> None:
        """Take a clean (or dropped) inode off the books."""
        inode.errors.record_success()
        self._untried.discard(inode)
        self._dirty_since.pop(inode, None)
        self.dirty_mtime_ns.pop(inode, None)
        file = self._files.pop(inode, None)
        if file is not None:
            file.release()

    async def sync(self, file: OpenFile, *, closing: bool = False) -> None:
        """Write back the file's dirty pages. Raise why that failed, or what an earlier write-back owes this open file.

        A close tells and still owes: it may be that of a copy of the descriptor, in a child that does not look.
        """
        inode, errors = file.inode, file.inode.errors
        async with inode.lock():
            failure = await self.flush(inode)
        error = errors.unreported(file.errors_known) or failure
        if not closing:
            file.errors_known = errors.count
        if error is not None:
            raise OSError(error.errno, error.strerror)

    async def run(self) -> None:
        """Write back by age, or at once under pressure; a task a file: one that hangs must not stop the others."""
        busy: set[Inode] = set()
        async with trio.open_nursery() as nursery:
            while True:
                with trio.move_on_after(MAX_AGE / 5):
                    await self._flush_requested.wait()
                old = trio.current_time() - (0 if self._flush_requested.is_set() else MAX_AGE)
                self._flush_requested = trio.Event()
                for inode, since in self._dirty_since.items():
                    if since <= old and inode not in busy:
                        busy.add(inode)
                        nursery.start_soon(self._flush_alone, inode, busy)

    async def _flush_alone(self, inode: Inode, busy: set[Inode]) -> None:
        async with inode.lock():
            await self.flush(inode)
        busy.discard(inode)

    async def finish(self) -> list[Inode]:
        """Write back everything; return the inodes for which that failed, or was given up before."""
        async with trio.open_nursery() as nursery:
            for inode in () if self._given_up else self._dirty_since:
                nursery.start_soon(self._flush_alone, inode, set())
        return list(self._dirty_since)

    # -- before the end ------------------------------------------------------------------------------------------

    def suspend(self, *, give_up: bool = False) -> None:
        """Let no page become dirty from now on, and have everything written back; `unwritten` tells what is left.

        Once nothing is left nothing can be lost, whatever is written until the mount is gone. `give_up`: what is left
        at the end is not tried again.
        """
        self.suspended, self._given_up = True, give_up
        self._untried = set(self._dirty_since)
        self._flush_requested.set()

    def resume(self) -> None:
        """Take dirty pages again."""
        self.suspended = self._given_up = False

    def unwritten(self) -> Iterator[tuple[Inode, OSError | None]]:
        """Tell the dirty files, and why each could not be written back; None as long as it has not been tried."""
        for inode in self._dirty_since:
            yield inode, None if inode in self._untried else inode.errors.last


def _can_write_back(file: OpenFile) -> bool:
    """Tell whether a descriptor can fill pages and write them back; what O_SYNC and O_APPEND ask for needs another."""
    return file.readable and file.writable and not file.sync and not file.append_to_eof


def _partial_pages(inode: Inode, start: int, end: int) -> list[int]:
    """Return the pages that a write of the bytes start..end keeps bytes of."""
    edges = []
    for index in {start >> PAGE_SHIFT, (end - 1) >> PAGE_SHIFT}:
        base = index << PAGE_SHIFT
        if base < inode.size and (start > base or end < min(base + PAGE_SIZE, inode.size)):
            edges.append(index)
    return edges


def _runs(pages: set[int]) -> Iterator[tuple[int, int]]:
    """Group page numbers into runs of neighbours, at most MAX_RUN long."""
    run: tuple[int, int] | None = None
    for index in sorted(pages):
        if run is not None and index == run[1] + 1 and index - run[0] < MAX_RUN:
            run = (run[0], index)
        else:
            if run is not None:
                yield run
            run = (index, index)
    if run is not None:
        yield run


def _write_all(fd: int, data: bytes, offset: int) -> tuple[os.stat_result, os.stat_result]:
    before, done = os.fstat(fd), 0
    with memoryview(data) as view:
        while done < len(data):
            done += write_some(fd, view[done:], offset + done)
    return before, os.fstat(fd)


def _set_mtime(fd: int, dirty_mtime_ns: int) -> tuple[os.stat_result, os.stat_result]:
    """Give the file the time of its last write, not that of its write-back, where we may: it may be another user's.

    Return the stats of just before and just after.
    """
    before = os.fstat(fd)
    with contextlib.suppress(PermissionError):
        os.utime(fd, ns=(before.st_atime_ns, dirty_mtime_ns))
    return before, os.fstat(fd)
