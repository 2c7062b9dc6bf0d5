"""Stat inodes and names, each in two forms with the same result.

`cached_*` is for the event loop: it raises BlockingIOError where it would have to wait (see Backing.ask). It stays on
the filesystem of SOURCE itself, because other mounts below it may be on a network. The other form may block.
"""

from __future__ import annotations

import os

from tmemfs import nowait
from tmemfs.inodes.inode import Inode
from tmemfs.inodes.inodes import InodeTable


class CachedStats:
    """Stats of the inodes and names of one guest."""

    def __init__(self, inodes: InodeTable) -> None:
        self._descriptors = inodes.descriptors
        self._device = inodes.root.key[0]

    def cached_inode(self, inode: Inode) -> os.stat_result:
        """Return the stat of an inode, by its cached descriptor or by one of its names."""
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
        """Return the stat of an inode. OSError when the backing fails."""
        return self._descriptors.call(inode, os.fstat)

    def cached_name(self, parent: Inode, name: bytes) -> os.stat_result | None:
        """Return the stat of a name, None if it does not exist."""
        if parent.key[0] != self._device:
            raise BlockingIOError
        with self._descriptors.use_open(parent) as fd:
            return nowait.stat_name(fd, name)

    def name(self, parent: Inode, name: bytes) -> os.stat_result | None:
        """Return the stat of a name, None if it does not exist. OSError when the backing fails."""

        def call(dir_fd: int) -> os.stat_result | None:
            try:
                return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
            except FileNotFoundError:
                os.fstat(dir_fd)  # raises if the directory itself is missing
                return None

        return self._descriptors.call(parent, call)
