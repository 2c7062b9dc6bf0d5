"""The contract of the pool, by the numbered clauses of docs/design/pool.md; clause 4 is in test_refusals.py."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.tmem.conftest import MakeTmem
from tests.tmem.faultysource import filled, first_stored_byte, flipped_bits, page_of
from tmem import SLAB_SIZE, PageCorrupt

KINDS = [{"persistent": False}, {"shared": True}, {"persistent": True}, {"persistent": True, "shared": True}]
SIZES = [100, 1000, 2000, 4096]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_clause_1_put_and_get_copy(make_tmem: MakeTmem, kind: dict[str, Any], size: int) -> None:
    pool = make_tmem(4)[1].new_pool(**kind)
    buffer = bytearray(page_of(1, size))
    assert pool.put(7, 1, memoryview(buffer))
    buffer[:] = bytes(4096)
    page = pool.get(7, 1)
    assert type(page) is bytes
    assert page == page_of(1, size)


def test_clause_2_a_private_ephemeral_get_removes_the_page(make_tmem: MakeTmem) -> None:
    tmem = make_tmem(4)[1]
    pool = tmem.new_pool()
    pool.put(1, 2, page_of(1, 2000))
    assert pool.holds(1, 2)
    assert pool.has_object(1)
    assert pool.get(1, 2) is not None
    assert not pool.holds(1, 2)
    assert not pool.has_object(1)
    assert pool.get(1, 2) is None
    assert tmem.stats().pages == tmem.stats().used_bytes == 0


def test_clause_2_a_shared_ephemeral_get_leaves_the_page(make_tmem: MakeTmem) -> None:
    pool = make_tmem(4)[1].new_pool(shared=True)
    pool.put(1, 2, page_of(1, 2000))
    assert pool.get(1, 2) == pool.get(1, 2) == page_of(1, 2000)


def test_clause_2_ephemeral_pages_vanish_when_room_is_short(make_tmem: MakeTmem) -> None:
    tmem = make_tmem(2)[1]
    pool = tmem.new_pool()
    assert all(pool.put(1, index, page_of(index, 4096)) for index in range(100))
    assert pool.stats.pages == 32
    assert pool.stats.evictions == tmem.stats().evictions == 68
    assert pool.get(1, 99) == page_of(99, 4096)


def test_clause_3_a_persistent_page_is_refused_or_stays(make_tmem: MakeTmem) -> None:
    _, tmem = make_tmem(4)
    kept, passing = tmem.new_pool(persistent=True), tmem.new_pool()
    accepted = set()
    for index in range(200):
        passing.put(1, index, page_of(index, 1000))
        if kept.put(1, index, page_of(1000 + index, 2000 + 40 * (index % 50))):
            accepted.add(index)
        tmem.check()
    assert 60 < len(accepted) < 200
    assert kept.stats.rejected_no_slot == kept.stats.rejected_puts == 200 - len(accepted)
    for index in range(200):
        want = page_of(1000 + index, 2000 + 40 * (index % 50)) if index in accepted else None
        assert kept.get(1, index) == kept.get(1, index) == want


def test_clause_3_a_persistent_put_takes_a_slab_from_ephemeral_pages(make_tmem: MakeTmem) -> None:
    _, tmem = make_tmem(4)
    passing, kept = tmem.new_pool(), tmem.new_pool(persistent=True)
    for index in range(64):
        assert passing.put(1, index, page_of(index, 4096))
    assert all(kept.put(1, index, page_of(index, 4096)) for index in range(64))
    assert passing.stats.pages == 0
    assert passing.stats.evictions == 64
    assert not kept.put(1, 64, page_of(64, 4096))
    assert not passing.put(1, 64, page_of(64, 4096))


def test_clause_3_a_capped_persistent_put_evicts_few_ephemeral_pages(make_tmem: MakeTmem) -> None:
    source, tmem = make_tmem(8)
    source.persistent_cap = 1
    passing, kept = tmem.new_pool(), tmem.new_pool(persistent=True)
    for index in range(128):
        passing.put(1, index, page_of(index, 4096))
    for index in range(200):
        kept.put(1, index, page_of(index, 4096))
    assert kept.stats.pages == 16
    assert passing.stats.pages >= 128 - 3 * 16
    assert tmem.stats().slabs == 8


def test_clause_5_gets_fail_after_a_failed_get_until_a_put(make_tmem: MakeTmem) -> None:
    pool = make_tmem(2)[1].new_pool(shared=True)
    assert pool.get(1, 1) is None
    assert pool.get(1, 1) is None
    pool.put(1, 2, page_of(1, 2000))
    assert pool.get(1, 1) is None
    pool.put(1, 1, page_of(1, 2000))
    assert pool.get(1, 1) is not None
    assert (pool.stats.succ_gets, pool.stats.failed_gets) == (1, 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", [False, True])
def test_clause_6_flush_and_destroy_work_in_every_state(
    make_tmem: MakeTmem, kind: dict[str, Any], frozen: bool
) -> None:
    tmem = make_tmem(4)[1]
    pool = tmem.new_pool(**kind)
    for obj in (1, 2, 3):
        for index in range(5):
            pool.put(obj, index, page_of(index, 1000 * obj))
    if frozen:
        pool.freeze()
    assert pool.flush_page(1, 3)
    assert not pool.flush_page(1, 3)
    assert not pool.flush_page(9, 9)
    assert pool.get(1, 3) is None
    assert pool.flush_object(2) == 5
    assert pool.flush_object(2) == 0
    assert pool.get(2, 0) is None
    assert not pool.has_object(2)
    assert pool.stats.flushes == 6
    assert pool.stats.pages == 9
    pool.destroy()
    assert pool.get(3, 1) is None
    assert tmem.stats().pages == 0
    assert not pool.put(3, 1, page_of(1, 1000))


def test_all_pools_freeze_and_thaw_together_except_destroyed_ones(make_tmem: MakeTmem) -> None:
    tmem = make_tmem(4)[1]
    pool, kept, gone = tmem.new_pool(), tmem.new_pool(persistent=True), tmem.new_pool()
    gone.destroy()
    tmem.freeze()
    assert not pool.put(1, 1, page_of(1, 1000))
    assert not kept.put(1, 1, page_of(1, 1000))
    tmem.thaw()
    assert pool.put(1, 1, page_of(1, 1000))
    assert kept.put(1, 1, page_of(1, 1000))
    assert not gone.put(1, 1, page_of(1, 1000))


def test_clause_7_a_put_on_a_frozen_pool_is_a_flush(make_tmem: MakeTmem) -> None:
    pool = make_tmem(2)[1].new_pool(shared=True)
    pool.put(1, 1, page_of(1, 1000))
    pool.put(1, 2, page_of(2, 1000))
    pool.freeze()
    assert not pool.put(1, 1, page_of(3, 1000))
    assert not pool.put(1, 5, page_of(3, 1000))
    assert pool.get(1, 1) is None
    assert pool.get(1, 2) == page_of(2, 1000)
    pool.thaw()
    assert pool.put(1, 1, page_of(3, 1000))
    assert pool.stats.rejected_frozen == 2


def test_clause_8_same_filled_pages_are_bounded_by_number(make_tmem: MakeTmem) -> None:
    _, tmem = make_tmem(4)
    pool = tmem.new_pool()
    for index in range(1000):
        assert pool.put(1, index, filled(index))
    assert pool.stats.pages == tmem.stats().same_filled_pages == 4 * SLAB_SIZE // 64 // 64
    assert pool.get(1, 999) == filled(999)
    assert pool.get(1, 0) is None
    assert tmem.stats().slabs == 0


def test_clause_8_persistent_same_filled_pages_are_refused_at_the_bound(make_tmem: MakeTmem) -> None:
    _, tmem = make_tmem(4)
    passing, kept = tmem.new_pool(), tmem.new_pool(persistent=True)
    passing.put(1, 1, filled(1))
    assert sum(kept.put(1, index, filled(index)) for index in range(100)) == 64
    assert kept.stats.rejected_same_filled == 36
    assert passing.stats.pages == 0
    assert not passing.put(1, 1, filled(1))
    assert passing.stats.rejected_same_filled == 1
    assert kept.flush_page(1, 0)
    assert passing.put(1, 1, filled(1))


def test_clause_8_the_pool_holds_no_more_memory_than_its_slabs(make_tmem: MakeTmem) -> None:
    source, tmem = make_tmem(8)
    pool, kept = tmem.new_pool(), tmem.new_pool(persistent=True)
    for index in range(600):
        (pool if index % 3 else kept).put(1, index, page_of(index, 300 + index * 13 % 3800))
        assert source.slabs_out == tmem.stats().slabs <= 8
    assert os.fstat(source.fd).st_blocks * 512 == 8 * SLAB_SIZE
    assert tmem.stats().used_bytes <= tmem.stats().lent_bytes
    tmem.check()


@pytest.mark.parametrize("size", [500, 2000, 4096])
@pytest.mark.parametrize("kind", KINDS)
def test_clause_9_a_flipped_bit_is_a_miss_or_an_error_that_names_the_page(
    make_tmem: MakeTmem, size: int, kind: dict[str, Any]
) -> None:
    source, tmem = make_tmem(2)
    pool = tmem.new_pool(name="swap", **kind)
    pool.put(5, 6, page_of(1, size))
    at = first_stored_byte(source.fd) + 100
    with flipped_bits(source.fd, [range(at, at + 1)]):
        if pool.persistent:
            for _ in range(2):
                with pytest.raises(PageCorrupt, match=r"swap.*page 6 of object 5") as caught:
                    pool.get(5, 6)
                assert (caught.value.pool, caught.value.obj, caught.value.index) == ("swap", 5, 6)
        else:
            assert pool.get(5, 6) is None
            assert pool.get(5, 6) is None
            assert pool.stats.corrupt == 1
            assert not pool.holds(5, 6)
    assert pool.put(5, 6, page_of(2, size))
    assert pool.get(5, 6) == page_of(2, size)


def test_clause_9_pages_of_a_punched_slab_miss_without_using_memory(make_tmem: MakeTmem) -> None:
    source, tmem = make_tmem(2)
    pool = tmem.new_pool()
    for index in range(16):
        pool.put(1, index, page_of(index, 4096))
    (slab,) = source.slabs_of(False)
    source.revoke(slab)
    assert all(pool.get(1, index) is None for index in range(8))
    assert pool.stats.corrupt == 8
    assert os.fstat(source.fd).st_blocks == 0
    assert tmem.lose(slab) == 8
    assert tmem.stats().revoked_slabs == 1
    assert tmem.stats().slabs == 0


def test_stats_add_up(make_tmem: MakeTmem) -> None:
    _, tmem = make_tmem(8)
    pool = tmem.new_pool()
    pool.put(1, 0, filled(9))
    pool.put(1, 1, page_of(1, 4096))
    pool.put(1, 2, page_of(1, 2000))
    stats = tmem.stats()
    assert (stats.pages, stats.same_filled_pages, stats.raw_pages) == (3, 1, 1)
    assert stats.slabs == 2
    assert stats.lent_bytes == 2 * SLAB_SIZE
    assert stats.original_bytes == 3 * 4096
    assert 4096 + 1900 < stats.used_bytes < 4096 + 2100
    assert stats.compressed_bytes == stats.used_bytes + 64
    assert stats.index_bytes > 0
