"""Faults injected into the oracle: they patch what it calls."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.oracle import codec
from tests.oracle.conftest import MakeTmem
from tests.oracle.pool import Pool
from tests.tmem.faultysource import FaultySource, Thinned, page_of
from tests.tmem.implementations import AnyPool
from tests.tmem.test_refusals import KINDS, OLD_PAGES, Fault, assert_a_refused_put_removes


@contextmanager
def failing_codec(source: FaultySource, pool: AnyPool) -> Iterator[None]:
    def fail(*_: object, **__: object) -> bytes:
        raise RuntimeError("lz4")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec, "_compress", fail)
        yield


@contextmanager
def short_write(source: FaultySource, pool: AnyPool) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", lambda *_: 1)
        yield


class FullTable(dict[int, Any]):
    """A table without memory to grow."""

    def __setitem__(self, key: int, value: object) -> None:
        raise MemoryError


@contextmanager
def no_memory_for_the_index(source: FaultySource, pool: AnyPool) -> Iterator[None]:
    assert isinstance(pool, Pool)
    pool._objects = FullTable(pool._objects)
    for pages in pool._objects.values():
        pages.home = pool._objects
    yield


@pytest.mark.parametrize("kind", KINDS)
@OLD_PAGES
@pytest.mark.parametrize(
    ("fault", "reason"),
    [(failing_codec, "codec"), (short_write, "memory"), (no_memory_for_the_index, "memory")],
)
def test_clause_4_a_put_refused_by_a_fault_removes_the_old_page(
    make_tmem: MakeTmem, kind: dict[str, Any], old: bytes, fault: Fault, reason: str
) -> None:
    source, backend = make_tmem(2)
    assert_a_refused_put_removes(old, backend, source, backend.new_pool(**kind), fault, reason)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_clause_4_an_unexpected_error_is_raised_and_removes_the_old_page(
    make_tmem: MakeTmem, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    _, tmem = make_tmem(1)
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


def test_a_put_without_memory_for_larger_tables_is_refused_only_once(
    make_tmem: MakeTmem, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, backend = make_tmem(8)
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


def test_a_failing_compaction_loses_no_persistent_page(make_tmem: MakeTmem, monkeypatch: pytest.MonkeyPatch) -> None:
    _, tmem = make_tmem(16)
    kept = tmem.new_pool(persistent=True)
    thinned = Thinned(kept)
    write, left = os.pwrite, [5]

    def fail(fd: int, data: bytes, offset: int) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(5, "bad memory")
        return write(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", fail)
    assert not kept.put(2, 0, page_of(9, 4096))
    monkeypatch.undo()
    tmem.check()
    thinned.check()


@pytest.mark.parametrize("call", ["pread", "pwrite"])
def test_a_compaction_that_moves_part_of_a_page_leaves_it_in_place(
    make_tmem: MakeTmem, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """The kernel may read or write fewer bytes than requested when it is short of memory."""
    _, tmem = make_tmem(16)
    kept = tmem.new_pool(persistent=True)
    thinned = Thinned(kept)
    whole = getattr(os, call)

    def part(fd: int, what: Any, offset: int) -> Any:
        return whole(fd, what[:10] if call == "pwrite" else 10, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, part)
        assert tmem.give_up(1) == 0
    tmem.check()
    thinned.check()
