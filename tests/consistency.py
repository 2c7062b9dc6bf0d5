"""Invariants between the parts of a guest; they hold between any two awaits."""

from __future__ import annotations

from tmemfs.cache.pagecache import PageCache
from tmemfs.cache.precache import Precache
from tmemfs.inodes.inodes import InodeTable


def check_content(inodes: InodeTable, cache: PageCache, precache: Precache) -> None:
    """Raise AssertionError if a page is in two places, or dirty in one table and clean in another."""
    resident = 0
    for inode in inodes.all():
        resident += len(inode.pages)
        assert inode.dirty <= inode.pages.keys()
        for index, frame in inode.pages.items():
            assert not precache.holds(inode, index), f"page {index} is in the cache and in the pool"
            assert bool(cache.dirty[frame]) == (index in inode.dirty), f"page {index} is dirty in one table only"
    assert resident <= cache.resident
