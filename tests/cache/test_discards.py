"""A file drops any number of pages at once; they are freed in steps that do not block the event loop."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import pytest
import trio

from tests.guestparts import MakeParts, Parts, make_parts
from tests.pagebytes import MIB, page_of
from tests.scheduling import in_trio
from tmemfs.cache.pagecache import PAGE_SIZE
from tmemfs.cache.precache import MANY
from tmemfs.io.files import OpenFile

__all__ = ["make_parts"]

CACHED, POOLED = 3 * MANY, 2 * MANY  # pages
STRETCH = 1100  # most pages freed between two checkpoints


class Stretches(trio.abc.Instrument):
    """Count the most pages and frames freed between two checkpoints of one task."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._before = self._held()
        self.longest = 0

    def _held(self) -> int:
        pool = self._parts.pool.stats.pages if self._parts.pool is not None else 0
        return self._parts.memory.resident + pool + self._parts.frames()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._before = self._held()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self.longest = max(self.longest, self._before - self._held())


@contextmanager
def counted(parts: Parts) -> Iterator[Stretches]:
    """Count what is freed inside the block."""
    found = Stretches(parts)
    trio.lowlevel.add_instrument(found)
    try:
        yield found
    finally:
        trio.lowlevel.remove_instrument(found)


@asynccontextmanager
async def large_file(make_parts: MakeParts) -> AsyncIterator[tuple[Parts, OpenFile]]:
    """Make a file with many pages in the cache and many more in the pool."""
    parts = make_parts(cache=64 * MIB, pool=64 * MIB)
    file = parts.make("f", page_of(1))
    file.inode.file.size = (CACHED + POOLED) * PAGE_SIZE
    parts.cache_pages(file, 0, [page_of(1)] * CACHED)
    parts.pool_pages(file, CACHED, [page_of(1)] * POOLED)
    async with parts.running():
        yield parts, file
        await parts.memory.free_dropped()


async def forget(parts: Parts, file: OpenFile) -> None:
    file.inode.file.forget()


async def renew(parts: Parts, file: OpenFile) -> None:
    parts.inodes.invalidate(file.inode)


async def empty(parts: Parts, file: OpenFile) -> None:
    file.inode.file.truncate(0)


async def drop(parts: Parts, file: OpenFile) -> None:
    file.inode.file.drop(0, 1 << 50)


@pytest.mark.parametrize("change", [forget, renew, empty, drop])
@in_trio
async def test_the_pages_of_a_large_file_are_freed_in_steps(
    make_parts: MakeParts, change: Callable[[Parts, OpenFile], Awaitable[None]]
) -> None:
    async with large_file(make_parts) as (parts, file):
        with counted(parts) as stretches:
            await change(parts, file)
            assert not parts.cached_pages(file), "no page is found from here on"
            assert not parts.pooled(file, CACHED)
            await trio.lowlevel.checkpoint()
            parts.check()  # every frame is accounted for halfway, too
            await parts.memory.free_dropped()
        assert parts.memory.resident == 0
        assert parts.pool is not None
        assert parts.pool.stats.pages == 0
        assert 0 < stretches.longest <= STRETCH


@in_trio
async def test_dirty_pages_of_a_large_file_stay_when_others_change_it(make_parts: MakeParts) -> None:
    async with large_file(make_parts) as (parts, file):
        for index in (5, 700):
            parts.mark_dirty(file, index)
        parts.inodes.invalidate(file.inode)
        assert parts.cached_pages(file) == {5, 700}
        await parts.memory.free_dropped()
        assert parts.memory.resident == parts.memory.dirty_pages == 2
        file.inode.file.forget()
        assert parts.memory.dirty_pages == 0


@in_trio
async def test_truncating_a_large_file_leaves_no_page_beyond_its_end(make_parts: MakeParts) -> None:
    async with large_file(make_parts) as (parts, file):
        size = (CACHED // 3) * PAGE_SIZE
        with counted(parts) as stretches:
            file.inode.file.truncate(size)
            assert max(parts.cached_pages(file), default=0) < CACHED // 3
            await parts.memory.free_dropped()
        assert stretches.longest <= STRETCH
        assert not parts.pooled(file, CACHED + 5)


@in_trio
async def test_a_truncation_by_a_few_pages_keeps_the_others(make_parts: MakeParts) -> None:
    async with large_file(make_parts) as (parts, file):
        file.inode.file.size = CACHED * PAGE_SIZE
        file.inode.file.truncate((CACHED - 100) * PAGE_SIZE + 5)
        assert len(parts.cached_pages(file)) == CACHED - 99


@in_trio
async def test_a_dropped_page_is_not_put_although_it_was_queued(make_parts: MakeParts) -> None:
    async with large_file(make_parts) as (parts, file):
        file.inode.file.drop(CACHED, CACHED + POOLED)
        await parts.memory.free_dropped()
        parts.queue_victims(64)
        file.inode.file.drop_clean()
        parts.drain(64)
        assert parts.pool is not None
        assert parts.pool.stats.pages == 0


@in_trio
async def test_a_shrink_gives_frames_back_in_steps(make_parts: MakeParts) -> None:
    async with large_file(make_parts) as (parts, file):
        for index in range(CACHED - MANY // 2, CACHED):  # in high frames, and kept: they have to move
            assert parts.reader.hit(file, index * PAGE_SIZE, 1) is not None
        with counted(parts) as stretches:
            await parts.memory.resize(8 * MIB)
        assert parts.memory.settled
        assert parts.memory.frames == 2048
        assert parts.memory.resident <= 2048
        assert stretches.longest <= STRETCH
        parts.check()
