"""Stat inodes and names without waiting, where the kernel has them in memory, else with.

Each has two forms that give the same: `cached_*` is for the event loop and raises BlockingIOError instead of waiting
(see Backing.ask). It keeps to SOURCE's own filesystem: what others mounted in there may be on a network.
"""

from __future__ import annotations

import os

from tmemfs import nowait
from tmemfs.inodes.descriptors import Descriptors
from tmemfs.inodes.inode import Inode


class CachedStats:
    """The stats of one guest's inodes and names."""

    def __init__(self, descriptors: Descriptors, root: Inode) -> None:
        self._descriptors = descriptors
        self._device = root.key[0]

    def cached_inode(self, inode: Inode) -> os.stat_result:
        """Return the stat of an inode, by its descriptor if that is open, else by a name of its."""
        if inode.key[0] != self._device:
            raise BlockingIOError
        try:
            with self._descriptors.use_open(inode) as fd:
                return os.fstat(fd)
        except BlockingIOError:
            for parent, name in inode.locations:
                st = self.cached_name(parent, name)
                if st is not None and (st.st_dev, st.st_ino) == inode.key:
                    return st
            raise

    def inode(self, inode: Inode) -> os.stat_result:
        """Return the stat of an inode. Raise OSError."""
        return self._descriptors.call(inode, os.fstat)

    def cached_name(self, parent: Inode, name: bytes) -> os.stat_result | None:
        """Return the stat of a name, None where there is none."""
        if parent.key[0] != self._device:
            raise BlockingIOError
        with self._descriptors.use_open(parent) as fd:
            return nowait.stat_name(fd, name)

    def name(self, parent: Inode, name: bytes) -> os.stat_result | None:
        """Return the stat of a name, None where there is none. Raise OSError."""

        def call(dir_fd: int) -> os.stat_result | None:
            try:
                return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
            except FileNotFoundError:
                os.fstat(dir_fd)  # fails where it is the directory that is missing
                return None

        return self._descriptors.call(parent, call)
