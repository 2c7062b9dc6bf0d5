"""Delay writes to the backing (`--writeback`).

Dirty pages stay in the cache and are not evicted; at most a quarter of the cache is dirty. They are written back after
MAX_AGE, on fsync and close, before any change of the file's attributes, and when there are too many. Storing and
flushing hold the inode's write lock, so a page does not become dirty again while it is being written.

After a failed write-back the pages stay dirty and are tried again. The error is reported to every open file
(`writeerrors.py`). After a crash, only data that was fsynced is guaranteed.

A page is written back whole. So when a write covers only a part of a page ("partial page"), the rest is read first.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterator

import trio

from tmem.arena import PAGE_SHIFT, PAGE_SIZE
from tmemfs.backing import Backing, write_some
from tmemfs.cache.file import File
from tmemfs.cache.memory import Memory
from tmemfs.inodes.inode import Inode
from tmemfs.inodes.inodes import InodeTable
from tmemfs.io.files import OpenFile

log = logging.getLogger(__name__)

MAX_AGE = 5.0  # seconds that a page stays dirty
MAX_RUN = 256  # pages per write to the backing

Read = Callable[[OpenFile, int, int], Awaitable[object]]


class Writeback:
    """The dirty pages of one guest."""

    def __init__(self, memory: Memory, backing: Backing, inodes: InodeTable, read: Read) -> None:
        self._memory = memory
        self._backing = backing
        self._inodes = inodes
        self._read = read
        self._dirty_since: dict[Inode, float] = {}  # when the oldest dirty page of each file became dirty
        self._files: dict[Inode, OpenFile] = {}  # used for write-back, kept open until the inode is clean
        self._flush_requested = trio.Event()  # flush without waiting for MAX_AGE
        self._untried: set[Inode] = set()  # dirty files that were not tried since `suspend`
        self.suspended = False  # all writes go through
        self._given_up = False  # `finish` does not write back
        self.dirty_mtime_ns: dict[Inode, int] = {}  # the mtime that dirty files show, and get at their write-back

    @property
    def limit(self) -> int:
        """The maximum number of dirty pages."""
        return max(1, self._memory.frames // 4)

    # -- storing -------------------------------------------------------------------------------------------------

    async def store(self, file: OpenFile, offset: int, data: bytes) -> bool:
        """Store bytes in dirty pages (write lock held). Return False if they must be written through instead."""
        inode, content = file.inode, file.inode.file
        first, last = offset >> PAGE_SHIFT, (offset + len(data) - 1) >> PAGE_SHIFT
        if self.suspended or last - first + 1 > self.limit or not _can_write_back(file):
            return False
        await self._revalidate_partial_pages(file, offset, offset + len(data))
        for edge in _missing_partial_pages(content, offset, offset + len(data)):
            start = edge << PAGE_SHIFT
            await self._read(file, start, min(PAGE_SIZE, content.size - start))
        if inode.virtual:
            return False  # its true size is not known, so whole pages cannot be written back
        if not self._fits(last - first + 1):  # after the reads, during which others may have become dirty
            await self._make_room(inode)
        if not self._fits(last - first + 1):
            return False
        cached, pooled = [], {}
        for index in _partial_pages(content, offset, offset + len(data)):
            if content.is_cached(index):
                cached.append(index)
            elif (page := _page_in_pool(content, index)) is not None:
                pooled[index] = page
            else:
                return False  # a full cache may already have evicted a page that was just read
        if not content.make_dirty(first, last, cached):
            return False  # the same, a moment ago
        for index, page in pooled.items():
            content.overwrite(index << PAGE_SHIFT, page)
        self._record_write(file, first, last)
        content.overwrite(offset, data)
        content.size = max(content.size, offset + len(data))
        return True

    def _fits(self, pages: int) -> bool:
        return not self.suspended and self._memory.dirty_pages + pages <= self.limit

    async def _revalidate_partial_pages(self, file: OpenFile, start: int, end: int) -> None:
        """Drop the clean partial pages of a write if others may have changed them."""
        inode, content = file.inode, file.inode.file
        if all(content.is_dirty(index) or not content.has(index) for index in _partial_pages(content, start, end)):
            return
        started = self._inodes.start()
        with file.borrowed() as fd:
            st = await self._backing.meta(os.fstat, fd)
        self._inodes.merge_stat(inode, st, started)
        if content.provisional:
            for index in _partial_pages(content, start, end):
                if not content.is_dirty(index):
                    content.drop(index, index)

    def _record_write(self, file: OpenFile, first: int, last: int) -> None:
        inode = file.inode
        self._dirty_since.setdefault(inode, trio.current_time())
        if inode not in self._files:
            file.acquire()
            self._files[inode] = file
        self.dirty_mtime_ns[inode] = time.time_ns()
        self._inodes.touch(inode)

    async def _make_room(self, inode: Inode) -> None:
        """Write back this inode's pages; without any, request a flush of the others but do not wait: they may hang."""
        if inode.file.has_dirty:
            await self.flush(inode)
        else:
            self._flush_requested.set()

    # -- writing back --------------------------------------------------------------------------------------------

    async def flush(self, inode: Inode) -> OSError | None:
        """Write back the inode's dirty pages (write lock held). Return the error if that failed, and record it."""
        content = inode.file
        if not content.has_dirty:
            self.forget(inode)
            return None
        file, dirty_mtime_ns = self._files[inode], self.dirty_mtime_ns[inode]
        stats: list[os.stat_result] = []  # of just before and just after each call
        started = self._inodes.begin_change(inode)
        try:
            with file.borrowed() as fd:
                for first, last in _runs(content.dirty_pages()):
                    if content.is_dirty(first) and content.is_dirty(last):  # else dropped: no name and no open is left
                        stats += await self._write_run(inode, fd, first, last)
                stats += await self._backing.data(inode, 0, _set_mtime, fd, dirty_mtime_ns)
        except OSError as error:
            if inode.errors.record_failure(error):
                log.warning("%s: write-back failed: %s; it will be tried again", inode.display_path, error.strerror)
            self._dirty_since[inode] = trio.current_time()
            self._untried.discard(inode)
            return error
        finally:
            self._inodes.end_change(inode)
        if self._inodes.changed_since_recorded(inode, *stats[:-1]):
            self._inodes.invalidate(inode)
        self.forget(inode)
        expected, after = content.size, stats[-1]
        self._inodes.record_own_change(inode, after, started)
        if after.st_size < expected:
            self._inodes.mark_virtual(inode)
        if not self._memory.settled:  # a shrink of the cache waited for these pages
            await self._memory.resize(self._memory.capacity)
        return None

    async def _write_run(self, inode: Inode, fd: int, first: int, last: int) -> tuple[os.stat_result, os.stat_result]:
        """Write back a run of pages; return the file's stats of just before and just after."""
        content = inode.file
        data = content.copy_out(first, last)[: max(0, content.size - (first << PAGE_SHIFT))]
        stats = await self._backing.write(inode, len(data), _write_all, fd, data, first << PAGE_SHIFT)
        content.mark_clean(first, last)
        return stats

    def forget(self, inode: Inode) -> None:
        """Forget an inode that has no dirty pages any more, and release its descriptor."""
        inode.errors.record_success()
        self._untried.discard(inode)
        self._dirty_since.pop(inode, None)
        self.dirty_mtime_ns.pop(inode, None)
        file = self._files.pop(inode, None)
        if file is not None:
            file.release()

    async def sync(self, file: OpenFile, *, closing: bool = False) -> None:
        """Write back the file's dirty pages. Raise OSError if that fails, or failed before and was not reported here.

        An error raised at a close is raised again at the next call: the close may be that of a copy of the descriptor,
        in a child process that ignores the result.
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
        """Write back old pages, and all pages when a flush is requested, until cancelled.

        Each file has a task of its own, so one that hangs does not stop the others.
        """
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
        """Write back everything. Return the inodes that are still dirty."""
        async with trio.open_nursery() as nursery:
            for inode in () if self._given_up else self._dirty_since:
                nursery.start_soon(self._flush_alone, inode, set())
        return list(self._dirty_since)

    # -- before an unmount ----------------------------------------------------------------------------------------

    def suspend(self, *, give_up: bool = False) -> None:
        """Write through from now on, and request a flush of everything. `unwritten` yields what is still dirty.

        Once nothing is dirty, no later write can be lost either. `give_up`: `finish` does not try the rest again.
        """
        self.suspended, self._given_up = True, give_up
        self._untried = set(self._dirty_since)
        self._flush_requested.set()

    def resume(self) -> None:
        """Delay writes again."""
        self.suspended = self._given_up = False

    def unwritten(self) -> Iterator[tuple[Inode, OSError | None]]:
        """Yield each dirty file with the error of its last write-back; None if not tried since `suspend`."""
        for inode in self._dirty_since:
            yield inode, None if inode in self._untried else inode.errors.last


def _can_write_back(file: OpenFile) -> bool:
    """Return whether writes may be delayed: needs a readable descriptor, and neither O_SYNC nor O_APPEND."""
    return file.readable and file.writable and not file.sync and not file.append_to_eof


def _partial_pages(content: File, start: int, end: int) -> list[int]:
    """Return the pages that a write of the bytes start..end covers only in part."""
    edges = []
    for index in {start >> PAGE_SHIFT, (end - 1) >> PAGE_SHIFT}:
        base = index << PAGE_SHIFT
        if base < content.size and (start > base or end < min(base + PAGE_SIZE, content.size)):
            edges.append(index)
    return edges


def _missing_partial_pages(content: File, start: int, end: int) -> list[int]:
    """Return the partial pages of a write that are neither in the cache nor in the pool."""
    pages = _partial_pages(content, start, end)
    return [index for index in pages if not (content.is_cached(index) or content.is_pooled(index))]


def _page_in_pool(content: File, index: int) -> bytes | None:
    """Return the bytes of a partial page that the pool has: a read of it would not always bring it into the cache."""
    start = index << PAGE_SHIFT
    page = content.read(start, min(PAGE_SIZE, content.size - start), sequential=True)
    return None if page is None else bytes(page)


def _runs(pages: list[int]) -> Iterator[tuple[int, int]]:
    """Yield runs (first, last) of consecutive page numbers of a sorted list, at most MAX_RUN long."""
    run: tuple[int, int] | None = None
    for index in pages:
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
    """Set the mtime to the time of the last write; not possible if another user owns the file.

    Return the stats of just before and just after.
    """
    before = os.fstat(fd)
    with contextlib.suppress(PermissionError):
        os.utime(fd, ns=(before.st_atime_ns, dirty_mtime_ns))
    return before, os.fstat(fd)
