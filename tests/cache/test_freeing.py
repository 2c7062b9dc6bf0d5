"""A file drops any number of pages at once. Nobody finds them from then on; the engine's thread frees them in steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import trio

from tests.conftest import memory_of
from tests.pagebytes import MIB, page_of
from tests.scheduling import in_trio
from tmem import PAGE_SIZE, CacheFrames, EmbeddedArena, Tmem
from tmemfs.cache.memory import FRAMES, Memory

CACHED, POOLED = 12_288, 8192  # pages


class LargeFile:
    """A file with many pages in the cache and many more in the pool."""

    def __init__(self, *, thread: bool = True) -> None:
        self._arena = EmbeddedArena(64 * MIB)
        self.tmem = Tmem(self._arena, cache=CacheFrames(CACHED + 512, 2 * CACHED, thread=thread))
        self.memory = Memory(self.tmem)
        self.file = self.memory.new_file()
        self.file.size = (POOLED + CACHED) * PAGE_SIZE
        self._insert(0, POOLED)
        while self.memory.evict(64):
            pass
        self._insert(POOLED, CACHED)
        assert all(self.file.is_pooled(index) for index in range(POOLED))
        assert self.held() == POOLED + CACHED

    def _insert(self, first: int, count: int) -> None:
        self.file.begin_fill(first, first + count - 1, ahead=False, unread=first + count).finish(
            page_of(1) * count, bypass=False
        )

    def held(self) -> int:
        """Return the pages in memory, dropped ones too until they are freed."""
        return self.memory.resident + self.memory.pool.stats.pages

    def found(self) -> set[int]:
        """Return the pages of the file that are found."""
        return set(filter(self.file.has, range(POOLED + CACHED)))

    def wait_until_freed(self, pages: int = 0) -> None:
        """Wait until no more than so many pages are held."""
        end = time.monotonic() + 10
        while self.held() > pages:
            assert time.monotonic() < end, "the engine's thread does not free what was dropped"
            self.tmem.check()  # every frame is accounted for halfway, too

    def close(self) -> None:
        self.tmem.check()
        del self.file
        self.memory.close()
        self._arena.close()


@pytest.fixture
def large() -> Iterator[LargeFile]:
    """Return a large file; `check()` runs at teardown."""
    made = LargeFile()
    yield made
    made.close()


def close_file(large: LargeFile) -> None:
    large.file = large.memory.new_file()


CHANGES: dict[str, Callable[[LargeFile], None]] = {
    "forget": lambda large: large.file.forget(),
    "drop_clean": lambda large: large.file.drop_clean(),
    "truncate": lambda large: large.file.truncate(0),
    "drop": lambda large: large.file.drop(0, 1 << 50),
    "close": close_file,
}


@pytest.mark.parametrize("change", CHANGES)
def test_all_pages_of_a_large_file_are_gone_at_once_and_freed_later(large: LargeFile, change: str) -> None:
    CHANGES[change](large)
    assert not large.found(), "no page is found from here on"
    assert not large.file.held_pages()
    large.wait_until_freed()


@in_trio
async def test_freeing_dropped_pages_ends_when_all_are_freed() -> None:
    large = LargeFile()
    large.file.forget()
    await large.memory.free_dropped()
    assert large.held() == 0
    large.close()


def test_dirty_pages_of_a_large_file_stay_when_others_change_it(large: LargeFile) -> None:
    for index in (POOLED + 5, POOLED + 700):
        assert large.file.make_dirty(index, index)
    large.file.drop_clean()
    assert large.found() == {POOLED + 5, POOLED + 700}
    large.wait_until_freed(2)
    assert large.memory.resident == large.memory.dirty_pages == 2
    large.file.forget()
    assert large.memory.dirty_pages == 0


def test_truncating_a_large_file_leaves_no_page_beyond_its_end(large: LargeFile) -> None:
    large.file.truncate(5 * PAGE_SIZE + 5)
    assert large.found() <= set(range(6))


def test_a_truncation_by_a_few_pages_keeps_the_others(large: LargeFile) -> None:
    large.file.truncate((POOLED + CACHED - 100) * PAGE_SIZE + 5)
    assert large.found() == set(range(POOLED + CACHED - 99))


def test_dropped_pages_make_room_for_others_before_they_are_freed(large: LargeFile) -> None:
    large.file.drop_clean()
    other = large.memory.new_file()
    fill = other.begin_fill(0, 4095, ahead=False, unread=4096)
    fill.finish(page_of(2) * 4096, bypass=False)
    assert other.held_pages() > 3500
    large.wait_until_freed(other.held_pages())


@in_trio
async def test_a_shrink_gives_frames_back_in_steps() -> None:
    large, longest, before = LargeFile(thread=False), 0, 0

    async def watch() -> None:
        nonlocal longest, before
        before = large.memory.resident
        while True:
            await trio.lowlevel.checkpoint()
            longest, before = max(longest, before - large.memory.resident), large.memory.resident

    memory = memory_of()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await large.memory.resize(8 * MIB)
        nursery.cancel_scope.cancel()
    assert large.memory.settled
    assert large.memory.frames == 2048
    assert large.memory.resident <= 2048
    assert 0 < longest <= 2 * FRAMES
    assert memory - memory_of() > 15 * MIB  # frames of 40 MiB went, and slots for their pages came
    large.close()
