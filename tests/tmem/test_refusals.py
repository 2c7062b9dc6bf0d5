"""Clause 4 of the contract: whatever refuses a put, the old page is gone."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from tmem_pages import FaultySource, filled, page_of

import tmem.codec
from tmem import Pool, Tmem

Make = Callable[[int], tuple[FaultySource, Tmem]]
KINDS = [{"persistent": False}, {"shared": True}, {"persistent": True}, {"persistent": True, "shared": True}]


def refuse_frozen(source: FaultySource, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    pool.freeze()


def refuse_no_slab(source: FaultySource, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    source.refuses = True


def refuse_source(source: FaultySource, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    source.raises = True


def refuse_codec(source: FaultySource, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> bytes:
        raise RuntimeError("lz4")

    monkeypatch.setattr(tmem.codec, "_compress", fail)


def refuse_write(source: FaultySource, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(28, "no space")

    monkeypatch.setattr(os, "pwrite", fail)


def refuse_short_write(source: FaultySource, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", lambda *_: 1)


class FullTable(dict[int, Any]):
    """A table that there is no memory for when it is to grow."""

    def __setitem__(self, key: int, value: object) -> None:
        raise MemoryError


def refuse_index(source: FaultySource, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    pool._objects = FullTable(pool._objects)
    for pages in pool._objects.values():
        pages.home = pool._objects


REFUSALS = [
    (refuse_frozen, "frozen"),
    (refuse_no_slab, "no_slot"),
    (refuse_source, "source"),
    (refuse_codec, "codec"),
    (refuse_write, "memory"),
    (refuse_short_write, "memory"),
    (refuse_index, "memory"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("old", [filled(3), page_of(1, 2000), page_of(1, 4096)], ids=["same", "lz4", "raw"])
@pytest.mark.parametrize(("refuse", "reason"), REFUSALS)
def test_clause_4_a_refused_put_removes_the_old_page(
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
    kind: dict[str, Any],
    old: bytes,
    refuse: Callable[[FaultySource, Pool, pytest.MonkeyPatch], None],
    reason: str,
) -> None:
    source, backend = make(2)
    pool = backend.new_pool(**kind)
    assert pool.put(1, 1, old)
    if reason in ("no_slot", "source"):
        # The put must need the source: no slab may be left from the old page.
        pool.flush_page(1, 1)
        backend.give_up(2)
        assert pool.put(1, 1, filled(4))
    refuse(source, pool, monkeypatch)
    assert not pool.put(1, 1, page_of(2, 1500))
    monkeypatch.undo()
    source.raises = False
    assert pool.get(1, 1) is None
    assert not pool.holds(1, 1)
    assert not pool.has_object(1)
    assert getattr(pool.stats, f"rejected_{reason}") == pool.stats.rejected_puts == 1
    backend.check()


def test_clause_4_an_incompressible_page_without_room_removes_the_old_one(make: Make) -> None:
    _, tmem = make(2)
    pool = tmem.new_pool(persistent=True)
    index = 0
    while pool.put(1, index, page_of(index, 1000)):
        index += 1
    assert not pool.put(1, 0, page_of(0, 4096))
    assert pool.get(1, 0) is None
    assert pool.get(1, 1) == page_of(1, 1000)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_clause_4_an_unexpected_error_passes_and_removes_the_old_page(
    make: Make, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    _, tmem = make(1)
    pool = tmem.new_pool()
    pool.put(1, 1, page_of(1, 2000))

    def fail(*_: object) -> int:
        raise error

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(error):
        pool.put(1, 1, page_of(2, 2000))
    monkeypatch.undo()
    assert pool.get(1, 1) is None
    assert tmem.stats().pages == 0


@pytest.mark.parametrize("length", [0, 1, 4095, 4097])
def test_clause_4_a_put_of_no_page_is_an_error_that_removes_the_old_page(make: Make, length: int) -> None:
    pool = make(1)[1].new_pool()
    pool.put(1, 1, page_of(1, 2000))
    with pytest.raises(ValueError, match="bytes"):
        pool.put(1, 1, bytes(length))
    assert pool.get(1, 1) is None


@pytest.mark.parametrize("kind", KINDS)
def test_clause_4_an_accepted_put_replaces_the_page(make: Make, kind: dict[str, Any]) -> None:
    pool = make(2)[1].new_pool(**kind)
    for size in (2000, 8, 4096, 100, 2000):
        assert pool.put(1, 1, page_of(size, size))
    assert pool.put(1, 1, filled(1))
    assert pool.put(1, 1, filled(2))
    assert pool.get(1, 1) == filled(2)
    assert pool.stats.pages == (0 if kind == KINDS[0] else 1)


def test_a_put_without_memory_for_larger_tables_is_refused_only_once(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, backend = make(8)
    pool = backend.new_pool()
    entries, queue = backend._store.entries, backend._store.queue
    index = 0
    while entries.free or not index:
        assert index < 10_000
        assert pool.put(1, index, page_of(index, 40))
        index += 1

    def fail(end: int) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(queue, "reach", fail)
        assert not pool.put(1, index, page_of(index, 40))
        assert pool.stats.rejected_memory == 1
        backend.check()
    assert pool.put(1, index, page_of(index, 40))
    backend.check()
