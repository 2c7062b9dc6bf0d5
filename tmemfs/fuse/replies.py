"""Build the structures that pyfuse3 sends to the kernel."""

from __future__ import annotations

import os
import stat

import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo, StatvfsData

from tmemfs.fuse.virtualfiles import VirtualNode
from tmemfs.inodes.inode import Inode
from tmemfs.io.writeback import Writeback


class ReplyBuilder:
    """Builds entries: attributes, and for how long the kernel may cache them."""

    def __init__(self, writeback: Writeback | None, *, attr_timeout: float, negative_timeout: float) -> None:
        self._writeback = writeback
        self._attr_timeout = attr_timeout
        self._negative_timeout = negative_timeout

    def entry(self, inode: Inode, st: os.stat_result | None = None) -> EntryAttributes:
        """Return the entry of an inode, with the attributes `st` if the inode has none cached."""
        known = inode.attr or st
        assert known is not None
        entry = _attributes(known, inode.number)
        entry.generation = inode.generation
        entry.entry_timeout = entry.attr_timeout = self._attr_timeout
        # Not `File.has_dirty`: it is already false while the end of a write-back still changes the attributes.
        dirty_mtime_ns = self._writeback.dirty_mtime_ns.get(inode) if self._writeback is not None else None
        if dirty_mtime_ns is not None:
            entry.st_size = inode.file.size
            entry.st_mtime_ns = entry.st_ctime_ns = dirty_mtime_ns
            entry.attr_timeout = 0  # the write-back will change the ctime
        return entry

    def virtual_entry(self, node: VirtualNode) -> EntryAttributes:
        """Return the entry of a virtual node. The kernel does not cache it."""
        entry = _attributes(node.stat(), node.number)
        entry.entry_timeout = entry.attr_timeout = 0
        return entry

    def negative_entry(self) -> EntryAttributes:
        """Return the entry of a name that does not exist. The kernel does not cache it if the time-out is 0."""
        entry = EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(0)
        entry.entry_timeout = self._negative_timeout
        return entry


def direct_io_reply(number: int) -> FileInfo:
    """Return the reply to an open: the kernel does not cache reads, and drops pages of earlier mappings."""
    return FileInfo(fh=pyfuse3.FileHandleT(number), direct_io=True, keep_cache=False)


def statvfs_reply(found: os.statvfs_result) -> StatvfsData:
    """Return the reply to statfs."""
    reply = StatvfsData()
    for field in ("bsize", "frsize", "blocks", "bfree", "bavail", "files", "ffree", "favail", "namemax"):
        setattr(reply, f"f_{field}", getattr(found, f"f_{field}"))
    return reply


def _attributes(st: os.stat_result, number: int) -> EntryAttributes:
    entry = EntryAttributes()
    entry.st_ino = pyfuse3.InodeT(number)
    entry.st_mode = pyfuse3.ModeT(st.st_mode)
    entry.st_nlink = st.st_nlink
    entry.st_uid = st.st_uid
    entry.st_gid = st.st_gid
    entry.st_rdev = st.st_rdev if stat.S_ISCHR(st.st_mode) or stat.S_ISBLK(st.st_mode) else 0
    entry.st_size = st.st_size
    entry.st_blksize = st.st_blksize
    entry.st_blocks = st.st_blocks
    entry.st_atime_ns = st.st_atime_ns
    entry.st_mtime_ns = st.st_mtime_ns
    entry.st_ctime_ns = st.st_ctime_ns
    return entry
