"""The page cache: its bound is exact, its victims wait to be put, and a smaller size gives memory back."""

from __future__ import annotations

import random

import pytest

from tests.cache.caches import MIB, CacheUnderTest
from tests.cache.conftest import MakeCache
from tests.conftest import memory_of
from tests.pagebytes import page_of, pages_of
from tmemfs.cache.pagecache import PAGE_SIZE


@pytest.fixture
def cache(make_cache: MakeCache) -> CacheUnderTest:
    return make_cache(16)


# -- filling and evicting --------------------------------------------------------------------------------------------


def test_pages_come_back_as_they_were_inserted(cache: CacheUnderTest) -> None:
    file, data = cache.new_file(), pages_of(1, 5)
    assert cache.insert(file, 7, data) == 5
    assert cache.pages(file) == {7, 8, 9, 10, 11}
    assert b"".join(cache.page(file, index) for index in range(7, 12)) == data


def test_a_short_last_page_ends_in_zeros_whatever_the_frame_held(cache: CacheUnderTest) -> None:
    file = cache.new_file()
    cache.insert(file, 0, b"\xff" * PAGE_SIZE * 16)
    cache.remove(file, 0, 15)
    cache.insert(file, 3, b"x" * (PAGE_SIZE + 10))
    assert cache.page(file, 4) == b"x" * 10 + bytes(PAGE_SIZE - 10)


def test_a_resident_page_keeps_its_content(cache: CacheUnderTest) -> None:
    file = cache.new_file()
    cache.insert(file, 1, page_of(1))
    assert cache.insert(file, 0, pages_of(9, 3)) == 3
    assert cache.page(file, 1) == page_of(1)


@pytest.mark.parametrize("queueing", [True, False])
def test_the_bound_is_exact_to_the_byte(make_cache: MakeCache, queueing: bool) -> None:
    cache = make_cache(16, queueing=queueing)
    file, counters = cache.new_file(), cache.cache
    for index in range(100):
        cache.insert(file, index, page_of(index))
        assert counters.resident << 12 <= counters.capacity == 16 * PAGE_SIZE
        cache.check()
    assert len(cache.pages(file)) == counters.resident
    assert counters.evictions == 100 - counters.resident


def test_a_capacity_is_rounded_down_to_whole_pages() -> None:
    cache = CacheUnderTest(5 * PAGE_SIZE + 4095, queueing=False)
    assert cache.cache.capacity == 5 * PAGE_SIZE
    cache.close()


def test_referenced_pages_outlive_unreferenced_ones(make_cache: MakeCache) -> None:
    cache = make_cache(64, queueing=False)
    file = cache.new_file()
    cache.insert(file, 0, pages_of(1, 64))
    hot = set(range(0, 64, 8))
    for index in range(64, 104):
        for page in hot & cache.pages(file):
            cache.hit(file, page)
        cache.insert(file, index, page_of(index))
    assert hot <= cache.pages(file)


@pytest.mark.parametrize("queueing", [True, False])
def test_read_ahead_pages_outlive_pages_read_before_them(make_cache: MakeCache, queueing: bool) -> None:
    cache = make_cache(16, queueing=queueing)
    file = cache.new_file()
    cache.insert(file, 0, pages_of(0, 12))
    for index in cache.pages(file):
        cache.hit(file, index)
    cache.insert(file, 12, pages_of(12, 2), ahead=True, bypassing=queueing)
    cache.insert(file, 14, pages_of(14, 6), ahead=True, bypassing=queueing)
    assert set(range(12, 20)) <= cache.pages(file)


def test_an_evicted_page_is_a_hit_until_it_is_drained(cache: CacheUnderTest) -> None:
    file = cache.new_file()
    cache.insert(file, 0, pages_of(1, 10))
    cache.cache.queue_victims(4)
    assert len(cache.pages(file)) == cache.cache.resident == 10
    queued = cache.queued(file)
    assert len(queued) == 4
    rescued = min(queued)
    cache.hit(file, rescued)
    assert {index for _, index, _ in cache.drain()} == queued - {rescued}
    assert rescued in cache.pages(file)


def test_a_full_queue_drops_its_oldest_page_and_counts_it(make_cache: MakeCache) -> None:
    cache = make_cache(32)
    file, counters = cache.new_file(), cache.cache
    for index in range(200):  # nothing drains the queue
        assert cache.insert(file, index, page_of(index)) == 1
    assert cache.victim_calls
    assert counters.dropped == counters.evictions == 200 - counters.resident


def test_without_a_pool_nothing_is_queued_or_counted_as_dropped(make_cache: MakeCache) -> None:
    cache = make_cache(32, queueing=False)
    file = cache.new_file()
    for index in range(200):
        cache.insert(file, index, page_of(index))
    assert not cache.queued(file)
    assert cache.cache.dropped == 0


