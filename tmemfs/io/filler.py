"""Read the backing into the cache, and find the true end of files.

st_size may be wrong: virtual filesystems such as procfs create the content when it is read. So a short read is the end
of the file whatever st_size says, and a file of size 0 is read once to find its end.
"""

from __future__ import annotations

import os

import trio

from tmemfs.backing import Backing
from tmemfs.cache.content import Content, Fill
from tmemfs.cache.pagecache import PAGE_SHIFT, PAGE_SIZE
from tmemfs.inodes.inode import Inode
from tmemfs.inodes.inodes import InodeTable
from tmemfs.io.files import OpenFile
from tmemfs.io.readahead import MIN_PAGES

_SIZE_UNKNOWN = 1 << 62  # the size of a file whose end was not reached yet


class Filler:
    """The reads of one guest's backing."""

    def __init__(self, content: Content, backing: Backing, inodes: InodeTable) -> None:
        self._content = content
        self._cache = content.cache
        self._precache = content.precache
        self._backing = backing
        self._inodes = inodes

    async def run(self, file: OpenFile, fill: Fill, *, size: int | None = None) -> None:
        """Read the pages of a fill (`size` bytes, or up to the file's end) and wake all requests that wait for it."""
        inode = file.inode
        fill.hollow = bool(inode.dirty)
        for index in range(fill.first, fill.last + 1):
            if inode.fills.setdefault(index, fill) is not fill:
                # Another fill of this page began while our request waited. A change of the page poisons only that
                # one, so our fill must not enter the cache.
                fill.poisoned = True
        start = fill.first << PAGE_SHIFT
        if size is None:
            size = max(1, min((fill.last - fill.first + 1) << PAGE_SHIFT, inode.size - start))
        pages = fill.last - fill.first + 1
        self._cache.announce(pages)
        recorded = inode.recorded_at
        started = trio.current_time()
        if started < inode.settles_at:
            inode.provisional = True
        try:
            with file.borrowed() as fd:
                fill.data = await self._backing.read(inode, fd, start, size)
            if fill.data and not fill.poisoned:
                passing = fill.ahead and self._precache.passes(inode, fill.first, fill.last, started)
                ahead, unread = fill.ahead, fill.unread
                self._cache.insert(inode, fill.first, fill.data, ahead=ahead, passing=passing, unread=unread)
            if len(fill.data) < size and not (fill.poisoned or fill.hollow or _is_overtaken(inode, recorded)):
                inode.set_true_size(min(inode.size or size, start + len(fill.data)))
        except OSError as error:
            fill.error = error
        finally:
            self._cache.announce(-pages)
            self._content.detach(inode, fill)
            fill.done.set()

    async def revalidate_size(self, file: OpenFile, *, force: bool = False) -> None:
        """Update the file's size from the backing, unless its attributes are still valid. `force`: in any case."""
        inode = file.inode
        if not force and trio.current_time() < inode.attr_until:
            return
        started = self._inodes.start()
        with file.borrowed() as fd:
            if inode.key[0] == self._inodes.root.key[0]:  # a local backing answers from memory
                st = await self._backing.ask(os.fstat, os.fstat, fd)
            else:
                st = await self._backing.meta(os.fstat, fd)
        self._inodes.observe(inode, st, started)

    async def find_end(self, file: OpenFile) -> None:
        """Read the start of a file of size 0: it may have content even so."""
        inode = file.inode
        while not inode.size and inode.true_size is None:
            joined = inode.fills.get(0)
            if joined is not None:
                await joined.done.wait()
                continue
            fill = Fill(0, MIN_PAGES - 1, ahead=False, unread=0)
            recorded = inode.recorded_at
            await self.run(file, fill, size=MIN_PAGES << PAGE_SHIFT)
            if fill.error is not None:
                raise fill.error
            assert fill.data is not None
            pages = (len(fill.data) + PAGE_SIZE - 1) >> PAGE_SHIFT
            self._backing.pages += pages
            self._backing.readahead_pages += pages
            if fill.poisoned or fill.hollow or _is_overtaken(inode, recorded):
                return  # it is being written: the write, or the next read, updates the size
            if inode.true_size is None:
                inode.set_true_size(_SIZE_UNKNOWN)


def _is_overtaken(inode: Inode, recorded: int) -> bool:
    """Return whether a file is being changed by us, or was since tick `recorded`."""
    return bool(inode.dirty or inode.writers) or inode.recorded_at != recorded
