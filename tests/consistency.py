"""Invariants between the parts of a guest; they hold between any two awaits."""

from __future__ import annotations

from tmemfs.cache.memory import Memory
from tmemfs.inodes.inodes import InodeTable


def check_content(inodes: InodeTable, memory: Memory) -> None:
    """Raise AssertionError if a page is in two places, or dirty in one table and clean in another."""
    held = 0
    for inode in inodes.all():
        inode.file.check()
        held += inode.file.held_pages()
    assert held <= memory.resident + (memory.pool.stats.pages if memory.pool is not None else 0)
