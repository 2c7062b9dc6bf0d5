"""What leaves the cache goes into the pool, and comes back from there; a page is in one of them."""

from __future__ import annotations

import trio.testing

from tests.guestparts import MakeParts, make_parts
from tests.pagebytes import MIB, page_of, pages_of
from tests.scheduling import in_trio
from tmem import CacheFrames, EmbeddedArena, Tmem
from tmem.arena import PAGE_SIZE, SLAB_SIZE, SlabSourceWrapper
from tmem.engine import ffi, lib

__all__ = ["make_parts"]


@in_trio
async def test_evicted_pages_come_back_from_the_pool_without_a_backing_read(make_parts: MakeParts) -> None:
    parts = make_parts(cache=64 * PAGE_SIZE, drain_thread=False)
    data = pages_of(1, 200)
    file = parts.make("f", data)
    async with parts.running():
        for _ in range(2):
            for offset in range(0, len(data), PAGE_SIZE):
                assert await parts.read(file, offset, PAGE_SIZE) == data[offset : offset + PAGE_SIZE]
                await trio.testing.wait_all_tasks_blocked()
                parts.drain()
                parts.check()
    assert parts.backing.pages == 200
    assert parts.pool.stats.succ_gets + parts.pool.stats.reads > 100
    assert parts.memory.dropped == 0


@in_trio
async def test_a_page_from_the_pool_goes_back_to_its_slot_unless_it_was_changed(make_parts: MakeParts) -> None:
    parts = make_parts(drain_thread=False)
    file, data = await parts.make_cached(4)
    parts.evict_all()
    for index in (2, 0):
        await parts.read(file, index * PAGE_SIZE, PAGE_SIZE)
    assert parts.cached_pages(file) == {0, 2}
    assert parts.tmem.counts().duplicate_pages == 2
    data[5000 + PAGE_SIZE : 5010 + PAGE_SIZE] = b"0123456789"
    file.inode.file.overwrite(PAGE_SIZE + 5000, b"0123456789")
    assert parts.tmem.counts().duplicate_pages == 1, "the copy of a page that was changed is void"
    parts.evict_all()
    assert parts.tmem.counts().duplicate_pages == 0
    assert all(parts.pooled(file, index) for index in range(4))
    assert await parts.read(file, 0, len(data)) == data


@in_trio
async def test_pages_that_leave_the_pool_because_their_file_changed_are_counted(make_parts: MakeParts) -> None:
    parts = make_parts(drain_thread=False)
    file, _ = await parts.make_cached(8)
    parts.evict_all()
    parts.cache_pages(file, 8, [page_of(9)])
    content = file.inode.file
    content.overwrite(2 * PAGE_SIZE, page_of(1))
    content.drop(3, 4)
    assert parts.pool.stats.flushes == 3
    await parts.read(file, 0, PAGE_SIZE)
    assert parts.pool.stats.flushes == 3, "it moved up"
    content.drop_clean()
    await parts.memory.free_dropped()
    assert parts.pool.stats.flushes == 3 + 4, "page 0 and page 8 were in the cache"


class Lent(SlabSourceWrapper):
    """A source that may give more later."""

    def __init__(self, source: EmbeddedArena, most: int) -> None:
        super().__init__(source)
        self.arena, self.most = source, most

    def acquire(self, persistent: bool) -> int | None:
        return self._source.acquire(persistent) if self.arena.slabs_out < self.most else None

    def release(self, slab: int, persistent: bool) -> None:
        self._source.release(slab, persistent)


def test_after_a_denial_the_capacity_follows_the_slabs_that_are_held() -> None:
    source = Lent(EmbeddedArena(1024 * SLAB_SIZE), 40)
    tmem = Tmem(source, cache=CacheFrames(32, 32, thread=False))
    full = 32 + 1024 * 32  # at 2:1
    assert tmem.counts().capacity_pages > 0.95 * full
    assert tmem.restock()
    assert tmem.counts().capacity_pages > 0.95 * full
    source.most = 32
    lib.tmem_give_up(tmem.engine, 1, 1, ffi.new("uint32_t[1]"))
    assert not tmem.restock()
    held = tmem.counts().capacity_pages
    assert held < 2000
    lib.tmem_ask_again(tmem.engine)  # or each retry would resize ghosts and miniatures twice
    assert tmem.counts().capacity_pages == held
    source.most = 40
    assert tmem.restock()
    assert held < tmem.counts().capacity_pages < 2000
    tmem.close()
    source.arena.close()


@in_trio
async def test_copies_of_cached_pages_make_room_for_other_pages(make_parts: MakeParts) -> None:
    parts = make_parts(cache=MIB, pool=MIB // 4, drain_thread=False)
    file, data = await parts.make_cached(64)
    parts.evict_all()
    pooled = [index for index in range(64) if parts.pooled(file, index)]
    for index in reversed(pooled):  # not a stream, whose pages would stay in their slots
        await parts.read(file, index * PAGE_SIZE, PAGE_SIZE)
    assert parts.tmem.counts().duplicate_pages > len(pooled) // 2
    other = parts.make("g", pages_of(2, 16))
    parts.pool_pages(other, 0, [page_of(seed) for seed in range(16)])
    parts.check()
    for index in pooled:
        assert await parts.read(file, index * PAGE_SIZE, PAGE_SIZE) == data[index * PAGE_SIZE : (index + 1) * PAGE_SIZE]


@in_trio
async def test_a_shrink_moves_what_no_longer_fits_into_the_pool(make_parts: MakeParts) -> None:
    parts = make_parts(cache=256 * PAGE_SIZE, pool=2 * MIB, drain_thread=False)
    file, data = await parts.make_cached(240)
    await parts.memory.resize(16 * PAGE_SIZE)
    assert parts.memory.resident <= 16
    parts.check()
    assert parts.memory.dropped == 0
    async with parts.running():
        for offset in range(0, len(data), PAGE_SIZE):
            assert await parts.read(file, offset, PAGE_SIZE) == data[offset : offset + PAGE_SIZE]
            parts.drain()
    assert parts.backing.pages == 240, "no page is read twice"


@in_trio
async def test_without_a_pool_every_get_misses_and_nothing_is_put(make_parts: MakeParts) -> None:
    parts = make_parts(cache=64 * PAGE_SIZE, pool=0)
    data = pages_of(1, 128)
    file = parts.make("f", data)
    async with parts.running():
        for _ in range(2):
            assert await parts.read(file, 0, len(data)) == data
    assert parts.memory.hits + parts.backing.pages == 256
    assert parts.memory.dropped == 0
