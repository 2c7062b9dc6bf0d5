"""The precache puts evicted pages and gets them back; a page is in the cache or in the pool."""

from __future__ import annotations

import trio.testing

from tests.guestparts import MakeParts, make_parts
from tests.pagebytes import MIB, pages_of
from tests.scheduling import in_trio
from tmemfs.cache.pagecache import PAGE_SIZE

__all__ = ["make_parts"]


@in_trio
async def test_evicted_pages_come_back_from_the_pool_without_a_backing_read(make_parts: MakeParts) -> None:
    parts = make_parts(cache=64 * PAGE_SIZE)
    data = pages_of(1, 200)
    file = parts.make("f", data)
    async with parts.running():
        for _ in range(2):
            for offset in range(0, len(data), PAGE_SIZE):
                assert await parts.read(file, offset, PAGE_SIZE) == data[offset : offset + PAGE_SIZE]
                await trio.testing.wait_all_tasks_blocked()
                parts.check()
    assert parts.pool is not None
    assert parts.backing.pages == 200
    assert parts.pool.stats.succ_gets > 100
    assert parts.memory.dropped == 0


@in_trio
async def test_a_page_from_the_pool_carries_the_pool_bit_back_into_it(make_parts: MakeParts) -> None:
    parts = make_parts()
    file, _ = await parts.make_cached(4)
    parts.evict_all()
    await parts.read(file, 0, 2 * PAGE_SIZE)
    put: list[bool] = []
    assert parts.pool is not None
    original = parts.pool.put

    def watched(obj: int, index: int, page: bytes | bytearray | memoryview, pool_bit: bool = False) -> bool:
        put.append(pool_bit)
        return original(obj, index, page, pool_bit)

    parts.pool.put = watched  # type: ignore[method-assign]
    parts.evict_all()
    assert put == [True, True]


@in_trio
async def test_a_rescued_page_is_not_put(make_parts: MakeParts) -> None:
    parts = make_parts()
    file, _ = await parts.make_cached(8)
    parts.queue_victims(8)
    assert parts.reader.hit(file, 3 * PAGE_SIZE, 1) is not None
    assert parts.drain(100) == 7
    assert parts.cached_pages(file) == {3}
    assert not parts.pooled(file, 3)


@in_trio
async def test_a_shrink_moves_what_no_longer_fits_into_the_pool(make_parts: MakeParts) -> None:
    parts = make_parts(cache=256 * PAGE_SIZE, pool=2 * MIB)
    file, data = await parts.make_cached(240)
    await parts.memory.resize(16 * PAGE_SIZE)
    assert parts.memory.resident <= 16
    parts.check()
    assert parts.memory.dropped == 0
    async with parts.running():
        for offset in range(0, len(data), PAGE_SIZE):
            assert await parts.read(file, offset, PAGE_SIZE) == data[offset : offset + PAGE_SIZE]
            await trio.testing.wait_all_tasks_blocked()
    assert parts.backing.pages == 240 + parts.memory.dropped, "only pages dropped from a full queue are read twice"
    assert parts.memory.dropped < 5


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
