"""Put what the parts know into the structures that pyfuse3 sends."""

from __future__ import annotations

import os
import stat

import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo, StatvfsData

from tmemfs.fuse.virtualfiles import VirtualNode
from tmemfs.inodes.inode import Inode
from tmemfs.io.writeback import Writeback


class ReplyBuilder:
    """Describe inodes and virtual nodes to the kernel, and say how long it may believe it."""

    def __init__(self, writeback: Writeback | None, *, attr_timeout: float, negative_timeout: float) -> None:
        self._writeback = writeback
        self._attr_timeout = attr_timeout
        self._negative_timeout = negative_timeout

    def entry(self, inode: Inode, st: os.stat_result | None = None) -> EntryAttributes:
        """Describe an inode; `st` where the inode's own attributes are not known."""
        known = inode.attr or st
        assert known is not None
        entry = _attributes(known, inode.number)
        entry.generation = inode.generation
        entry.entry_timeout = entry.attr_timeout = self._attr_timeout
        # Not `inode.dirty`: that is empty before a write-back ends, and until then the attributes are those of before.
        dirty_mtime_ns = self._writeback.dirty_mtime_ns.get(inode) if self._writeback is not None else None
        if dirty_mtime_ns is not None:
            entry.st_size = inode.size
            entry.st_mtime_ns = entry.st_ctime_ns = dirty_mtime_ns
            entry.attr_timeout = 0  # the write-back changes the ctime: whoever wants to know has to ask
        return entry

    def virtual_entry(self, node: VirtualNode) -> EntryAttributes:
        """Describe a virtual node. The kernel has to ask for it each time."""
        entry = _attributes(node.stat(), node.number)
        entry.entry_timeout = entry.attr_timeout = 0
        return entry

    def negative_entry(self) -> EntryAttributes:
        """Say that there is no such name, and how long that may be believed: not at all, if the time-out is 0."""
        entry = EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(0)
        entry.entry_timeout = self._negative_timeout
        return entry


def direct_io_reply(number: int) -> FileInfo:
    """Describe an open file: its reads come here, and nothing that was mapped earlier is kept."""
    return FileInfo(fh=pyfuse3.FileHandleT(number), direct_io=True, keep_cache=False)


def statvfs_reply(found: os.statvfs_result) -> StatvfsData:
    """Describe the backing's size and free space."""
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
