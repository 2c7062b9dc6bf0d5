"""The page cache: its bound is exact, dirty pages stay, and a smaller size gives memory back."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.cache.caches import MIB, EngineCache, free_all
from tests.cache.conftest import MakeCache
from tests.conftest import memory_of
from tests.pagebytes import page_of, pages_of
from tmem.arena import PAGE_SIZE


@pytest.fixture
def cache(make_cache: MakeCache) -> Any:
    return make_cache(16)


# -- filling and evicting --------------------------------------------------------------------------------------------


def test_pages_come_back_as_they_were_inserted(cache: Any) -> None:
    file, data = cache.new_file(), pages_of(1, 5)
    cache.insert(file, 7, data)
    assert cache.pages(file) == {7, 8, 9, 10, 11}
    assert b"".join(cache.page(file, index) for index in range(7, 12)) == data


def test_a_short_last_page_ends_in_zeros_whatever_the_frame_held(cache: Any) -> None:
    file = cache.new_file()
    cache.insert(file, 0, b"\xff" * PAGE_SIZE * 16)
    cache.remove(file, 0, 15)
    cache.insert(file, 3, b"x" * (PAGE_SIZE + 10))
    assert cache.page(file, 4) == b"x" * 10 + bytes(PAGE_SIZE - 10)


def test_a_page_that_is_there_keeps_its_content(cache: Any) -> None:
    file = cache.new_file()
    cache.insert(file, 1, page_of(1))
    cache.insert(file, 0, pages_of(9, 3))
    assert cache.page(file, 1) == page_of(1)
    assert cache.pages(file) == {0, 1, 2}


def test_the_bound_is_exact_to_the_byte(cache: Any) -> None:
    file = cache.new_file()
    for index in range(100):
        cache.insert(file, index, page_of(index))
        assert cache.resident <= cache.frames == 16
        cache.check()
    assert len(cache.pages(file)) == cache.held
    assert cache.evictions == 100 - cache.resident


def test_referenced_pages_outlive_unreferenced_ones(make_cache: MakeCache) -> None:
    cache = make_cache(64)
    file = cache.new_file()
    cache.insert(file, 0, pages_of(1, 64))
    hot = set(range(0, 64, 8))
    for index in range(64, 104):
        for page in hot & cache.pages(file):
            cache.hit(file, page)
        cache.insert(file, index, page_of(index))
    assert hot <= cache.pages(file)


def test_read_ahead_pages_outlive_pages_read_before_them(cache: Any) -> None:
    file = cache.new_file()
    cache.insert(file, 0, pages_of(0, 12))
    cache.insert(file, 12, pages_of(12, 2), ahead=True)
    cache.insert(file, 14, pages_of(14, 6), ahead=True)
    assert set(range(12, 20)) <= cache.pages(file)


def test_dirty_pages_stay_and_pages_pass_through_the_other_frames(cache: Any) -> None:
    file, other = cache.new_file(), cache.new_file()
    cache.insert(file, 0, pages_of(1, 12))
    for index in range(12):
        assert cache.mark_dirty(file, index)
    cache.insert(other, 0, pages_of(2, 40))
    assert 39 in cache.pages(other)
    assert cache.resident <= 16
    assert cache.pages(file) == cache.dirty(file) == set(range(12))


def test_nothing_is_inserted_once_all_pages_are_dirty(cache: Any) -> None:
    file = cache.new_file()
    for index in range(16):
        cache.insert(file, index, page_of(index))
        assert cache.mark_dirty(file, index)
    cache.insert(file, 400, pages_of(6, 2))
    assert cache.pages(file) == set(range(16))
    assert cache.evict(5) == 0
    cache.mark_clean(file, 3)
    cache.insert(file, 400, page_of(6))
    assert 400 in cache.pages(file)


def test_each_dirty_page_is_counted_once(cache: Any) -> None:
    file = cache.new_file()
    cache.insert(file, 0, pages_of(1, 2))
    for _ in range(2):
        cache.mark_dirty(file, 0)
    assert cache.dirty_pages == 1
    for _ in range(2):
        cache.mark_clean(file, 0)
    assert cache.dirty_pages == 0
    cache.mark_dirty(file, 1)
    cache.drop_clean(file)
    assert cache.pages(file) == {1}
    free_all(cache, [file])
    cache.remove(file, 0, 1 << 52)
    assert cache.dirty_pages == cache.held == 0


def test_dropped_pages_leave_their_frames_to_others(cache: Any) -> None:
    file = cache.new_file()
    cache.insert(file, 0, pages_of(1, 14))
    cache.drop_clean(file)
    assert not cache.pages(file)
    cache.insert(file, 3, pages_of(2, 10))
    assert b"".join(cache.page(file, index) for index in range(3, 13)) == pages_of(2, 10)
    free_all(cache, [file])
    cache.check()


# -- resize ----------------------------------------------------------------------------------------------------------


def test_a_shrink_gives_the_memory_back_and_keeps_what_fits(make_cache: MakeCache) -> None:
    cache = make_cache(64 * 256, limit=64 * 256)
    file, block = cache.new_file(), random.Random(1).randbytes(MIB)
    for start in range(0, 64 * 256, 256):
        cache.insert(file, start, block)
    full = memory_of()
    assert cache.resize(1024)
    assert full - memory_of() >= 58 * MIB
    assert cache.resident == 1024
    for index in cache.pages(file):
        start = (index % 256) * PAGE_SIZE
        assert cache.page(file, index) == block[start : start + PAGE_SIZE]


def test_growing_keeps_every_page_and_makes_room_for_more(cache: Any) -> None:
    file = cache.new_file()
    cache.insert(file, 0, pages_of(1, 15))
    assert cache.resize(64)
    cache.insert(file, 15, pages_of(2, 40))
    assert b"".join(cache.page(file, index) for index in range(15)) == pages_of(1, 15)
    assert len(cache.pages(file)) == cache.resident == 55


def test_a_shrink_below_the_dirty_pages_settles_once_they_are_clean(cache: Any) -> None:
    file = cache.new_file()
    cache.insert(file, 0, pages_of(1, 12))
    for index in range(12):
        cache.mark_dirty(file, index)
    assert not cache.resize(4)
    assert len(cache.pages(file)) == 12, "a dirty page is never lost"
    for index in range(12):
        cache.mark_clean(file, index)
    assert cache.settle()
    assert cache.resident == 4


@pytest.mark.parametrize("frames", [4, 16, 40])
def test_a_shrink_that_is_under_way_can_be_turned_back(cache: Any, frames: int) -> None:
    file = cache.new_file()
    cache.insert(file, 0, pages_of(1, 12))
    cache.begin_resize(2)
    assert cache.resize(frames)
    cache.insert(file, 20, pages_of(2, 4))
    assert cache.resident <= frames
    kept = cache.pages(file) & set(range(12))
    assert all(cache.page(file, index) == pages_of(1, 12)[index * PAGE_SIZE :][:PAGE_SIZE] for index in kept)


# -- what only the engine does ---------------------------------------------------------------------------------------


def test_the_engine_grows_to_its_limit_and_no_further() -> None:
    cache = EngineCache(16, limit=64)
    assert cache.resize(100)
    assert cache.frames == 64
    cache.close()


def test_pages_read_ahead_by_several_streams_stay_until_they_are_read() -> None:
    cache = EngineCache(256)
    files = [cache.new_file() for _ in range(3)]
    for start in range(0, 1024, 32):
        for file in files:
            cache.insert(file, start, pages_of(start, 32), ahead=True)
        for file in files:
            assert cache.pages(file) >= set(range(start, start + 32))
            for index in range(start, start + 32):
                cache.hit(file, index)
    assert cache.counts().unused == 0
    cache.close()


def test_evicted_pages_are_found_in_the_pool_and_come_up_when_they_are_used() -> None:
    cache = EngineCache(16, pool=MIB)
    file = cache.new_file()
    cache.insert(file, 0, pages_of(1, 12))
    assert cache.evict(12) == 12
    assert (cache.resident, cache.held) == (0, 12)
    cache.hit(file, 3)
    assert (cache.resident, cache.held) == (1, 12)
    assert b"".join(cache.page(file, index) for index in range(12)) == pages_of(1, 12)
    assert cache.held == 12
    cache.check()
    cache.close()


def test_a_page_that_bypasses_the_pool_is_dropped_and_counted() -> None:
    cache = EngineCache(16, pool=MIB)
    file = cache.new_file()
    for index in range(4):
        cache.insert(file, index, page_of(index), bypass=index % 2 == 0)
    assert cache.evict(4) == 4
    assert cache.pages(file) == {1, 3}
    counts = cache.counts()
    assert (counts.bypassed, counts.dropped, counts.cache_evictions) == (2, 0, 4)
    cache.insert(file, 4, pages_of(4, 14))
    cache.evict(14)
    assert cache.counts().bypassed == 2, "a frame loses the mark with its page"
    cache.close()
