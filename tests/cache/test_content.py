"""A change of a file reaches all places: frames, victim queue, pool, fills in flight."""

from __future__ import annotations

import os

import pytest

from tests.guestparts import MakeParts, make_parts
from tests.io.concurrent import concurrent_requests, unstreamed_file
from tests.pagebytes import page_of, pages_of
from tests.scheduling import in_trio
from tmemfs.cache.pagecache import PAGE_SIZE

__all__ = ["make_parts"]


@in_trio
async def test_poison_hits_only_overlapping_fills(make_parts: MakeParts) -> None:
    parts = make_parts()
    file, _ = unstreamed_file(parts, 20)
    others = {0, 1, 2, 3, 4, 10, 11, 12}
    parts.backing.after_read.shut = True
    async with concurrent_requests(parts) as requests:
        for first, last in ((0, 4), (5, 9), (10, 12)):
            requests.read(f"from {first}", file, first * PAGE_SIZE, (last - first + 1) * PAGE_SIZE)
        await parts.backing.after_read.wait_held(3)
        parts.content.poison(file.inode, 9, 9)
        assert parts.pages_in_flight(file) == others
        parts.backing.after_read.open()
    assert parts.cached_pages(file) == others


@in_trio
async def test_drop_removes_a_range_from_cache_queue_and_pool(make_parts: MakeParts) -> None:
    parts = make_parts()
    file, _ = await parts.make_cached(40)
    parts.evict_all()
    await parts.read(file, 0, 10 * PAGE_SIZE)
    parts.queue_victims(5)
    parts.content.drop(file.inode, 5, 29)
    for index in range(40):
        kept = not 5 <= index <= 29
        assert (parts.cached(file, index) is not None or parts.pooled(file, index)) == kept
    assert await parts.read(file, 0, 40 * PAGE_SIZE) == pages_of(1, 40)


@pytest.mark.timeout(20)
@in_trio
async def test_drop_of_the_longest_range_takes_no_longer(make_parts: MakeParts) -> None:
    parts = make_parts()
    file, _ = await parts.make_cached(40)
    parts.evict_all()
    parts.content.drop(file.inode, 3, 1 << 50)
    assert not any(parts.pooled(file, index) for index in range(3, 40))


@in_trio
async def test_renew_keeps_dirty_pages_only_and_a_late_put_is_never_found(make_parts: MakeParts) -> None:
    parts = make_parts()
    file, _ = await parts.make_cached(10)
    parts.mark_dirty(file, 3)
    old = parts.pool_object(file)
    parts.content.renew(file.inode)
    assert parts.cached_pages(file) == {3}
    assert parts.pool is not None
    parts.pool.put(old, 5, page_of(99))
    assert await parts.read(file, 5 * PAGE_SIZE, PAGE_SIZE) == pages_of(1, 10)[5 * PAGE_SIZE : 6 * PAGE_SIZE]


@in_trio
async def test_overwrite_updates_the_cache_and_removes_queued_and_pooled_copies(make_parts: MakeParts) -> None:
    parts = make_parts()
    file, data = await parts.make_cached(30)
    parts.evict_all()
    await parts.read(file, 0, 4 * PAGE_SIZE)
    parts.queue_victims(4)
    assert 1 in parts.queued_pages(file)
    patch = page_of(7, 9000)
    data[5000:14000] = patch
    os.pwrite(file.fd, patch, 5000)
    parts.content.overwrite(file.inode, 5000, patch)
    assert 1 not in parts.queued_pages(file), "a page that is overwritten while queued is not put"
    for index in range(1, 4):
        assert not parts.pooled(file, index)
        assert parts.cached(file, index) == bytes(data[index * PAGE_SIZE : (index + 1) * PAGE_SIZE])
    assert await parts.read(file, 0, len(data)) == data


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 8192, 20_000, 40_960, 50_000])
@in_trio
async def test_truncate_drops_pages_beyond_the_end_and_extends_with_zeros(make_parts: MakeParts, size: int) -> None:
    parts = make_parts()
    file, data = await parts.make_cached(10)
    parts.evict_all()
    await parts.read(file, 0, 3 * PAGE_SIZE)
    await parts.truncate(file, size)
    await parts.truncate(file, 60_000)
    want = data[:size].ljust(60_000, b"\0")
    assert await parts.read(file, 0, 60_000) == want == parts.bytes_on_disk(file)


@in_trio
async def test_forget_leaves_no_trace_of_a_file(make_parts: MakeParts) -> None:
    parts = make_parts()
    file, _ = await parts.make_cached(50)
    parts.evict_all()
    await parts.read(file, 0, 5 * PAGE_SIZE)
    parts.content.forget(file.inode)
    await parts.precache.discards.finish()
    assert parts.cache.resident == 0
    assert parts.tmem is not None
    assert parts.tmem.stats().pages == 0
