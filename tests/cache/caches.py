"""The page cache as its tests see it: pages of files by number, without frames and marks.

Each implementation has a `CacheUnderTest` of its own. Beside it, the suite uses counters and methods without frames.
"""

from __future__ import annotations

from tests.oracle.pagecache import FREE, IDLE, PAGE_SIZE, QUEUED, USED, PageCache, PageTable

MIB = 1 << 20


class File:
    """A file, as far as the cache needs one."""

    def __init__(self) -> None:
        self.pages = PageTable()


class CacheUnderTest:
    """A page cache of so many frames."""

    def __init__(self, capacity: int, *, queueing: bool = True, limit: int = 4 * MIB) -> None:
        self.victim_calls = 0
        self.cache = PageCache(capacity, limit=limit, on_victims=self._count_victims if queueing else None)
        self.files: list[File] = []
        self._discarded: list[PageTable] = []

    def _count_victims(self) -> None:
        self.victim_calls += 1

    def new_file(self) -> File:
        self.files.append(File())
        return self.files[-1]

    # -- pages ---------------------------------------------------------------------------------------------------

    def insert(
        self,
        file: File,
        first: int,
        data: bytes,
        *,
        bypassing: bool = False,
        ahead: bool = False,
        pool_bit: bool = False,
    ) -> int:
        """Insert consecutive pages; return how many were stored."""
        return self.cache.insert(file, first, data, pool_bit, ahead=ahead, bypassing=bypassing)

    def pages(self, file: File) -> set[int]:
        """Return the pages of a file that are found, queued ones included."""
        return set(file.pages)

    def page(self, file: File, index: int) -> bytes:
        """Return the bytes of a page, without a hit."""
        assert self.cache.ref[file.pages[index]] != FREE
        return bytes(self.cache.page(file.pages[index]))

    def hit(self, file: File, index: int) -> None:
        """Read a page: it is used, and leaves the victim queue."""
        self.cache.ref[file.pages[index]] = USED

    def forget_use(self, file: File, index: int) -> None:
        """Make a page look unused, so that it is evicted before the others."""
        self.cache.ref[file.pages[index]] = IDLE

    def overwrite(self, file: File, index: int, start: int, data: bytes) -> None:
        """Change bytes of a page."""
        self.cache.page(file.pages[index])[start : start + len(data)] = data
        self.hit(file, index)

    def remove(self, file: File, first: int, last: int) -> None:
        """Drop pages first..last, dirty ones too."""
        self.cache.remove(file, first, last)

    def drop_clean(self, file: File) -> None:
        """Drop all pages but the dirty ones at once; `free_some` frees their frames."""
        old = file.pages
        file.pages = self.cache.split(old, sorted(self.dirty(file)))
        self._discarded.append(old)

    def free_some(self, most: int) -> int:
        """Free up to so many dropped pages of each discarded table; return how many."""
        freed = 0
        for table in self._discarded:
            left = len(table)
            done = self.cache.free_some(table, most)
            assert done == min(most, left) == left - len(table)
            freed += done
        return freed

    def dropped_pages(self) -> int:
        """Return the number of pages that were dropped and are not freed yet."""
        return sum(map(len, self._discarded))

    def has_pool_bit(self, file: File, index: int) -> bool:
        return bool(self.cache.pool_bit[file.pages[index]])

    # -- dirty pages ---------------------------------------------------------------------------------------------

    def mark_dirty(self, file: File, index: int) -> None:
        self.cache.mark_dirty(file.pages[index])

    def mark_clean(self, file: File, index: int) -> None:
        self.cache.mark_clean(file.pages[index])

    def dirty(self, file: File) -> set[int]:
        """Return the dirty pages of a file."""
        return {index for index, frame in file.pages.items() if self.cache.dirty[frame]}

    # -- the victim queue ----------------------------------------------------------------------------------------

    def queued(self, file: File) -> set[int]:
        """Return the pages of a file that are in the victim queue."""
        return {index for index, frame in file.pages.items() if self.cache.ref[frame] == QUEUED}

    def drain(self, count: int = 1 << 30) -> list[tuple[File | None, int, bytes]]:
        """Take up to `count` victims out of the queue and free them; return file (None: dropped), page and bytes."""
        taken: list[tuple[File | None, int, bytes]] = []
        while len(taken) < count and (frame := self.cache.next_victim()) >= 0:
            table, index = self.cache.describe(frame)
            file = None if table.discarded else next(one for one in self.files if one.pages is table)
            taken.append((file, index, bytes(self.cache.page(frame))))
            self.cache.evict(frame)
        return taken

    # -- size ----------------------------------------------------------------------------------------------------

    def settle(self, most: int = 8) -> bool:
        """Go on with a shrink as far as it goes; return whether it has ended."""
        while self.cache.settle(most):
            pass
        return self.cache.settled

    def resize(self, frames: int) -> bool:
        """Change the capacity as `Precache.resize` does, without a pool; return whether that has ended."""
        self.cache.set_capacity(frames * PAGE_SIZE)
        while self.cache.excess and self.cache.queue_victims(min(64, self.cache.excess)):
            self.drain()
        return self.settle()

    def check(self) -> None:
        self.cache.check()

    def close(self) -> None:
        self.cache.check()
        self.cache.close()
