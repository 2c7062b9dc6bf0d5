"""The page cache as its tests see it: pages of files by number. Both implementations run the same tests.

The contract: a page that is found has its last bytes; the bound is exact; a dirty page stays; a dropped page is not
found. The order of eviction is not part of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

from tests.oracle.pagecache import FREE, IDLE, PAGE_SIZE, QUEUED, USED, PageCache, PageTable
from tmem import CacheFrames, EmbeddedArena, Tmem
from tmem.engine import lib
from tmemfs.cache.file import File
from tmemfs.cache.memory import Memory

MIB = 1 << 20
LIMIT = 4 * MIB // PAGE_SIZE  # the most frames that a resize may ask for
AnyFile = TypeVar("AnyFile")


class CacheUnderTest(ABC, Generic[AnyFile]):
    """A page cache of so many frames."""

    # -- pages ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def new_file(self) -> AnyFile:
        """Return a file without pages."""

    @abstractmethod
    def insert(self, file: AnyFile, first: int, data: bytes, *, ahead: bool = False, bypass: bool = False) -> None:
        """Insert consecutive pages; those that are found already keep their bytes."""

    @abstractmethod
    def pages(self, file: AnyFile) -> set[int]:
        """Return the pages of a file that are found."""

    @abstractmethod
    def page(self, file: AnyFile, index: int) -> bytes:
        """Return the bytes of a page that is found."""

    @abstractmethod
    def hit(self, file: AnyFile, index: int) -> None:
        """Use a page that is found."""

    @abstractmethod
    def overwrite(self, file: AnyFile, index: int, start: int, data: bytes) -> None:
        """Change bytes of a page, which may be dropped instead unless it is dirty."""

    @abstractmethod
    def remove(self, file: AnyFile, first: int, last: int) -> None:
        """Drop pages first..last, dirty ones too; where they are many, all clean ones."""

    @abstractmethod
    def drop_clean(self, file: AnyFile) -> None:
        """Drop all pages but the dirty ones at once."""

    @abstractmethod
    def free_some(self, most: int) -> bool:
        """Free some of the pages that were dropped; return whether there are more."""

    # -- dirty pages ---------------------------------------------------------------------------------------------

    @abstractmethod
    def mark_dirty(self, file: AnyFile, index: int) -> bool:
        """Make a page dirty that is found; return False if there is no frame for it."""

    @abstractmethod
    def mark_clean(self, file: AnyFile, index: int) -> None:
        """Make a page clean."""

    @abstractmethod
    def dirty(self, file: AnyFile) -> set[int]:
        """Return the dirty pages of a file."""

    # -- eviction and size ---------------------------------------------------------------------------------------

    @abstractmethod
    def evict(self, count: int) -> int:
        """Take up to so many clean pages out of their frames; return how many."""

    @abstractmethod
    def announce(self, pages: int) -> None:
        """Make room ahead of an insertion of so many pages, which does not come."""

    @abstractmethod
    def begin_resize(self, frames: int) -> None:
        """Change the bound; `settle` gives the memory back."""

    @abstractmethod
    def settle(self, most: int = 1000) -> bool:
        """Go on with a shrink as far as it goes, so many frames at a time; return whether it has ended."""

    def resize(self, frames: int) -> bool:
        """Change the bound and what is held; return whether that has ended: not while too many pages are dirty."""
        self.begin_resize(frames)
        return self.settle()

    # -- counters ------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def frames(self) -> int:
        """The bound."""

    @property
    @abstractmethod
    def resident(self) -> int:
        """Pages in frames, dropped ones too until they are freed."""

    @property
    @abstractmethod
    def held(self) -> int:
        """Pages in memory, dropped ones too until they are freed."""

    @property
    @abstractmethod
    def dirty_pages(self) -> int:
        """Pages that are dirty."""

    @property
    @abstractmethod
    def evictions(self) -> int:
        """Pages that have left their frames for others."""

    @abstractmethod
    def check(self) -> None:
        """Fail unless all invariants hold."""

    @abstractmethod
    def close(self) -> None:
        """Free everything."""


class OracleFile:
    """A file, as far as the Python cache needs one."""

    def __init__(self) -> None:
        self.pages = PageTable()


class OracleCache(CacheUnderTest[OracleFile]):
    """The Python cache, with or without a victim queue."""

    def __init__(self, frames: int, *, limit: int = LIMIT, queueing: bool = False) -> None:
        self.victim_calls = 0
        self.cache = PageCache(
            frames * PAGE_SIZE, limit=limit * PAGE_SIZE, on_victims=self._count_victims if queueing else None
        )
        self._files: list[OracleFile] = []
        self._discarded: list[PageTable] = []

    def _count_victims(self) -> None:
        self.victim_calls += 1

    def new_file(self) -> OracleFile:
        self._files.append(OracleFile())
        return self._files[-1]

    def insert(self, file: OracleFile, first: int, data: bytes, *, ahead: bool = False, bypass: bool = False) -> None:
        self.cache.insert(file, first, data, ahead=ahead, bypassing=bypass)

    def pages(self, file: OracleFile) -> set[int]:
        return set(file.pages)

    def page(self, file: OracleFile, index: int) -> bytes:
        assert self.cache.ref[file.pages[index]] != FREE
        return bytes(self.cache.page(file.pages[index]))

    def hit(self, file: OracleFile, index: int) -> None:
        self.cache.ref[file.pages[index]] = USED

    def overwrite(self, file: OracleFile, index: int, start: int, data: bytes) -> None:
        self.cache.page(file.pages[index])[start : start + len(data)] = data
        self.hit(file, index)

    def remove(self, file: OracleFile, first: int, last: int) -> None:
        self.cache.remove(file, first, last)

    def drop_clean(self, file: OracleFile) -> None:
        old = file.pages
        file.pages = self.cache.split(old, sorted(self.dirty(file)))
        self._discarded.append(old)

    def free_some(self, most: int) -> bool:
        for table in self._discarded:
            self.cache.free_some(table, most)
        return any(self._discarded)

    def mark_dirty(self, file: OracleFile, index: int) -> bool:
        self.cache.mark_dirty(file.pages[index])
        return True

    def mark_clean(self, file: OracleFile, index: int) -> None:
        self.cache.mark_clean(file.pages[index])

    def dirty(self, file: OracleFile) -> set[int]:
        return {index for index, frame in file.pages.items() if self.cache.dirty[frame]}

    def evict(self, count: int) -> int:
        before = self.cache.evictions
        self.cache.queue_victims(count)
        self.drain()
        return self.cache.evictions - before

    def announce(self, pages: int) -> None:
        self.cache.announce(pages)
        self.cache.announce(-pages)

    def begin_resize(self, frames: int) -> None:
        self.cache.set_capacity(frames * PAGE_SIZE)

    def settle(self, most: int = 1000) -> bool:
        while self.cache.excess and self.cache.queue_victims(min(64, self.cache.excess)):
            self.drain()
        while self.cache.settle(most):
            pass
        return self.cache.settled

    @property
    def frames(self) -> int:
        return self.cache.frames

    @property
    def resident(self) -> int:
        return self.cache.resident

    @property
    def held(self) -> int:
        return self.cache.resident

    @property
    def dirty_pages(self) -> int:
        return self.cache.dirty_pages

    @property
    def evictions(self) -> int:
        return self.cache.evictions

    def check(self) -> None:
        self.cache.check()

    def close(self) -> None:
        self.cache.close()

    # -- the victim queue, which only this implementation has ----------------------------------------------------

    def forget_use(self, file: OracleFile, index: int) -> None:
        """Make a page look unused, so that it is evicted before the others."""
        self.cache.ref[file.pages[index]] = IDLE

    def queued(self, file: OracleFile) -> set[int]:
        """Return the pages of a file that are in the victim queue."""
        return {index for index, frame in file.pages.items() if self.cache.ref[frame] == QUEUED}

    def drain(self) -> list[tuple[int, bytes]]:
        """Take all victims out of the queue and free them; return number and bytes of each."""
        taken: list[tuple[int, bytes]] = []
        while (frame := self.cache.next_victim()) >= 0:
            taken.append((self.cache.describe(frame)[1], bytes(self.cache.page(frame))))
            self.cache.evict(frame)
        return taken


class EngineCache(CacheUnderTest[File]):
    """The engine without its thread, with or without a pool, in which evicted pages are still found."""

    def __init__(self, frames: int, *, limit: int = LIMIT, pool: int = 0) -> None:
        self._arena = EmbeddedArena(pool) if pool else None
        self._tmem = Tmem(self._arena, lambda: 0.0, cache=CacheFrames(frames, limit, thread=False))
        self._memory = Memory(self._tmem)
        self._engine = self._tmem.engine
        self._end: dict[File, int] = {}  # where the pages of each file end

    def new_file(self) -> File:
        file = self._memory.new_file()
        self._end[file] = 0
        return file

    def insert(self, file: File, first: int, data: bytes, *, ahead: bool = False, bypass: bool = False) -> None:
        last = first + (len(data) - 1) // PAGE_SIZE
        self._end[file] = max(self._end[file], last + 1)
        self._tmem.restock()
        fill = file.begin_fill(first, last, ahead=ahead, unread=first if ahead else last + 1)
        fill.finish(data, bypass=bypass)

    def pages(self, file: File) -> set[int]:
        return set(filter(file.has, range(self._end[file])))

    def page(self, file: File, index: int) -> bytes:
        if file.is_cached(index):
            return file.copy_out(index, index)
        page = bytes(file.read(index * PAGE_SIZE, PAGE_SIZE, sequential=True) or b"")
        lib.tmem_release(self._memory.lease)
        return page

    def hit(self, file: File, index: int) -> None:
        assert file.read(index * PAGE_SIZE, PAGE_SIZE, sequential=False) is not None
        lib.tmem_release(self._memory.lease)

    def overwrite(self, file: File, index: int, start: int, data: bytes) -> None:
        file.overwrite(index * PAGE_SIZE + start, data)

    def remove(self, file: File, first: int, last: int) -> None:
        file.drop(first, last)

    def drop_clean(self, file: File) -> None:
        file.drop_clean()

    def free_some(self, most: int) -> bool:
        return bool(lib.tmem_sweep(self._engine, most))

    def mark_dirty(self, file: File, index: int) -> bool:
        page = self.page(file, index)
        if not file.make_dirty(index, index):
            return False
        file.overwrite(index * PAGE_SIZE, page)  # a page that comes from the pool is zeros
        return True

    def mark_clean(self, file: File, index: int) -> None:
        file.mark_clean(index, index)

    def dirty(self, file: File) -> set[int]:
        return set(file.dirty_pages())

    def evict(self, count: int) -> int:
        return self._memory.evict(count)

    def announce(self, pages: int) -> None:
        fill = self.new_file().begin_fill(0, pages - 1, ahead=False, unread=pages)
        lib.tmem_drain(self._engine, 1 << 20)
        fill.abandon()

    def begin_resize(self, frames: int) -> None:
        lib.tmem_resize(self._engine, frames)

    def settle(self, most: int = 1000) -> bool:
        while (left := lib.tmem_shrink(self._engine, most)) == 1:
            self._tmem.restock()
        return bool(left == 0)

    @property
    def frames(self) -> int:
        return self._memory.frames

    @property
    def resident(self) -> int:
        return self._memory.resident

    @property
    def held(self) -> int:
        return self._memory.resident + self._memory.pool.stats.pages

    @property
    def dirty_pages(self) -> int:
        return self._memory.dirty_pages

    @property
    def evictions(self) -> int:
        return self._memory.evictions

    def counts(self) -> Any:
        """Return the engine's counts, a `struct tmem_stats`."""
        return self._tmem.counts()

    def check(self) -> None:
        self._tmem.check()

    def close(self) -> None:
        self._end.clear()
        self._memory.close()
        if self._arena is not None:
            self._arena.close()


AnyCache = OracleCache | EngineCache


def oracle_with_queue(frames: int, *, limit: int = LIMIT) -> OracleCache:
    return OracleCache(frames, limit=limit, queueing=True)


def engine_with_pool(frames: int, *, limit: int = LIMIT) -> EngineCache:
    return EngineCache(frames, limit=limit, pool=MIB)


IMPLEMENTATIONS: dict[str, Callable[..., AnyCache]] = {
    "python": OracleCache,
    "python with a queue": oracle_with_queue,
    "engine": EngineCache,
    "engine with a pool": engine_with_pool,
}


def free_all(cache: CacheUnderTest[AnyFile], files: Iterable[AnyFile]) -> None:
    """Free all dropped pages; what is held then is what is found."""
    while cache.free_some(1000):
        pass
    assert cache.held == sum(len(cache.pages(file)) for file in files)
