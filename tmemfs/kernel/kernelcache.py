"""Tell the kernel to forget what it holds of a file: attributes at once, mapped pages from a thread.

Files are opened with direct I/O, so the kernel's page cache holds only what was mapped; it stays there after the last
close (measured: all of 256 MiB read through a mapping) until it is invalidated. Invalidating pages can wait for a
dirty page to be written, that is for a WRITE request to this very mount, so it never happens in a handler.

Whenever an inode is invalidated, the kernel ignores the attributes that it is just asking for. So no invalidation of
ours may follow the answer to an open: what comes next is fstat, SEEK_END, or a write with O_APPEND, which all go by
the size that the kernel has. That one is told before the answer where others have changed the file; O_APPEND alone
would not even ask for it.
"""

from __future__ import annotations

import contextlib
import threading

import pyfuse3
import trio

from tmemfs.backing import Backing

POLL = 0.001  # seconds: two invalidations of one inode rarely meet


class KernelCache:
    """What the kernel may hold of this mount's files."""

    def __init__(self, backing: Backing) -> None:
        self._backing = backing
        self._lock = threading.Lock()
        self._pages: set[int] = set()  # inodes whose pages are to be dropped
        self._dropping = 0  # the one whose pages are being dropped
        self._wake = trio.Event()

    def invalidate_attributes(self, number: int) -> None:
        """Drop the cached attributes of an inode; returns at once, and they are gone."""
        with contextlib.suppress(OSError):  # ENOENT: the kernel has forgotten the inode itself
            pyfuse3.invalidate_inode(pyfuse3.InodeT(number), attr_only=True)

    def invalidate_pages(self, number: int) -> None:
        """Have the cached pages of an inode dropped soon."""
        with self._lock:
            self._pages.add(number)
        self._wake.set()

    async def finish_invalidations(self, number: int) -> None:
        """Have no invalidation of an inode under way or waiting: an open, once it is answered, drops pages itself."""
        with self._lock:
            self._pages.discard(number)
        while self._dropping == number:
            await trio.sleep(POLL)

    async def update_size(self, number: int, size: int, last: bytes) -> None:
        """Have the kernel believe in a size if it believes in a smaller one; `last` is the file's last byte."""
        await self._backing.control(_store, number, size - 1, last)

    def invalidate_name(self, number: int, name: bytes) -> None:
        """Drop a name of a directory. In a thread: this waits until the changes of names in there are answered."""
        with contextlib.suppress(OSError):
            pyfuse3.invalidate_entry(pyfuse3.InodeT(number), pyfuse3.FileNameT(name))

    async def run(self) -> None:
        """Drop pages, many inodes in one thread call."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            await self._backing.control(self._drop)

    def _drop(self) -> None:
        while True:
            with self._lock:
                self._dropping = self._pages.pop() if self._pages else 0
            if not self._dropping:
                return
            with contextlib.suppress(OSError):
                pyfuse3.invalidate_inode(pyfuse3.InodeT(self._dropping))


def _store(number: int, offset: int, data: bytes) -> None:
    with contextlib.suppress(OSError):  # ENOENT: the kernel has forgotten the inode itself
        pyfuse3.notify_store(pyfuse3.InodeT(number), offset, data)
