"""A page cache for a test, with files that are only that to it."""

from __future__ import annotations

from tmemfs.cache.pagecache import PAGE_SIZE, PageCache, PageTable

MIB = 1 << 20


class Owner:
    """A file, as far as the cache is concerned."""

    def __init__(self) -> None:
        self.pages = PageTable()


def make(frames: int, *, queueing: bool = True, limit: int = 4 * MIB) -> PageCache:
    return PageCache(frames * PAGE_SIZE, limit=limit, queueing=queueing)


def content(cache: PageCache, owner: Owner, index: int) -> bytes:
    return bytes(cache.page(owner.pages[index]))


def resize(cache: PageCache, capacity: int) -> None:
    """Do what Precache.resize does, without a pool."""
    cache.set_capacity(capacity)
    while cache.excess and cache.queue_victims(min(64, cache.excess)):
        while (frame := cache.next_victim()) >= 0:
            cache.evict(frame)
    while cache.settle(8):
        pass
