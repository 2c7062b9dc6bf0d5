"""The page cache: its bound is exact, its victims wait to be put, and a smaller size gives the memory back."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tests.cache.caches import MIB, Owner, content, make, resize
from tests.conftest import memory_of
from tests.pagebytes import page_of, pages_of
from tmemfs.cache.pagecache import IDLE, PAGE_SIZE, QUEUED, USED, PageCache


@pytest.fixture
def cache() -> Iterator[PageCache]:
    made = make(16)
    yield made
    made.check()
    made.close()


# -- filling and evicting --------------------------------------------------------------------------------------------


def test_pages_come_back_as_they_were_inserted(cache: PageCache) -> None:
    owner, data = Owner(), pages_of(1, 5)
    assert cache.insert(owner, 7, data) == 5
    assert sorted(owner.pages) == [7, 8, 9, 10, 11]
    assert b"".join(content(cache, owner, index) for index in range(7, 12)) == data


def test_a_short_last_page_ends_in_zeros_whatever_the_frame_held(cache: PageCache) -> None:
    owner = Owner()
    cache.insert(owner, 0, b"\xff" * PAGE_SIZE * 16)
    cache.remove(owner, 0, 15)
    cache.insert(owner, 3, b"x" * (PAGE_SIZE + 10))
    assert content(cache, owner, 4) == b"x" * 10 + bytes(PAGE_SIZE - 10)


def test_a_resident_page_keeps_its_content(cache: PageCache) -> None:
    owner = Owner()
    cache.insert(owner, 1, page_of(1))
    assert cache.insert(owner, 0, pages_of(9, 3)) == 3
    assert content(cache, owner, 1) == page_of(1)


@pytest.mark.parametrize("queueing", [True, False])
def test_the_bound_is_exact_to_the_byte(queueing: bool) -> None:
    cache, owner = make(16, queueing=queueing), Owner()
    for index in range(100):
        cache.insert(owner, index, page_of(index))
        assert cache.resident << 12 <= cache.capacity == 16 * PAGE_SIZE
        cache.check()
    assert len(owner.pages) == cache.resident
    assert cache.evictions == 100 - cache.resident
    cache.close()


def test_a_capacity_that_is_no_multiple_of_a_page_is_rounded_down() -> None:
    cache = PageCache(5 * PAGE_SIZE + 4095, limit=MIB, queueing=False)
    assert cache.capacity == 5 * PAGE_SIZE
    cache.close()


def test_referenced_pages_outlive_those_that_are_not() -> None:
    cache, owner = make(64, queueing=False), Owner()
    cache.insert(owner, 0, pages_of(1, 64))
    hot = set(range(0, 64, 8))
    for index in range(64, 104):
        for page in hot:
            if page in owner.pages:
                cache.ref[owner.pages[page]] = USED
        cache.insert(owner, index, page_of(index))
    assert hot <= set(owner.pages)
    cache.close()


@pytest.mark.parametrize("queueing", [True, False])
def test_pages_read_ahead_outlive_those_that_were_read_before_them(queueing: bool) -> None:
    cache, owner = make(16, queueing=queueing), Owner()
    cache.insert(owner, 0, pages_of(0, 12))
    for frame in owner.pages.values():
        cache.ref[frame] = USED
    cache.insert(owner, 12, pages_of(12, 2), ahead=True, passing=queueing)
    cache.insert(owner, 14, pages_of(14, 6), ahead=True, passing=queueing)
    assert set(range(12, 20)) <= set(owner.pages)
    cache.check()
    cache.close()


def test_an_evicted_page_is_still_a_hit_until_it_is_drained(cache: PageCache) -> None:
    owner = Owner()
    cache.insert(owner, 0, pages_of(1, 10))
    cache.queue_victims(4)
    assert len(owner.pages) == 10
    assert cache.resident == 10
    queued = [index for index, frame in owner.pages.items() if cache.ref[frame] == QUEUED]
    assert len(queued) == 4
    rescued = owner.pages[queued[0]]
    cache.ref[rescued] = USED  # what a hit does
    drained = set()
    while (frame := cache.next_victim()) >= 0:
        drained.add(cache.describe(frame)[1])
        cache.evict(frame)
    assert drained == set(queued[1:])
    assert queued[0] in owner.pages


def test_a_full_queue_drops_its_oldest_page_and_counts_it() -> None:
    cache, owner = make(32), Owner()
    woken = 0

    def wake() -> None:
        nonlocal woken
        woken += 1

    cache.on_victims = wake
    for index in range(200):  # nobody drains
        assert cache.insert(owner, index, page_of(index)) == 1
    assert woken
    assert cache.dropped == cache.evictions == 200 - cache.resident
    cache.check()
    cache.close()


def test_nothing_is_queued_or_called_dropped_where_there_is_no_pool() -> None:
    cache, owner = make(32, queueing=False), Owner()
    for index in range(200):
        cache.insert(owner, index, page_of(index))
    assert not cache.victims
    assert cache.dropped == 0
    cache.close()


def test_dirty_pages_are_not_evicted_and_an_insert_says_what_did_not_fit(cache: PageCache) -> None:
    owner, other = Owner(), Owner()
    cache.insert(owner, 0, pages_of(1, 12))
    for index in range(12):
        cache.soil(owner.pages[index])
    assert cache.insert(other, 0, pages_of(2, 40)) == 40  # one after the other through four frames
    assert len(other.pages) <= 4
    assert len(owner.pages) == 12
    for frame in other.pages.values():
        cache.soil(frame)
    rest = cache.insert(owner, 100, pages_of(3, 10))
    for index in range(100, 100 + rest):
        if index in owner.pages:
            cache.soil(owner.pages[index])
    assert cache.insert(owner, 200, pages_of(4, 3)) < 3 or cache.dirty_pages < 16
    while cache.dirty_pages < 16:
        cache.insert(owner, 300 + cache.dirty_pages, page_of(5))
        cache.soil(owner.pages[300 + cache.dirty_pages])
    assert cache.insert(owner, 400, pages_of(6, 2)) == 0
    assert 400 not in owner.pages


def test_soil_and_clean_count_each_page_once(cache: PageCache) -> None:
    owner = Owner()
    cache.insert(owner, 0, pages_of(1, 2))
    frame = owner.pages[0]
    cache.soil(frame)
    cache.soil(frame)
    assert cache.dirty_pages == 1
    cache.clean(frame)
    cache.clean(frame)
    assert cache.dirty_pages == 0
    cache.soil(owner.pages[1])
    old, owner.pages = owner.pages, cache.split(owner.pages, [1])
    assert list(owner.pages) == [1]
    assert cache.free_some(old, 5) == 1
    cache.remove(owner, 0, 1 << 52)
    assert cache.dirty_pages == cache.resident == 0


def test_the_pool_bit_stays_with_its_page_and_goes_with_it(cache: PageCache) -> None:
    owner = Owner()
    cache.insert(owner, 0, page_of(1), pool_bit=True)
    cache.insert(owner, 1, page_of(2))
    assert [cache.pool_bit[owner.pages[index]] for index in (0, 1)] == [1, 0]
    cache.remove(owner, 0, 1)
    for index in range(16):
        cache.insert(owner, index, page_of(index))
    assert not any(cache.pool_bit[frame] for frame in owner.pages.values())


def test_a_passing_page_is_evicted_past_the_queue_and_counted(cache: PageCache) -> None:
    owner = Owner()
    for index in range(4):
        cache.insert(owner, index, page_of(index), passing=index % 2 == 0)
    assert cache.queue_victims(4) == 4
    assert sorted(owner.pages) == [1, 3], "the others wait in their frames"
    assert (cache.passed, cache.dropped, cache.evictions, len(cache.victims)) == (2, 0, 2, 2)
    cache.insert(owner, 4, page_of(4))
    assert not cache.passing[owner.pages[4]], "the mark goes with its page"


# -- resize ----------------------------------------------------------------------------------------------------------


def test_a_shrink_gives_the_memory_back_and_keeps_what_fits() -> None:
    cache, owner = PageCache(64 * MIB, limit=64 * MIB, queueing=False), Owner()
    block = random.Random(1).randbytes(MIB)
    for start in range(0, 64 * 256, 256):
        cache.insert(owner, start, block)
    full = memory_of()
    resize(cache, 4 * MIB)
    assert full - memory_of() >= 58 * MIB
    assert cache.resident == len(owner.pages) == 1024
    for index, frame in owner.pages.items():
        start = (index % 256) * PAGE_SIZE
        assert cache.page(frame) == block[start : start + PAGE_SIZE]
    cache.check()
    cache.close()


def test_growing_keeps_every_page_and_makes_room_for_more(cache: PageCache) -> None:
    owner = Owner()
    cache.insert(owner, 0, pages_of(1, 15))
    resize(cache, 64 * PAGE_SIZE)
    cache.insert(owner, 15, pages_of(2, 40))
    assert b"".join(content(cache, owner, index) for index in range(15)) == pages_of(1, 15)
    assert len(owner.pages) == 55


def test_a_shrink_below_the_dirty_pages_settles_once_they_are_clean(cache: PageCache) -> None:
    owner = Owner()
    cache.insert(owner, 0, pages_of(1, 12))
    for index in range(12):
        cache.soil(owner.pages[index])
    resize(cache, 4 * PAGE_SIZE)
    assert len(owner.pages) == 12, "a dirty page is never lost"
    for index in range(12):
        cache.clean(owner.pages[index])
    resize(cache, 4 * PAGE_SIZE)
    assert cache.resident == 4
    assert len(cache.ref) == 4


def test_more_than_the_mapping_holds_is_refused(cache: PageCache) -> None:
    with pytest.raises(ValueError, match="at most"):
        cache.set_capacity(8 * MIB)
    assert cache.capacity == 16 * PAGE_SIZE


def test_a_queued_page_that_is_moved_by_a_shrink_stays_queued() -> None:
    cache, owner = make(64), Owner()
    cache.insert(owner, 0, pages_of(1, 40))
    for index in range(40):
        cache.ref[owner.pages[index]] = USED
    cache.remove(owner, 0, 29)  # ten pages are left, in frames 30 to 39
    for index in range(30, 40):
        cache.ref[owner.pages[index]] = IDLE
    cache.queue_victims(3)
    cache.set_capacity(16 * PAGE_SIZE)
    assert not cache.settle(48)
    cache.check()
    queued = [index for index, frame in owner.pages.items() if cache.ref[frame] == QUEUED]
    assert len(queued) == 3
    drained = []
    while (frame := cache.next_victim()) >= 0:
        drained.append(cache.describe(frame)[1])
        cache.evict(frame)
    assert sorted(drained) == sorted(queued)
    assert all(content(cache, owner, index) == page_of(100_003 + index) for index in owner.pages)
    cache.close()
