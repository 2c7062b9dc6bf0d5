"""A stock of populated slabs: the pool never waits for memory, and can still use the whole arena."""

from __future__ import annotations

import errno
import os
import threading

import pytest

from tests.tmem.faultysource import filled, page_of
from tmem import PAGE_SIZE, SLAB_SIZE, EmbeddedArena, Tmem
from tmem.stock import MAX_SLABS, MIN_SLABS, Stock

PAGES = SLAB_SIZE // PAGE_SIZE


def test_a_slab_comes_from_the_stock_alone() -> None:
    stock = Stock(EmbeddedArena(64 * SLAB_SIZE))
    assert stock.acquire(False) is None
    stock.fill()
    assert stock.stocked == MIN_SLABS
    taken = [stock.acquire(False) for _ in range(MIN_SLABS + 1)]
    assert taken == [*range(MIN_SLABS), None]
    stock.check()


def test_a_low_stock_asks_for_a_fill_until_the_arena_is_used_up() -> None:
    wanted: list[int] = []
    stock = Stock(EmbeddedArena(24 * SLAB_SIZE), lambda: wanted.append(stock.stocked))
    stock.fill()
    slabs = []
    for _ in range(24):
        slabs.append(stock.acquire(True))
        if wanted:
            stock.fill()
    assert None not in slabs
    assert wanted
    wanted.clear()
    assert stock.acquire(True) is None
    assert not wanted, "no fill is requested when the arena is used up"


def test_the_stock_is_short_only_of_what_a_fill_can_add() -> None:
    wanted: list[int] = []
    stock = Stock(EmbeddedArena(24 * SLAB_SIZE), lambda: wanted.append(stock.stocked))
    assert stock.is_short(1)
    assert wanted == [0]
    stock.fill()
    assert not stock.is_short(MIN_SLABS * PAGES - 1)
    assert not stock.is_short(1 << 20), "no fill adds more than the stock can hold"
    for _ in range(MIN_SLABS):
        stock.acquire(True)
    assert stock.is_short(1)
    stock.fill()
    assert not stock.is_short(1 << 20), "the arena is used up"


def test_a_failing_arena_leaves_the_stock_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, offset: int, size: int) -> None:
        raise OSError(errno.EIO, "")

    arena = EmbeddedArena(24 * SLAB_SIZE)
    stock = Stock(arena)
    monkeypatch.setattr(os, "posix_fallocate", fail)
    stock.fill()
    assert stock.stocked == arena.slabs_out == 0
    assert not stock.is_short(1), "not retried at once"


def test_a_released_slab_is_reused_without_being_populated_again() -> None:
    arena = EmbeddedArena(4 * SLAB_SIZE)
    stock = Stock(arena)
    stock.fill()
    slab, *_ = [stock.acquire(True) for _ in range(4)]
    assert slab is not None
    with pytest.raises(ValueError, match="not out as ephemeral"):
        stock.release(slab, False)
    stock.release(slab, True)
    assert stock.acquire(False) == slab
    stock.check()
    arena.check()


def test_slabs_released_beyond_the_stock_go_back_to_the_arena() -> None:
    arena = EmbeddedArena(64 * SLAB_SIZE)
    stock = Stock(arena)
    slabs = []
    for _ in range(64):
        stock.fill()
        slabs.append(stock.acquire(False))
    for slab in slabs:
        assert slab is not None
        stock.release(slab, False)
    assert stock.stocked == arena.slabs_out == MIN_SLABS
    assert os.fstat(arena.fd).st_blocks * 512 == MIN_SLABS * SLAB_SIZE
    arena.check()


def test_the_pool_works_while_a_fill_waits_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    arena = EmbeddedArena(4 * MAX_SLABS * SLAB_SIZE)
    stock = Stock(arena)
    stock.fill()
    pool = Tmem(stock, compress=False).new_pool()
    begun, go_on, allocate = threading.Event(), threading.Event(), os.posix_fallocate

    def slow(fd: int, offset: int, size: int) -> None:
        assert threading.current_thread() is thread, "the pool waited for memory"
        begun.set()
        go_on.wait(30)
        allocate(fd, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", slow)
    thread = threading.Thread(target=stock.fill)
    assert pool.put(1, 0, filled(1))
    for index in range(
        3 * MAX_SLABS * PAGES // 2
    ):  # more than the stock holds: the oldest pages are evicted, without waiting
        assert pool.put(1, index, page_of(index, PAGE_SIZE))
        if index == MAX_SLABS * PAGES // 2:
            thread.start()
            assert begun.wait(30)
    assert pool.get(1, index) == page_of(index, PAGE_SIZE)
    pool.flush_object(1)
    go_on.set()
    thread.join(30)
    assert stock.stocked == MAX_SLABS
    stock.check()
    arena.check()