def test_dirty_pages_stay_and_an_insert_returns_how_many_pages_fit(cache: CacheUnderTest) -> None:
    file, other = cache.new_file(), cache.new_file()
    cache.insert(file, 0, pages_of(1, 12))
    for index in range(12):
        cache.mark_dirty(file, index)
    assert cache.insert(other, 0, pages_of(2, 40)) == 40  # one after the other through four frames
    assert len(cache.pages(other)) <= 4
    assert len(cache.pages(file)) == 12
    for index in cache.pages(other):
        cache.mark_dirty(other, index)
    rest = cache.insert(file, 100, pages_of(3, 10))
    for index in set(range(100, 100 + rest)) & cache.pages(file):
        cache.mark_dirty(file, index)
    assert cache.insert(file, 200, pages_of(4, 3)) < 3 or cache.cache.dirty_pages < 16
    while (dirty := cache.cache.dirty_pages) < 16:
        cache.insert(file, 300 + dirty, page_of(5))
        cache.mark_dirty(file, 300 + dirty)
    assert cache.insert(file, 400, pages_of(6, 2)) == 0
    assert 400 not in cache.pages(file)


def test_each_dirty_page_is_counted_once(cache: CacheUnderTest) -> None:
    file = cache.new_file()
    cache.insert(file, 0, pages_of(1, 2))
    for _ in range(2):
        cache.mark_dirty(file, 0)
    assert cache.cache.dirty_pages == 1
    for _ in range(2):
        cache.mark_clean(file, 0)
    assert cache.cache.dirty_pages == 0
    cache.mark_dirty(file, 1)
    cache.drop_clean(file)
    assert cache.pages(file) == {1}
    assert cache.free_some(5) == 1
    cache.remove(file, 0, 1 << 52)
    assert cache.cache.dirty_pages == cache.cache.resident == 0


def test_a_frame_loses_the_pool_bit_with_its_page(cache: CacheUnderTest) -> None:
    file = cache.new_file()
    cache.insert(file, 0, page_of(1), pool_bit=True)
    cache.insert(file, 1, page_of(2))
    assert [cache.has_pool_bit(file, index) for index in (0, 1)] == [True, False]
    cache.remove(file, 0, 1)
    for index in range(16):
        cache.insert(file, index, page_of(index))
    assert not any(cache.has_pool_bit(file, index) for index in cache.pages(file))


def test_a_bypassing_page_is_evicted_past_the_queue_and_counted(cache: CacheUnderTest) -> None:
    file, counters = cache.new_file(), cache.cache
    for index in range(4):
        cache.insert(file, index, page_of(index), bypassing=index % 2 == 0)
    assert counters.queue_victims(4) == 4
    assert cache.pages(file) == cache.queued(file) == {1, 3}, "the others wait in their frames"
    assert (counters.bypassed, counters.dropped, counters.evictions) == (2, 0, 2)
    cache.insert(file, 4, pages_of(4, 14))
    counters.queue_victims(14)
    assert counters.bypassed == 2, "a frame loses the mark with its page"


# -- resize ----------------------------------------------------------------------------------------------------------


def test_a_shrink_gives_the_memory_back_and_keeps_what_fits(make_cache: MakeCache) -> None:
    cache = make_cache(64 * 256, limit=64 * MIB, queueing=False)
    file, block = cache.new_file(), random.Random(1).randbytes(MIB)
    for start in range(0, 64 * 256, 256):
        cache.insert(file, start, block)
    full = memory_of()
    assert cache.resize(1024)
    assert full - memory_of() >= 58 * MIB
    assert cache.cache.resident == len(cache.pages(file)) == 1024
    for index in cache.pages(file):
        start = (index % 256) * PAGE_SIZE
        assert cache.page(file, index) == block[start : start + PAGE_SIZE]


def test_growing_keeps_every_page_and_makes_room_for_more(cache: CacheUnderTest) -> None:
    file = cache.new_file()
    cache.insert(file, 0, pages_of(1, 15))
    cache.resize(64)
    cache.insert(file, 15, pages_of(2, 40))
    assert b"".join(cache.page(file, index) for index in range(15)) == pages_of(1, 15)
    assert len(cache.pages(file)) == 55


def test_a_shrink_below_the_dirty_pages_settles_once_they_are_clean(cache: CacheUnderTest) -> None:
    file = cache.new_file()
    cache.insert(file, 0, pages_of(1, 12))
    for index in range(12):
        cache.mark_dirty(file, index)
    assert not cache.resize(4)
    assert len(cache.pages(file)) == 12, "a dirty page is never lost"
    for index in range(12):
        cache.mark_clean(file, index)
    assert cache.resize(4)
    assert cache.cache.resident == 4


def test_more_than_the_mapping_holds_is_refused(cache: CacheUnderTest) -> None:
    with pytest.raises(ValueError, match="at most"):
        cache.resize(8 * MIB // PAGE_SIZE)
    assert cache.cache.capacity == 16 * PAGE_SIZE


def test_a_queued_page_that_is_moved_by_a_shrink_stays_queued(make_cache: MakeCache) -> None:
    cache = make_cache(64)
    file = cache.new_file()
    cache.insert(file, 0, pages_of(1, 40))
    for index in range(40):
        cache.hit(file, index)
    cache.remove(file, 0, 29)  # ten pages are left, in high frames
    for index in range(30, 40):
        cache.forget_use(file, index)
    cache.cache.queue_victims(3)
    cache.cache.set_capacity(16 * PAGE_SIZE)
    assert cache.settle(48)
    cache.check()
    queued = cache.queued(file)
    assert len(queued) == 3
    drained = cache.drain()
    assert sorted(index for _, index, _ in drained) == sorted(queued)
    assert all(cache.page(file, index) == page_of(100_003 + index) for index in cache.pages(file))
