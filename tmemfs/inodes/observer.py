"""Define who is told about events of the inode table: the parts above it that have to follow."""

from __future__ import annotations

from tmemfs.inodes.inode import Inode


class InodeObserver:
    """An observer that does nothing. `watches_directories` says whether `before_lookup` has to be awaited."""

    watches_directories = False

    def invalidate(self, inode: Inode) -> None:
        """Drop what the kernel holds of a file that others changed."""

    def orphaned(self, inode: Inode) -> None:
        """Release what is held for an inode that has neither a name nor an open file left."""

    def evicted(self, directory: Inode) -> None:
        """Stop watching a directory that left the table."""

    async def before_lookup(self, directory: Inode) -> None:
        """Start to watch a directory before the kernel learns of a name in it."""

    def name_removed(self, directory: Inode, name: bytes) -> None:
        """Note that this mount removed a name."""
