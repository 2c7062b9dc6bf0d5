"""A change of a file reaches all places: frames, pool, fills in flight."""

from __future__ import annotations

import os

import pytest

from tests.guestparts import MakeParts, make_parts
from tests.io.concurrent import concurrent_requests, unstreamed_file
from tests.pagebytes import page_of, pages_of
from tests.scheduling import in_trio
from tmem.arena import PAGE_SIZE
from tmemfs.cache.file import Merge

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
        file.inode.file.drop(9, 9)
        assert parts.pages_in_flight(file) == others
        parts.backing.after_read.open()
    assert parts.cached_pages(file) == others


@in_trio
async def test_drop_removes_a_range_from_cache_and_pool(make_parts: MakeParts) -> None:
    parts = make_parts()
    file, _ = await parts.make_cached(40)
    parts.evict_all()
    await parts.read(file, 0, 10 * PAGE_SIZE)
    file.inode.file.drop(5, 29)
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
    file.inode.file.drop(3, 1 << 50)
    assert not any(parts.pooled(file, index) for index in range(3, 40))


@in_trio
async def test_a_change_by_others_leaves_dirty_pages_only_and_no_late_fill_arrives(make_parts: MakeParts) -> None:
    parts = make_parts()
    file, data = await parts.make_cached(10)
    parts.mark_dirty(file, 3)
    content, number = file.inode.file, file.inode.file.content
    late = content.begin_fill(20, 21, ahead=False, unread=22)
    content.drop_clean()
    assert content.content != number
    assert parts.cached_pages(file) == {3}
    assert content.held_pages() == 1
    late.finish(bytes(data[: 2 * PAGE_SIZE]), bypass=False)
    assert late.poisoned
    assert not content.has(20)
    content.forget()


@in_trio
async def test_a_fill_that_began_before_a_write_back_enters_no_cache(make_parts: MakeParts) -> None:
    parts = make_parts()
    file, data = await parts.make_cached(6)
    content = file.inode.file
    parts.mark_dirty(file, 2)
    content.overwrite(2 * PAGE_SIZE, page_of(9))
    other = content.begin_fill(4, 5, ahead=False, unread=6)
    late = content.begin_fill(1, 3, ahead=False, unread=4)
    content.mark_clean(0, 5)
    assert (late.poisoned, other.poisoned) == (True, False), "it read the page as it was before"
    parts.evict_all()
    content.flush_pool(0, 5)
    late.finish(bytes(data[PAGE_SIZE : 4 * PAGE_SIZE]), bypass=False)
    assert not content.has(2)
    other.abandon()


@in_trio
async def test_overwrite_updates_the_cache_and_removes_pooled_copies(make_parts: MakeParts) -> None:
    parts = make_parts()
    file, data = await parts.make_cached(30)
    parts.evict_all()
    await parts.read(file, 0, 4 * PAGE_SIZE)
    patch = page_of(7, 9000)
    data[5000:14000] = patch
    os.pwrite(file.fd, patch, 5000)
    file.inode.file.overwrite(5000, patch)
    for index in range(1, 4):
        assert not parts.pooled(file, index)
        assert parts.cached(file, index) == bytes(data[index * PAGE_SIZE : (index + 1) * PAGE_SIZE])
    parts.evict_all()  # not into the slots that the pages came from
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
    file.inode.file.forget()
    await parts.memory.free_dropped()
    assert parts.memory.resident == 0
    assert parts.tmem.stats().pages == 0


@in_trio
async def test_a_fill_of_pages_that_another_fill_has_enters_no_cache(make_parts: MakeParts) -> None:
    parts = make_parts()
    file, data = unstreamed_file(parts, 8)
    content = file.inode.file
    first = content.begin_fill(0, 3, ahead=False, unread=4)
    second = content.begin_fill(3, 5, ahead=False, unread=6)
    assert (first.poisoned, second.poisoned) == (False, True)
    assert content.gather(2, 5, bytearray(4 * PAGE_SIZE), sequential=False) == [(2, 3, first), (4, 5, second)]
    first.finish(data[: 4 * PAGE_SIZE], bypass=False)
    second.finish(data[3 * PAGE_SIZE : 6 * PAGE_SIZE], bypass=False)
    assert parts.cached_pages(file) == {0, 1, 2, 3}
    content.begin_fill(6, 7, ahead=False, unread=8).abandon()
    assert not parts.pages_in_flight(file)
    assert not content.has(6)


@in_trio
async def test_pages_become_dirty_all_together_or_not_at_all(make_parts: MakeParts) -> None:
    parts = make_parts(cache=16 * PAGE_SIZE, pool=0)
    file, _ = await parts.make_cached(4)
    content = file.inode.file
    assert not content.make_dirty(2, 20), "there are 16 frames"
    assert not content.has_dirty
    assert content.make_dirty(2, 5)
    assert content.dirty_pages() == [2, 3, 4, 5]
    assert content.copy_out(4, 5) == bytes(2 * PAGE_SIZE)
    content.mark_clean(0, 4)
    assert content.dirty_pages() == [5]
    content.forget()


@in_trio
async def test_a_page_whose_bytes_are_needed_becomes_dirty_in_the_cache_only(make_parts: MakeParts) -> None:
    parts = make_parts(drain_thread=False)
    file, data = await parts.make_cached(6)
    parts.evict_all()
    parts.cache_pages(file, 6, [page_of(9)])
    content = file.inode.file
    for first, last, partial in ((5, 6, [5]), (4, 5, [5]), (5, 5, [5]), (6, 7, [6, 7])):
        assert not content.make_dirty(first, last, partial)
        assert not content.has_dirty
    assert await parts.read(file, 0, len(data)) == data
    assert content.make_dirty(6, 7, [6])
    assert content.copy_out(6, 7) == page_of(9) + bytes(PAGE_SIZE)
    content.forget()


@in_trio
async def test_a_stat_is_stale_the_same_new_or_shows_a_change(make_parts: MakeParts) -> None:
    parts = make_parts()
    content = parts.memory.new_file()
    assert content.merge_stat((5, 1), 5, started=1) is Merge.NEW
    assert content.merge_stat((5, 1), 5, started=2) is Merge.SAME
    assert content.merge_stat((9, 9), 9, started=1) is Merge.STALE
    content.begin_change()
    assert content.merge_stat((9, 9), 9, started=3) is Merge.STALE
    content.end_change(4)
    content.record_own_change((7, 2), 4)
    assert (content.size, content.matches((7, 2)), content.change_seq) == (7, True, 4)
    content.begin_fill(0, 0, ahead=False, unread=1).finish(b"1234567", bypass=False)
    assert bytes(content.read(0, 7, sequential=False) or b"") == b"1234567"
    content.provisional = True
    assert content.merge_stat((8, 3), 8, started=5) is Merge.CHANGED
    assert (content.size, content.matches((8, 3)), content.provisional) == (8, True, False)
    assert content.read(0, 7, sequential=False) is None
