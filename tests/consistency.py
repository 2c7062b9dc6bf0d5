"""Invariants between the parts of a guest; they hold between any two awaits."""

from __future__ import annotations

from tmemfs.cache.memory import Memory
from tmemfs.inodes.inodes import InodeTable


def check_content(inodes: InodeTable, memory: Memory) -> None:
    """Raise AssertionError if files hold more pages than there are."""
    # First: pages may leave memory meanwhile.
    most = memory.resident + memory.pool.stats.pages
    assert sum(inode.file.held_pages() for inode in inodes.all()) <= most
