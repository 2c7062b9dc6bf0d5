"""Full pools: the cost of a put, and the fill level when the sizes of pages change."""

from __future__ import annotations

import random

import pytest

from tests.oracle.conftest import MakeTmem
from tests.oracle.pool import Pool, Tmem
from tests.tmem.faultysource import FaultySource, Thinned, page_of
from tmem import SLAB_SIZE

MIXED = random.Random(11)
MIX = [MIXED.choice((300, 700, 1000, 1500, 1900, 2100, 2500, 2900, 4096)) for _ in range(997)]
QUARTER = [page_of(seed, 1000) for seed in range(64)]
WHOLE = [page_of(seed, 4096) for seed in range(64)]
MANY = [page_of(seed, size) for seed, size in enumerate(MIX)]


def fill_up(pool: Pool, obj: int, pages: list[bytes], count: int) -> None:
    for index in range(count):
        assert pool.put(obj, index, pages[index % len(pages)])


@pytest.mark.parametrize("slabs", [64, 1024])
def test_a_pool_stays_full_of_pages_when_their_size_changes(make_tmem: MakeTmem, slabs: int) -> None:
    _, tmem = make_tmem(slabs)
    pool = tmem.new_pool()
    for obj, (pages, each) in enumerate(
        [(QUARTER, 1100), (WHOLE, 4096), (MANY, 1900), (QUARTER, 1100), (MANY, 1900), (WHOLE, 4096)]
    ):
        fill_up(pool, obj, pages, slabs * SLAB_SIZE * 3 // 2 // each)
        stats = tmem.stats()
        assert stats.used_bytes >= 0.85 * stats.lent_bytes, f"phase {obj}: {stats}"
        assert pool.stats.rejected_puts == 0
        tmem.check()


def test_a_size_change_costs_no_more_bytes_than_it_brings(make_tmem: MakeTmem) -> None:
    _, tmem = make_tmem(64)
    pool = tmem.new_pool()
    fill_up(pool, 1, QUARTER, 64 * 62)
    before = tmem.stats()
    fill_up(pool, 2, WHOLE, 16 * 16)
    lost = tmem.stats().evictions - before.evictions
    assert lost <= 16 * 64 + 64


@pytest.mark.parametrize("slabs", [1, 2, 3, 4])
@pytest.mark.parametrize("first", [100, 1000, 2000, 4096])
@pytest.mark.parametrize("second", [100, 1000, 2000, 4096])
def test_in_a_tiny_pool_no_put_costs_more_than_half_of_the_pages(
    make_tmem: MakeTmem, slabs: int, first: int, second: int
) -> None:
    _, tmem = make_tmem(slabs)
    pool = tmem.new_pool()
    fill_up(pool, 1, [page_of(1, first)], 2000)
    accepted = 0
    for index in range(300):
        held = pool.stats.pages
        accepted += pool.put(2, index, page_of(index, second))
        assert pool.stats.pages >= held // 2
    assert accepted >= 280
    tmem.check()


def test_compaction_moves_pages_and_loses_none(make_tmem: MakeTmem) -> None:
    _, tmem = make_tmem(16)
    kept = tmem.new_pool(persistent=True)
    thinned = Thinned(kept)
    assert kept.put(2, 0, page_of(9, 4096))
    tmem.check()
    thinned.check()
    assert kept.get(2, 0) == page_of(9, 4096)


def test_give_up_releases_spares_first_then_the_coldest_pages(make_tmem: MakeTmem) -> None:
    source, tmem = make_tmem(8)
    pool = tmem.new_pool()
    fill_up(pool, 1, WHOLE, 128)
    for index in range(16, 32):
        pool.get(1, index)
    assert tmem.give_up(1) == 1
    assert pool.stats.evictions == 0
    assert tmem.give_up(2) == 2
    assert source.slabs_out == 5
    assert pool.stats.evictions == 32
    assert not pool.holds(1, 0)
    assert pool.holds(1, 127)
    assert tmem.give_up(100) == 5
    assert tmem.stats().pages == 0


def test_give_up_never_drops_a_persistent_page(make_tmem: MakeTmem) -> None:
    source, tmem = make_tmem(4)
    kept, passing = tmem.new_pool(persistent=True), tmem.new_pool()
    fill_up(kept, 1, WHOLE, 20)
    fill_up(passing, 1, WHOLE, 32)
    assert tmem.give_up(4) == 2
    assert source.slabs_out == 2
    assert all(kept.get(1, index) == WHOLE[index] for index in range(20))
    source.raises = True
    kept.flush_object(1)
    assert tmem.give_up(1) == 0
    source.raises = False
    assert tmem.give_up(9) == 2


def test_a_lost_slab_takes_its_pages_and_no_others(make_tmem: MakeTmem) -> None:
    source, tmem = make_tmem(4)
    pool, kept = tmem.new_pool(), tmem.new_pool(persistent=True)
    assert kept.put(1, 1, WHOLE[1])
    fill_up(pool, 1, WHOLE, 48)
    slab = source.slabs_of(False)[1]
    source.revoke(slab)
    assert tmem.lose(slab) == 16
    assert tmem.lose(slab) == 0
    assert sum(pool.get(1, index) == WHOLE[index] for index in range(48)) == 32
    assert pool.stats.corrupt == 0
    assert tmem.stats().revoked_slabs == 1
    with pytest.raises(ValueError, match="persistent"):
        tmem.lose(0)


def test_slabs_of_one_kind_can_be_given_up_alone(make_tmem: MakeTmem) -> None:
    source, tmem = make_tmem(8)
    pool, kept = tmem.new_pool(), tmem.new_pool(persistent=True)
    fill_up(pool, 1, WHOLE, 64)
    fill_up(kept, 1, WHOLE, 33)
    kept.flush_page(1, 32)
    assert (tmem.spares(persistent=True), tmem.spares(persistent=False)) == (1, 0)
    assert tmem.give_up(9, persistent=True) == 1
    assert pool.stats.pages == 64
    assert tmem.give_up(9, persistent=False) == 4
    assert pool.stats.pages == 0
    assert source.slabs_out == 2
    assert all(kept.get(1, index) == WHOLE[index] for index in range(32))


def test_the_pages_of_a_lost_slab_leave_ghosts(make_tmem: MakeTmem) -> None:
    source, tmem = make_tmem(4)
    pool = tmem.new_pool()
    fill_up(pool, 1, WHOLE, 64)
    assert tmem.lose(source.slabs_of(False)[0]) == tmem.stats().evictions == 16
    source.revoke(source.slabs_of(False)[0])
    assert pool.get(1, 3) is None
    assert pool.stats.ghost_hits == 1


def test_a_page_that_came_back_outlives_new_ones(make_tmem: MakeTmem) -> None:
    _, tmem = make_tmem(4)
    pool = tmem.new_pool()
    fill_up(pool, 1, WHOLE, 70)
    assert pool.get(1, 2) is None
    assert pool.stats.ghost_hits == tmem.stats().ghost_hits == 1
    pool.put(1, 2, WHOLE[2])
    pool.put(1, 100, WHOLE[3], pool_bit=True)
    pool.put(1, 101, WHOLE[3])
    fill_up(pool, 2, WHOLE, 70)
    assert [pool.holds(1, index) for index in (2, 100, 101)] == [True, True, False]


def test_the_age_is_that_of_the_oldest_page() -> None:
    now = [10.0]
    tmem = Tmem(FaultySource(SLAB_SIZE), clock=lambda: now[0])
    pool = tmem.new_pool()
    assert tmem.oldest_age() is None
    pool.put(1, 1, QUARTER[1])
    now[0] = 12.0
    pool.put(1, 2, QUARTER[2])
    now[0] = 15.0
    assert tmem.oldest_age() == 5.0
    pool.get(1, 1)
    assert tmem.oldest_age() == 3.0


def test_a_smaller_arena_makes_its_pool_smaller(make_tmem: MakeTmem) -> None:
    source, tmem = make_tmem(8)
    pool = tmem.new_pool()
    fill_up(pool, 1, WHOLE, 128)
    assert tmem.give_up(source.resize(3 * SLAB_SIZE)) == 5
    fill_up(pool, 2, WHOLE, 60)
    assert source.slabs_out == 3
    assert pool.stats.pages == 48
