"""Tell the kernel to forget what it holds of a file: attributes at once, mapped pages from a thread.

Files are opened with direct I/O, so the kernel's page cache holds only what was mapped; it stays there after the last
close (measured: all of 256 MiB read through a mapping) until it is invalidated. Invalidating pages can wait for a
dirty page to be written, that is for a WRITE request to this very mount, so it never happens in a handler.
"""

from __future__ import annotations

import contextlib

import pyfuse3
import trio

from tmemfs.backing import Backing


class KernelCache:
    """What the kernel may hold of this mount's files."""

    def __init__(self, backing: Backing) -> None:
        self._backing = backing
        self._pages: set[int] = set()
        self._wake = trio.Event()

    def forget_attributes(self, number: int) -> None:
        """Drop the cached attributes of an inode; returns at once, and they are gone."""
        with contextlib.suppress(OSError):  # ENOENT: the kernel has forgotten the inode itself
            pyfuse3.invalidate_inode(pyfuse3.InodeT(number), attr_only=True)

    def forget_pages(self, number: int) -> None:
        """Have the cached pages of an inode dropped soon."""
        self._pages.add(number)
        self._wake.set()

    def forget_name(self, number: int, name: bytes) -> None:
        """Drop a name of a directory. In a thread: this waits until the changes of names in there are answered."""
        with contextlib.suppress(OSError):
            pyfuse3.invalidate_entry(pyfuse3.InodeT(number), pyfuse3.FileNameT(name))

    async def run(self) -> None:
        """Drop pages, many inodes in one thread call."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            numbers, self._pages = self._pages, set()
            await self._backing.control(_invalidate, numbers)


def _invalidate(numbers: set[int]) -> None:
    for number in numbers:
        with contextlib.suppress(OSError):
            pyfuse3.invalidate_inode(pyfuse3.InodeT(number))
