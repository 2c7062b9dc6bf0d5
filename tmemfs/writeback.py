"""Keep dirty pages for a while, for `--writeback`.

Dirty pages stay in their frames (they are not evicted, a quarter of the cache at most), and are written back by age,
on fsync, on close, before any change of the file's attributes, and when they become too many. Store and flush both
run under the inode's write lock, so a page does not become dirty again while it is being written.

A write-back that fails leaves the pages dirty: they are tried again, and the error is owed to the next fsync or
close, as a kernel filesystem does. After a crash exactly what was fsynced is guaranteed.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterator

import trio

from tmemfs.backing import Backing
from tmemfs.content import Content
from tmemfs.files import OpenFile
from tmemfs.inodes import Inode, InodeTable
from tmemfs.pagecache import PAGE_SHIFT, PAGE_SIZE

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
        self._since: dict[Inode, float] = {}  # when the oldest dirty page became so
        self._file: dict[Inode, OpenFile] = {}  # whose descriptor writes back; kept open until the inode is clean
        self.touched_ns: dict[Inode, int] = {}  # the mtime that a dirty file shows

    @property
    def limit(self) -> int:
        """How many pages may be dirty."""
        return max(1, self._cache.frames // 4)

    # -- storing -------------------------------------------------------------------------------------------------

    async def store(self, file: OpenFile, offset: int, data: bytes) -> bool:
        """Take bytes into dirty pages (write lock held); False when they must be written through."""
        inode = file.inode
        first, last = offset >> PAGE_SHIFT, (offset + len(data) - 1) >> PAGE_SHIFT
        if not (file.readable and file.writable) or last - first + 1 > self.limit:
            return False
        if self._cache.dirty_pages + last - first + 1 > self.limit:
            await self._make_room(inode)
            if self._cache.dirty_pages + last - first + 1 > self.limit:
                return False
        edges = [edge for edge in {first, last} if self._is_partial(inode, edge, offset, offset + len(data))]
        for edge in edges:
            if edge not in inode.pages:
                start = edge << PAGE_SHIFT
                await self._read(file, start, min(PAGE_SIZE, inode.size - start))
        if any(edge not in inode.pages for edge in edges):
            return False  # in a cache under pressure a page that was just read may have gone again
        if not self._place(inode, first, last):
            return False
        self._mark(file, first, last)
        self._content.overwrite(inode, offset, data)
        inode.size = max(inode.size, offset + len(data))
        if file.sync:
            await self.flush(inode)
            self.raise_owed(inode)
        return True

    @staticmethod
    def _is_partial(inode: Inode, index: int, start: int, end: int) -> bool:
        """Tell whether a write of the bytes start..end leaves bytes of a page that the file has."""
        base = index << PAGE_SHIFT
        return base < inode.size and (start > base or end < min(base + PAGE_SIZE, inode.size))

    def _place(self, inode: Inode, first: int, last: int) -> bool:
        """Give every page of the range a dirty frame; False, and nothing placed, when there are not enough."""
        fresh: list[int] = []
        for index in range(first, last + 1):
            if index not in inode.pages:
                self._content.precache.flush(inode, index, index)
                if not self._cache.insert(inode, index, bytes(PAGE_SIZE)):
                    for placed in fresh:
                        self._content.drop(inode, placed, placed)
                    return False
                fresh.append(index)
            self._cache.soil(inode.pages[index])
            inode.dirty.add(index)
        return True

    def _mark(self, file: OpenFile, first: int, last: int) -> None:
        inode = file.inode
        self._since.setdefault(inode, trio.current_time())
        if inode not in self._file:
            file.acquire()
            self._file[inode] = file
        self.touched_ns[inode] = time.time_ns()
        self._inodes.touch(inode)

    async def _make_room(self, inode: Inode) -> None:
        """Write back this inode's pages, or those of the file that was dirty first."""
        if inode.dirty:
            await self.flush(inode)
            return
        for other in list(self._since):
            try:
                other.lock().acquire_nowait()  # never wait for a second lock while holding one
            except trio.WouldBlock:
                continue
            try:
                await self.flush(other)
            finally:
                other.lock().release()
            return

    # -- writing back --------------------------------------------------------------------------------------------

    async def flush(self, inode: Inode) -> None:
        """Write back the inode's dirty pages (write lock held). A failure is kept, and raised by `raise_owed`."""
        if not inode.dirty:
            self.forget(inode)
            return
        file = self._file[inode]
        inode.writers += 1
        try:
            for first, last in list(_runs(inode.dirty)):
                await self._write_run(file, first, last)
            with file.borrowed() as fd:
                after = await self._backing.data(inode, 0, _finish, fd, self.touched_ns[inode])
        except OSError as error:
            log.warning("write-back of inode %d failed: %s; it will be tried again", inode.number, error.strerror)
            inode.error = error
            self._since[inode] = trio.current_time()
            return
        finally:
            inode.writers -= 1
            self._inodes.touch(inode)
        self.forget(inode)
        self._inodes.record(inode, after)

    async def _write_run(self, file: OpenFile, first: int, last: int) -> None:
        inode, cache = file.inode, self._cache
        data = b"".join([cache.page(inode.pages[index]) for index in range(first, last + 1)])
        data = data[: max(0, inode.size - (first << PAGE_SHIFT))]
        with file.borrowed() as fd:
            await self._backing.write(inode, len(data), _write_all, fd, data, first << PAGE_SHIFT)
        for index in range(first, last + 1):
            inode.dirty.discard(index)
            frame = inode.pages.get(index)
            if frame is not None:
                cache.clean(frame)

    def forget(self, inode: Inode) -> None:
        """Take a clean (or dropped) inode off the books."""
        self._since.pop(inode, None)
        self.touched_ns.pop(inode, None)
        file = self._file.pop(inode, None)
        if file is not None:
            file.release()

    def raise_owed(self, inode: Inode) -> None:
        """Raise the error that a write-back left behind, once."""
        error, inode.error = inode.error, None
        if error is not None:
            raise error

    async def run(self) -> None:
        """Write back by age."""
        while True:
            await trio.sleep(MAX_AGE / 5)
            old = trio.current_time() - MAX_AGE
            for inode, since in list(self._since.items()):
                if since <= old:
                    async with inode.lock():
                        await self.flush(inode)

    async def finish(self) -> list[Inode]:
        """Write back everything; return the inodes for which that failed."""
        for inode in list(self._since):
            async with inode.lock():
                await self.flush(inode)
        return list(self._since)


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


def _write_all(fd: int, data: bytes, offset: int) -> None:
    done = 0
    with memoryview(data) as view:
        while done < len(data):
            done += os.pwrite(fd, view[done:], offset + done)


def _finish(fd: int, touched_ns: int) -> os.stat_result:
    """Give the file the time of its last write, not that of its write-back."""
    os.utime(fd, ns=(os.fstat(fd).st_atime_ns, touched_ns))
    return os.fstat(fd)
