"""Pages between pool and overflow file: refusals, failures, moves, and many requests at once."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.hswap.fakes import Area, raw_page
from tests.tmem.faultysource import descriptors_of, unwritable
from tmem import PAGE_SIZE
from tmemfs.hswap.hswap import REFUSAL_SECONDS
from tmemfs.hswap.pagemap import FIRST_SLOT, HOLE, LOST, POOL

SLAB_PAGES = 16
ZEROS = bytes(PAGE_SIZE)


@pytest.fixture
def area() -> Iterator[Area]:
    """Return a file of 64 pages over two slabs; `check()` runs at teardown."""
    made = Area(64, 2)
    yield made
    made.close()


def write(area: Area, page: int, content: bytes) -> None:
    assert trio.run(area.hswap.write, page * PAGE_SIZE, content) == len(content)


def small_page(seed: int) -> bytes:
    """Return a page that compresses to about half."""
    return (raw_page(seed)[: PAGE_SIZE // 2] + bytes(PAGE_SIZE))[:PAGE_SIZE]


def read(area: Area, page: int) -> bytes:
    return trio.run(area.hswap.read, page * PAGE_SIZE, PAGE_SIZE)


def place(area: Area, page: int) -> int:
    return area.hswap.pagemap.location(page)


def test_clause_4_a_page_whose_second_put_is_refused_leaves_no_old_copy(area: Area) -> None:
    write(area, 3, raw_page(1))
    area.tmem.freeze()
    write(area, 3, raw_page(2))
    assert place(area, 3) >= FIRST_SLOT
    assert area.tmem.stats().pages == area.tmem.stats().used_bytes == 0
    area.tmem.thaw()
    assert read(area, 3) == raw_page(2)


def test_a_page_that_moves_to_and_fro_has_one_location(area: Area) -> None:
    for turn in range(6):
        (area.tmem.freeze if turn % 2 else area.tmem.thaw)()
        write(area, 0, raw_page(turn))
        assert (place(area, 0) == POOL) == (turn % 2 == 0)
        assert len(area.overflow.slots) == turn % 2
        area.check()
    area.tmem.thaw()
    write(area, 0, ZEROS)
    assert place(area, 0) == HOLE
    assert not area.overflow.slots


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_page_keeps_its_content_if_pool_and_overflow_file_fail(area: Area, code: int) -> None:
    for page in range(40):  # more than the pool holds
        write(area, page, raw_page(page))
    beyond = [page for page in range(40) if place(area, page) != POOL][:3]
    area.overflow.full, area.overflow.broken = code == errno.ENOSPC, code == errno.EIO
    for page in (*beyond, 50):
        with pytest.raises(OSError, match=os.strerror(code)):
            write(area, page, raw_page(1000 + page))
    area.overflow.broken = False
    assert [read(area, page) for page in beyond] == [raw_page(page) for page in beyond]
    assert read(area, 50) == ZEROS
    assert area.hswap.counters.overflow_errors == len(beyond) + 1


def test_a_page_that_is_refused_everywhere_gets_its_old_copy_back(area: Area) -> None:
    for page in range(SLAB_PAGES):
        write(area, page, raw_page(page))
    small = SLAB_PAGES
    while place(area, small - 1) == POOL:  # the other slab, until it has no free slot
        write(area, small, small_page(small))
        small += 1
    area.now += 2 * REFUSAL_SECONDS
    area.overflow.full = True
    refused = area.hswap.counters.rejected_puts
    with pytest.raises(OSError, match="No space"):
        write(area, SLAB_PAGES, raw_page(1000))
    assert area.hswap.counters.rejected_puts == refused + 1
    assert place(area, SLAB_PAGES) == POOL
    assert read(area, SLAB_PAGES) == small_page(SLAB_PAGES)


def test_a_frozen_page_stays_in_the_pool_until_the_overflow_write(area: Area) -> None:
    write(area, 5, raw_page(1))
    area.tmem.freeze()
    area.overflow.full = True
    with pytest.raises(OSError, match="No space"):
        write(area, 5, raw_page(2))
    assert place(area, 5) == POOL
    assert read(area, 5) == raw_page(1)
    area.overflow.full = False
    write(area, 5, raw_page(3))
    assert place(area, 5) >= FIRST_SLOT
    assert read(area, 5) == raw_page(3)
    assert area.hswap.pagemap.pool_pages == 0


def test_a_page_that_could_not_be_restored_fails_until_rewritten(area: Area) -> None:
    write(area, 5, raw_page(1))
    area.overflow.full = True
    with unwritable(descriptors_of(area.source.fd)), pytest.raises(OSError, match="No space"):
        write(area, 5, raw_page(2))
    assert place(area, 5) == LOST
    for _ in range(2):
        with pytest.raises(OSError, match="page 5 of the swap-like file was lost") as caught:
            read(area, 5)
        assert caught.value.errno == errno.EIO
    with pytest.raises(OSError, match="page 5 "):
        trio.run(area.hswap.write, 5 * PAGE_SIZE + 10, b"part")
    area.overflow.full = False
    write(area, 5, raw_page(3))
    assert read(area, 5) == raw_page(3)
    assert area.hswap.pagemap.lost_pages == 0


def test_pages_that_are_read_move_back_once_the_pool_accepts_them(area: Area) -> None:
    area.tmem.freeze()
    for page in range(10):
        write(area, page, raw_page(page))
    area.tmem.thaw()
    read(area, 0)
    assert place(area, 0) != POOL, "no put right after a refusal"
    area.now += REFUSAL_SECONDS
    assert [read(area, page) for page in range(10)] == [raw_page(page) for page in range(10)]
    assert area.hswap.pagemap.pool_pages == area.hswap.counters.moved_in == 10
    assert not area.overflow.slots


def test_slabs_are_released_by_moving_the_coldest_pages_out(area: Area) -> None:
    for page in range(2 * SLAB_PAGES):
        write(area, page, raw_page(page))
    for _ in range(20):
        for page in range(4):
            read(area, page)
    assert trio.run(area.hswap.release_slabs, 1) == 1
    assert area.source.persistent_slabs == 1
    assert area.hswap.counters.moved_out == len(area.overflow.slots) >= SLAB_PAGES
    assert all(read(area, page) == raw_page(page) for page in range(2 * SLAB_PAGES))


def test_no_slab_is_released_when_the_overflow_file_fails(area: Area) -> None:
    for page in range(2 * SLAB_PAGES):
        write(area, page, raw_page(page))
    area.overflow.full = True
    assert trio.run(area.hswap.release_slabs, 1) == 0
    assert area.hswap.pagemap.pool_pages == 2 * SLAB_PAGES
    assert area.hswap.counters.overflow_errors == 1
    assert all(read(area, page) == raw_page(page) for page in range(2 * SLAB_PAGES))


def test_releasing_all_slabs_waits_for_pages_in_use(area: Area) -> None:
    for page in range(SLAB_PAGES):
        write(area, page, raw_page(page))

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            async with area.hswap._lock.hold(0, 63):
                nursery.start_soon(area.hswap.release_slabs, 1)
                await wait_all_tasks_blocked()
                assert area.source.persistent_slabs == 1
            with trio.fail_after(60):
                while area.source.persistent_slabs:
                    await trio.lowlevel.checkpoint()

    trio.run(main)
    assert area.hswap.pagemap.overflow_pages == SLAB_PAGES


def test_disk_space_is_reserved_for_all_pages_or_those_beyond_the_pool(area: Area) -> None:
    trio.run(area.hswap.reserve, 0)
    assert area.overflow.reserved == 64
    area.overflow.limit = 32
    trio.run(area.hswap.reserve, 40 * PAGE_SIZE)
    assert area.overflow.reserved == 24
    with pytest.raises(OSError, match="No space"):
        trio.run(area.hswap.reserve, 10 * PAGE_SIZE)
    trio.run(area.hswap.reserve, 100 * PAGE_SIZE)
    assert area.overflow.reserved == 0, "a pool that holds every page needs no disk"


def test_a_lost_page_can_be_overwritten_whole(area: Area) -> None:
    write(area, 0, raw_page(1))
    for page in (1, 2):
        area.hswap.pagemap.set_location(page, LOST)
    data = raw_page(2) + raw_page(3)[:-10]
    assert trio.run(area.hswap.write, 10, data) == len(data)
    assert read(area, 0) + read(area, 1) == raw_page(1)[:10] + data
    assert trio.run(area.hswap.write, 2 * PAGE_SIZE, raw_page(4) + b"x") == PAGE_SIZE + 1
    assert read(area, 2) + read(area, 3) == raw_page(4) + b"x" + bytes(PAGE_SIZE - 1)


def test_a_file_that_is_opened_before_a_delayed_clear_keeps_its_pages(area: Area) -> None:
    """Otherwise a swapon right after a swapoff would have its area cleared while in use."""
    write(area, 0, raw_page(1))
    area.overflow.turns = 3
    area.hswap.pagemap.set_location(1, trio.run(area.overflow.write, [raw_page(2)])[0])

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(area.hswap.read, PAGE_SIZE, PAGE_SIZE)
            await trio.lowlevel.checkpoint()
            area.hswap.opened()
            with pytest.raises(OSError, match="is open"):
                await area.hswap.clear()

    trio.run(main)
    assert read(area, 0) + read(area, 1) == raw_page(1) + raw_page(2)
    area.hswap.closed()
    trio.run(area.hswap.clear)
    assert read(area, 0) == ZEROS


def test_concurrent_writes_reads_and_moves_never_show_a_wrong_byte(area: Area) -> None:
    """Each worker owns a part of every page, so most writes are read-modify-writes."""
    workers, part = 8, PAGE_SIZE // 8
    chance = random.Random(1)
    area.overflow.turns = 3

    async def work(number: int) -> None:
        mine: dict[int, bytes] = {}
        for _ in range(120):
            page = chance.randrange(64)
            offset = page * PAGE_SIZE + number * part
            if chance.random() < 0.6:
                mine[page] = chance.choice([bytes(part), chance.randbytes(part)])
                assert await area.hswap.write(offset, mine[page]) == part
            else:
                assert await area.hswap.read(offset, part) == mine.get(page, bytes(part))
            area.now += 0.01
            (area.tmem.freeze if chance.random() < 0.2 else area.tmem.thaw)()
            await trio.lowlevel.checkpoint()

    async def move() -> None:
        while True:
            await area.hswap.release_slabs(chance.randrange(3))
            area.check()
            await trio.lowlevel.checkpoint()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(move)
            async with trio.open_nursery() as working:
                for number in range(workers):
                    working.start_soon(work, number)
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert area.hswap.counters.moved_out > 0
    assert area.hswap.counters.overflow_writes > 0
