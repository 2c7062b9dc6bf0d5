"""Invalidate what the kernel caches of a file: attributes at once, mapped pages in a thread.

Files are opened with direct I/O, so the kernel's page cache holds only pages that were mapped. They stay there after
the last close (measured: all of 256 MiB read through a mapping) until they are invalidated. Invalidating pages may wait
for a dirty page to be written, that is for a WRITE request to this mount, so it is never done in a request handler.

When an inode is invalidated, the kernel ignores attributes that it is receiving at that moment. So no invalidation may
follow the reply to an open: fstat, SEEK_END and O_APPEND writes come next, and use the size in the kernel. If others
changed the file, the kernel is given the new size before the reply. With O_APPEND alone it would not even ask for it.
"""

from __future__ import annotations

import contextlib
import threading

import pyfuse3
import trio

from tmemcommon.wakeup import Wakeup
from tmemfs.backing import Backing

POLL = 0.001  # seconds between checks; invalidations rarely overlap with an open


class KernelCache:
    """The invalidations of the kernel's caches for one mount."""

    def __init__(self, backing: Backing) -> None:
        self._backing = backing
        self._lock = threading.Lock()
        self._pages: set[int] = set()  # node numbers whose pages wait for invalidation
        self._invalidating = 0  # the node number in progress, or 0
        self._wake = Wakeup()

    def invalidate(self, number: int) -> None:
        """Invalidate the attributes of an inode now, and its pages soon."""
        self.invalidate_attributes(number)
        self.invalidate_pages(number)

    def invalidate_attributes(self, number: int) -> None:
        """Invalidate the attributes of an inode now."""
        with contextlib.suppress(OSError):  # ENOENT: the kernel has forgotten the inode
            pyfuse3.invalidate_inode(pyfuse3.InodeT(number), attr_only=True)

    def invalidate_pages(self, number: int) -> None:
        """Invalidate the pages of an inode soon."""
        with self._lock:
            self._pages.add(number)
        self._wake.set()

    async def finish_invalidations(self, number: int) -> None:
        """Cancel or await the invalidation of an inode before an open is answered; the open drops the pages itself."""
        with self._lock:
            self._pages.discard(number)
        while self._invalidating == number:
            await trio.sleep(POLL)

    async def update_size(self, number: int, size: int, last: bytes) -> None:
        """Raise the size of a file in the kernel, if that is smaller; `last` is the last byte of the file."""
        await self._backing.control(_store, number, size - 1, last)

    def invalidate_name(self, number: int, name: bytes) -> None:
        """Invalidate a name in a directory. Only in a thread: it waits for the replies to changes of names in there."""
        with contextlib.suppress(OSError):
            pyfuse3.invalidate_entry(pyfuse3.InodeT(number), pyfuse3.FileNameT(name))

    async def run(self) -> None:
        """Invalidate pages until cancelled, of many inodes in one thread call."""
        while True:
            await self._wake.wait()
            await self._backing.control(self._invalidate_waiting)

    def _invalidate_waiting(self) -> None:
        while True:
            with self._lock:
                self._invalidating = self._pages.pop() if self._pages else 0
            if not self._invalidating:
                return
            with contextlib.suppress(OSError):
                pyfuse3.invalidate_inode(pyfuse3.InodeT(self._invalidating))


def _store(number: int, offset: int, data: bytes) -> None:
    with contextlib.suppress(OSError):  # ENOENT: the kernel has forgotten the inode
        pyfuse3.notify_store(pyfuse3.InodeT(number), offset, data)
