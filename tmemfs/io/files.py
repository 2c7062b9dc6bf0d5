"""Keep the open files: a backing descriptor each, closed when the last call that uses it is done."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import trio

from tmemfs.inodes.inode import Inode
from tmemfs.io.readahead import Readahead


class OpenFile:
    """One open of a file, with its stream of reads."""

    __slots__ = (
        "appends",
        "closing",
        "errors_known",
        "fd",
        "inode",
        "number",
        "readable",
        "stream",
        "strips_privileges",
        "sync",
        "users",
        "writable",
    )

    def __init__(self, number: int, inode: Inode, fd: int, flags: int, readahead_pages: int) -> None:
        self.number = number
        self.inode = inode
        self.fd = fd
        self.readable = flags & os.O_ACCMODE != os.O_WRONLY
        self.writable = flags & os.O_ACCMODE != os.O_RDONLY
        self.appends = bool(flags & os.O_APPEND)  # its writes go to the end that the backing has, whatever their offset
        self.sync = bool(flags & os.O_DSYNC)  # O_SYNC includes its bit
        self.strips_privileges = False  # its writes take set-user-ID and set-group-ID away
        self.stream = Readahead(readahead_pages)
        self.errors_known = inode.errors.told  # of those of write-backs
        self.users = 0
        self.closing = False

    def acquire(self) -> None:
        """Keep the descriptor open: its number must not be given to another file while it is in use."""
        self.users += 1

    def release(self) -> None:
        """End one use; the last one of a closing file closes the descriptor."""
        self.users -= 1
        if self.closing and not self.users:
            # In a thread, with nobody to wait for it: on a network filesystem close(2) can hang.
            trio.lowlevel.start_thread_soon(partial(os.close, self.fd), lambda outcome: None)

    @contextmanager
    def borrowed(self) -> Iterator[int]:
        """Keep the descriptor open for the block."""
        self.acquire()
        try:
            yield self.fd
        finally:
            self.release()


class OpenFiles:
    """All open files by handle number."""

    def __init__(self, readahead_pages: int) -> None:
        self.by_number: dict[int, OpenFile] = {}
        self._next = 1
        self.readahead_pages = readahead_pages

    def add(self, inode: Inode, fd: int, flags: int, uid: int) -> OpenFile:
        """Register a descriptor as a user's open file of an inode."""
        file = OpenFile(self.new_number(), inode, fd, flags, self.readahead_pages)
        file.strips_privileges = uid != 0
        self.by_number[file.number] = file
        inode.opens += 1
        inode.open_descriptors.append(fd)
        if file.readable:
            inode.readable_opens += 1
        return file

    def new_number(self) -> int:
        """Return a handle number that is in use nowhere."""
        self._next += 1
        return self._next

    def remove(self, number: int) -> OpenFile:
        """Forget an open file; its last user closes the descriptor, or the caller when there is none."""
        file = self.by_number.pop(number)
        file.inode.opens -= 1
        file.inode.open_descriptors.remove(file.fd)
        file.closing = True
        return file
