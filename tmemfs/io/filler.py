"""Carry out reads of the backing, and find out where files end.

A short read of the backing is the end of the file whatever its size is said to be, and a file that is said to be empty
is read to find out: the kernel's virtual filesystems make files when they are read.
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

_UNKNOWN = 1 << 62  # the size of a file whose end has not been reached yet


class Filler:
    """The reads of one guest's backing."""

    def __init__(self, content: Content, backing: Backing, inodes: InodeTable) -> None:
        self._content = content
        self._cache = content.cache
        self._precache = content.precache
        self._backing = backing
        self._inodes = inodes

    async def run(self, file: OpenFile, fill: Fill, *, size: int | None = None) -> None:
        """Carry out one backing read, of the file's bytes or of `size`, and tell everybody who waits for it."""
        inode = file.inode
        fill.hollow = bool(inode.dirty)
        for index in range(fill.first, fill.last + 1):
            if inode.fills.setdefault(index, fill) is not fill:
                # Another fill began on this page while our request waited for something else. A change of the page
                # would poison that one and never see this one, so this one only answers its own request.
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
        """Ask the backing where the file ends, unless that was asked within the attribute time-out."""
        inode = file.inode
        if not force and trio.current_time() < inode.attr_until:
            return
        started = self._inodes.start()
        with file.borrowed() as fd:
            if inode.key[0] == self._inodes.root.key[0]:  # where it is local, the stat comes from memory
                st = await self._backing.ask(os.fstat, os.fstat, fd)
            else:
                st = await self._backing.meta(os.fstat, fd)
        self._inodes.observe(inode, st, started)

    async def find_end(self, file: OpenFile) -> None:
        """Read the start of a file that has no size: it may have content all the same."""
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
                return  # it is being written: what it has is known by now, or by the next read
            if inode.true_size is None:
                inode.set_true_size(_UNKNOWN)


def _is_overtaken(inode: Inode, recorded: int) -> bool:
    """Tell whether we have changed a file, or are doing so, since its last change was that of tick `recorded`."""
    return bool(inode.dirty or inode.writers) or inode.recorded_at != recorded
