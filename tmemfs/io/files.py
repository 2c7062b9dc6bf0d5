"""The open files: each has a descriptor of the backing, which is closed after the last call that uses it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import trio

from tmemfs.inodes.inode import Inode
from tmemfs.io.readahead import Readahead


class OpenFile:
    """One open of a file, with its read-ahead state."""

    __slots__ = (
        "append_to_eof",
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

    def __init__(self, number: int, inode: Inode, fd: int, flags: int, uid: int, readahead_pages: int) -> None:
        self.number = number
        self.inode = inode
        self.fd = fd
        self.readable = flags & os.O_ACCMODE != os.O_WRONLY
        self.writable = flags & os.O_ACCMODE != os.O_RDONLY
        # O_APPEND: the backing appends, so the offset that the kernel sends does not count.
        self.append_to_eof = bool(flags & os.O_APPEND)
        self.sync = bool(flags & os.O_DSYNC)  # O_SYNC includes this bit
        self.strips_privileges = uid != 0  # a write clears set-user-ID and set-group-ID
        self.stream = Readahead(readahead_pages)
        self.errors_known = inode.errors.told  # write-back errors up to this number need no report
        self.users = 0
        self.closing = False

    def acquire(self) -> None:
        """Keep the descriptor open: its number must not be reused while a call uses it."""
        self.users += 1

    def release(self) -> None:
        """End one use. The last one closes the descriptor if the file is closing."""
        self.users -= 1
        if self.closing and not self.users:
            # In a thread, without waiting: close(2) can hang on a network filesystem.
            trio.lowlevel.start_thread_soon(partial(os.close, self.fd), lambda outcome: None)

    @contextmanager
    def borrowed(self) -> Iterator[int]:
        """Keep the descriptor open within the block."""
        self.acquire()
        try:
            yield self.fd
        finally:
            self.release()


class OpenFiles:
    """All open files by handle number."""

    def __init__(self, readahead_pages: int) -> None:
        self.by_number: dict[int, OpenFile] = {}
        self._last_number = 1
        self.readahead_pages = readahead_pages

    def add(self, inode: Inode, fd: int, flags: int, uid: int) -> OpenFile:
        """Register a descriptor as an open file of an inode. `uid` is the caller's."""
        file = OpenFile(self.new_number(), inode, fd, flags, uid, self.readahead_pages)
        self.by_number[file.number] = file
        inode.opens += 1
        inode.open_descriptors.append(fd)
        if file.readable:
            inode.readable_opens += 1
        return file

    def new_number(self) -> int:
        """Return a handle number that was never used."""
        self._last_number += 1
        return self._last_number

    def remove(self, number: int) -> OpenFile:
        """Forget an open file. Its last user closes the descriptor; without users, the caller has to."""
        file = self.by_number.pop(number)
        file.inode.opens -= 1
        file.inode.open_descriptors.remove(file.fd)
        file.closing = True
        return file
