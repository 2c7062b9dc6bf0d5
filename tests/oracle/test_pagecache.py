"""What only the Python page cache has: the victim queue, and marks of its frames."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cache.caches import OracleCache
from tests.pagebytes import page_of, pages_of
from tmem.arena import PAGE_SIZE


@pytest.fixture
def cache() -> Iterator[OracleCache]:
    """Return a cache of 32 frames with a victim queue."""
    made = OracleCache(32, queueing=True)
    yield made
    made.check()
    made.close()


def test_an_evicted_page_is_a_hit_until_it_is_drained(cache: OracleCache) -> None:
    file = cache.new_file()
    cache.insert(file, 0, pages_of(1, 10))
    cache.cache.queue_victims(4)
    assert len(cache.pages(file)) == cache.resident == 10
    queued = cache.queued(file)
    assert len(queued) == 4
    rescued = min(queued)
    cache.hit(file, rescued)
    assert {index for index, _ in cache.drain()} == queued - {rescued}
    assert rescued in cache.pages(file)


def test_a_full_queue_drops_its_oldest_page_and_counts_it(cache: OracleCache) -> None:
    file, counters = cache.new_file(), cache.cache
    for index in range(200):  # nothing drains the queue
        cache.insert(file, index, page_of(index))
        assert index in cache.pages(file)
    assert cache.victim_calls
    assert counters.dropped == counters.evictions == 200 - counters.resident


def test_without_a_pool_nothing_is_queued_or_counted_as_dropped() -> None:
    cache = OracleCache(32)
    file = cache.new_file()
    cache.insert(file, 0, pages_of(1, 200))
    assert not cache.queued(file)
    assert cache.cache.dropped == 0
    cache.close()


def test_a_frame_loses_the_pool_bit_with_its_page(cache: OracleCache) -> None:
    file, bits = cache.new_file(), cache.cache.pool_bit
    cache.cache.insert(file, 0, page_of(1), True)
    cache.insert(file, 1, page_of(2))
    assert [bits[file.pages[index]] for index in (0, 1)] == [1, 0]
    cache.remove(file, 0, 1)
    cache.insert(file, 0, pages_of(1, 32))
    assert not any(bits[frame] for frame in file.pages.values())


def test_a_bypassing_page_is_evicted_past_the_queue_and_counted(cache: OracleCache) -> None:
    file, counters = cache.new_file(), cache.cache
    for index in range(4):
        cache.insert(file, index, page_of(index), bypass=index % 2 == 0)
    assert counters.queue_victims(4) == 4
    assert cache.pages(file) == cache.queued(file) == {1, 3}, "the others wait in their frames"
    assert (counters.bypassed, counters.dropped, counters.evictions) == (2, 0, 2)
    cache.insert(file, 4, pages_of(4, 14))
    counters.queue_victims(14)
    assert counters.bypassed == 2, "a frame loses the mark with its page"


def test_more_than_the_mapping_holds_is_refused(cache: OracleCache) -> None:
    with pytest.raises(ValueError, match="at most"):
        cache.resize(2048)
    assert cache.frames == 32


def test_a_queued_page_that_is_moved_by_a_shrink_stays_queued() -> None:
    cache = OracleCache(64, queueing=True)
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
    assert sorted(index for index, _ in drained) == sorted(queued)
    assert all(cache.page(file, index) == page_of(100_003 + index) for index in cache.pages(file))
    cache.close()
