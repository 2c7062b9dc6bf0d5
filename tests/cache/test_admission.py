"""A first scan is not pooled; a second scan is, and so is a scan that leaves the guest idle."""

from __future__ import annotations

import random

import pytest
import trio.testing

from tests.guestparts import MakeParts, Parts, make_parts
from tests.pagebytes import MIB, pages_of
from tests.scheduling import in_trio
from tmem.arena import PAGE_SIZE
from tmemfs.cache.admission import MOST, PUT_SECONDS, SHARE, SLOW_SECONDS, SLOW_SHARE, SMALLEST, Admission
from tmemfs.io.files import OpenFile

__all__ = ["make_parts"]

WINDOW = 512
PAID = MOST * PUT_SECONDS / SHARE  # idle seconds that pay for the puts of a whole window


class Streams:
    """Streams over a fast backing that keep the guest busy, unless `idle` is given."""

    def __init__(self, capacity_pages: int = 4 * WINDOW) -> None:
        self.admission = Admission()
        self.admission.should_bypass(0, 0, 0, capacity_pages=capacity_pages, now=0.0, busy=0.0, took=0.0)
        self.capacity_pages = capacity_pages
        self.now = self.busy = 0.0

    def should_bypass(self, oid: int, first: int, pages: int = WINDOW, idle: float = 0.0, took: float = 100.0) -> bool:
        self.now += 0.001 + idle
        self.busy += 0.001
        answer = self.admission.should_bypass(
            oid, first, first + pages - 1, capacity_pages=self.capacity_pages, now=self.now, busy=self.busy, took=took
        )
        self.admission.check()
        return answer

    def run(self, oid: int, windows: int) -> list[bool]:
        return [self.should_bypass(oid, number * WINDOW) for number in range(windows)]


def test_a_first_scan_is_not_pooled() -> None:
    assert Streams().run(1, 6) == [True] * 6


def test_a_second_scan_within_the_capacity_is_pooled() -> None:
    streams = Streams(capacity_pages=4 * WINDOW)
    assert streams.run(1, 4) == [True] * 4
    assert streams.run(1, 4) == [False] * 4


def test_a_second_scan_beyond_the_capacity_is_not_pooled() -> None:
    streams = Streams(capacity_pages=4 * WINDOW)
    assert streams.run(1, 6) == streams.run(1, 6) == [True] * 6


def test_another_object_is_another_stream() -> None:
    streams = Streams()
    streams.run(1, 2)
    assert streams.run(2, 2) == [True] * 2


def test_adjacent_windows_in_one_extent_are_not_a_second_scan() -> None:
    streams = Streams()
    steps = [(0, 64), (64, 64), (128, 128), (256, 256), (512, 512), (1024, 512)]
    assert [streams.should_bypass(1, first, pages) for first, pages in steps] == [True] * 6
    assert [streams.should_bypass(1, first, pages) for first, pages in steps] == [False] * 6


def test_small_read_ahead_is_pooled_and_not_remembered() -> None:
    streams = Streams()
    assert not any(streams.should_bypass(1, 0, SMALLEST - 1) for _ in range(100))
    assert streams.should_bypass(1, 0)


def test_idle_time_pays_for_puts() -> None:
    streams = Streams()
    assert streams.should_bypass(1, 0, idle=PAID / 2)
    assert not streams.should_bypass(1, WINDOW, idle=PAID / 2 + 0.001), "both halves together pay for a window"
    assert streams.should_bypass(1, 2 * WINDOW)


def test_idle_time_without_reads_pays_for_no_puts() -> None:
    streams = Streams()
    assert streams.should_bypass(1, 0, idle=1000.0, took=0.0)
    assert not streams.should_bypass(1, WINDOW, idle=1000.0, took=1000.0)
    assert streams.should_bypass(1, 2 * WINDOW), "saved idle time is bounded"


def test_pages_of_a_slow_backing_are_pooled_in_its_idle_time() -> None:
    slow = Streams()
    slow.admission = Admission()
    took = 3 * SLOW_SECONDS * WINDOW
    assert took * SLOW_SHARE > WINDOW * PUT_SECONDS
    assert [slow.should_bypass(1, number * WINDOW, idle=took, took=took) for number in range(4)] == [False] * 4
    assert slow.should_bypass(1, 4 * WINDOW, took=took), "no idle time was left"
    quick = took / 10
    assert slow.should_bypass(1, 5 * WINDOW, idle=quick, took=quick)
    assert slow.should_bypass(1, 6 * WINDOW, idle=took, took=took), (
        "the backing was fast just now: the long time was not spent reading"
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_extents_remembered_are_bounded_by_the_capacity(seed: int) -> None:
    source, streams = random.Random(seed), Streams(capacity_pages=64 * WINDOW)
    for _ in range(2000):
        streams.should_bypass(source.randrange(20), source.randrange(1000) * 16, source.choice([SMALLEST, 100, WINDOW]))
        assert len(streams.admission) <= 2 * streams.capacity_pages // SMALLEST


# -- in a guest ------------------------------------------------------------------------------------------------------


async def scan(parts: Parts, file: OpenFile, size: int) -> None:
    """Read a file from start to end, and run background tasks and the drain after each reply."""
    for offset in range(0, size, 32 * PAGE_SIZE):
        await parts.read(file, offset, 32 * PAGE_SIZE)
        await trio.testing.wait_all_tasks_blocked()
        parts.drain()
        parts.check()


@in_trio
async def test_a_scan_is_pooled_the_second_time_and_hit_the_third_time(make_parts: MakeParts) -> None:
    parts = make_parts(cache=8 * MIB, pool=32 * MIB, drain_thread=False)
    count = 4800
    file, memory = parts.make("f", pages_of(1, count)), parts.memory
    async with parts.running(readahead=True):
        await scan(parts, file, count * PAGE_SIZE)
        puts = parts.pool.stats.puts
        assert memory.bypassed == memory.evictions - puts > 2500
        assert puts < 200, "only as many as idle time paid for"
        await scan(parts, file, count * PAGE_SIZE)
        assert memory.bypassed <= count, "no page of the second scan bypasses the pool"
        assert parts.pool.stats.puts > puts + 1000
        await scan(parts, file, count * PAGE_SIZE)
    assert parts.pool.stats.succ_gets + parts.pool.stats.reads > 1000
    assert parts.backing.pages < 2.5 * count
    assert memory.evictions == memory.bypassed + memory.dropped + parts.pool.stats.puts


@in_trio
async def test_a_streamed_page_that_is_used_again_is_pooled(make_parts: MakeParts) -> None:
    parts = make_parts(cache=2 * MIB, pool=16 * MIB, drain_thread=False)
    file = parts.make("f", pages_of(1, 192))
    async with parts.running(readahead=True):
        await scan(parts, file, 192 * PAGE_SIZE)
        for index in (7, 3, 150):
            await parts.read(file, index * PAGE_SIZE, 100)
    parts.evict_all()
    assert sorted(index for index in range(192) if parts.pooled(file, index)) == [3, 7, 150]


@in_trio
async def test_a_shrink_pools_streamed_pages(make_parts: MakeParts) -> None:
    parts = make_parts(cache=2 * MIB, pool=16 * MIB, drain_thread=False)
    file = parts.make("f", pages_of(1, 400))
    async with parts.running(readahead=True):
        await scan(parts, file, 400 * PAGE_SIZE)
        assert parts.memory.bypassed == 0
        await parts.memory.resize(MIB // 4)
    assert parts.pool.stats.pages == 400 - parts.memory.resident >= 336
