"""Read the backing into the cache, and find the true end of files.

st_size may be wrong: virtual filesystems such as procfs create the content when it is read. So a short read is the end
of the file whatever st_size says, and a file of size 0 is read once to find its end.
"""

from __future__ import annotations

import os

import trio

from tmem.arena import PAGE_SHIFT, PAGE_SIZE
from tmemfs.backing import Backing
from tmemfs.cache.file import File, Fill
from tmemfs.cache.memory import Memory
from tmemfs.inodes.inodes import InodeTable
from tmemfs.io.files import OpenFile
from tmemfs.io.readahead import MIN_PAGES

_SIZE_UNKNOWN = 1 << 62  # the size of a file whose end was not reached yet


class Filler:
    """The reads of one guest's backing."""

    def __init__(self, memory: Memory, backing: Backing, inodes: InodeTable) -> None:
        self._memory = memory
        self._backing = backing
        self._inodes = inodes

    async def run(self, file: OpenFile, fill: Fill, *, size: int | None = None) -> None:
        """Read the pages of a fill (`size` bytes, or up to the file's end) and wake all requests that wait for it."""
        inode, content = file.inode, file.inode.file
        fill.hollow = content.has_dirty
        start = fill.first << PAGE_SHIFT
        if size is None:
            size = max(1, min((fill.last - fill.first + 1) << PAGE_SHIFT, content.size - start))
        recorded = content.change_seq
        started = trio.current_time()
        if started < content.settles_at:
            content.provisional = True
        try:
            with file.borrowed() as fd:
                data = fill.data = await self._backing.read(inode, fd, start, size)
            bypass = bool(data) and fill.ahead and not fill.poisoned
            bypass = bypass and self._memory.should_bypass(content, fill.first, fill.last, started)
            fill.finish(data, bypass=bypass)
            if len(data) < size and not (fill.poisoned or fill.hollow or _is_overtaken(content, recorded)):
                inode.set_true_size(min(content.size or size, start + len(data)))
        except OSError as error:
            fill.error = error
        finally:
            fill.abandon()
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
        self._inodes.merge_stat(inode, st, started)

    async def find_end(self, file: OpenFile) -> None:
        """Read the start of a file of size 0: it may have content even so."""
        inode, content = file.inode, file.inode.file
        while not content.size and content.true_size is None:
            joined = content.fill_of(0)
            if joined is not None:
                await joined.done.wait()
                continue
            fill = content.begin_fill(0, MIN_PAGES - 1, ahead=False, unread=0)
            recorded = content.change_seq
            await self.run(file, fill, size=MIN_PAGES << PAGE_SHIFT)
            if fill.error is not None:
                raise fill.error
            assert fill.data is not None
            pages = (len(fill.data) + PAGE_SIZE - 1) >> PAGE_SHIFT
            self._backing.pages += pages
            self._backing.readahead_pages += pages
            if fill.poisoned or fill.hollow or _is_overtaken(content, recorded):
                return  # it is being written: the write, or the next read, updates the size
            if content.true_size is None:
                inode.set_true_size(_SIZE_UNKNOWN)


def _is_overtaken(content: File, recorded: int) -> bool:
    """Return whether a file is being changed by us, or was since tick `recorded`."""
    return content.has_dirty or bool(content.own_changes) or content.change_seq != recorded
