"""Take in that a file loses a name: hold on to it before, and find out after whether it has another.

Without its last name a file cannot be opened again, but whoever has it open goes on to use it.
"""

from __future__ import annotations

import contextlib
import os
import stat
from typing import NamedTuple

from tmemfs.inodes.descriptors import PATH_FLAGS, Descriptors, stat_or_close
from tmemfs.inodes.inode import Inode
from tmemfs.inodes.inodes import InodeTable


class Removed(NamedTuple):
    """A name that is about to go, or went: its inode if that is known, a descriptor of it, and the stat before."""

    inode: Inode
    fd: int
    before: os.stat_result


class Removals:
    """The names of one guest that go."""

    def __init__(self, inodes: InodeTable, descriptors: Descriptors) -> None:
        self._inodes = inodes
        self._descriptors = descriptors

    def going(self, name: bytes, dir_fd: int, involved: set[Inode]) -> Removed | None:
        """Hold on to what a name leads to, if the kernel knows it: without its last name it cannot be opened again.

        It becomes `involved` before its stat is taken.
        """
        try:
            fd = os.open(name, PATH_FLAGS, dir_fd=dir_fd)
        except FileNotFoundError:
            return None
        inode = self._inodes.find(stat_or_close(fd))
        if inode is None:
            os.close(fd)
            return None
        involved.add(inode)
        return Removed(inode, fd, stat_or_close(fd))

    def stat_after(self, gone: Removed, parent: Inode, name: bytes) -> os.stat_result:
        """Return the stat of a node that has just lost a name.

        Filesystems that know files by name alone (sshfs, NFS) have none for a file that lost its last one. The name is
        gone all the same, and the caller must not be told that it never was there. And those that have a node for each
        name count links wrongly: whether none is left, other names that are known say better.
        """
        try:
            st = os.fstat(gone.fd)
        except OSError:
            st = _without_link(gone.before)
        if st.st_nlink == 0:
            for other in tuple(gone.inode.locations):
                if other != (parent, name):
                    with contextlib.suppress(OSError), self._descriptors.use(other[0]) as dir_fd:
                        found = os.stat(other[1], dir_fd=dir_fd, follow_symlinks=False)
                        if (found.st_dev, found.st_ino) == gone.inode.key:
                            return found
        return st

    def settle(self, gone: Removed, after: os.stat_result, parent: Inode, name: bytes, started: int) -> None:
        """Take in that a known inode lost a name."""
        inode = gone.inode
        survivors = 0 if stat.S_ISDIR(gone.before.st_mode) else after.st_nlink
        self._inodes.observe(inode, gone.before, started)
        inode.remove_location(parent, name)
        self._inodes.record(inode, after, started)
        self._inodes.record_unlink(inode, survivors)
        if survivors == 0 and (inode.lookups or inode.opens):
            self._descriptors.pin(inode, gone.fd)
        else:
            self._descriptors.closer.close(gone.fd)


def _without_link(before: os.stat_result) -> os.stat_result:
    """Return the stat of a node with one link less."""
    fields = list(before)
    fields[stat.ST_NLINK] = max(0, before.st_nlink - 1)
    times = {name: getattr(before, name) for name in ("st_atime_ns", "st_mtime_ns", "st_ctime_ns")}
    others = {name: getattr(before, name) for name in ("st_blksize", "st_blocks", "st_rdev")}
    return os.stat_result(fields, times | others)
