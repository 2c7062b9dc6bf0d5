"""Clause 4 of the contract: whatever refuses a put, the old page is gone.

The refusals here come through the public interface and the slab source, so every implementation must pass.
tests/oracle/test_python_faults.py injects faults into the Python one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest

from tests.tmem.conftest import MakeTmem
from tests.tmem.faultysource import FaultySource, filled, page_of, unwritable
from tests.tmem.implementations import AnyPool, AnyTmem

KINDS = [{"persistent": False}, {"shared": True}, {"persistent": True}, {"persistent": True, "shared": True}]
OLD_PAGES = pytest.mark.parametrize("old", [filled(3), page_of(1, 2000), page_of(1, 4096)], ids=["same", "lz4", "raw"])
Fault = Callable[[FaultySource, AnyPool], AbstractContextManager[None]]


def frozen(source: FaultySource, pool: AnyPool) -> AbstractContextManager[None]:
    pool.freeze()
    return nullcontext()


def no_slab(source: FaultySource, pool: AnyPool) -> AbstractContextManager[None]:
    source.refuses = True
    return nullcontext()


@contextmanager
def failing_source(source: FaultySource, pool: AnyPool) -> Iterator[None]:
    source.raises = True
    yield
    source.raises = False


def unwritable_memory(source: FaultySource, pool: AnyPool) -> AbstractContextManager[None]:
    return unwritable(source.fds_of_pool())


def assert_a_refused_put_removes(
    old: bytes, backend: AnyTmem, source: FaultySource, pool: AnyPool, fault: Fault, reason: str
) -> None:
    """Put a page, refuse the second put on its handle, and look for the first."""
    assert pool.put(1, 1, old)
    if reason in ("no_slot", "source"):
        # The put must need the source: no slab may be left from the old page.
        pool.flush_page(1, 1)
        backend.give_up(2)
        assert pool.put(1, 1, filled(4))
    with fault(source, pool):
        assert not pool.put(1, 1, page_of(2, 1500))
    assert pool.get(1, 1) is None
    assert not pool.holds(1, 1)
    assert not pool.has_object(1)
    assert getattr(pool.stats, f"rejected_{reason}") == pool.stats.rejected_puts == 1
    backend.check()


@pytest.mark.parametrize("kind", KINDS)
@OLD_PAGES
@pytest.mark.parametrize(
    ("fault", "reason"),
    [(frozen, "frozen"), (no_slab, "no_slot"), (failing_source, "source"), (unwritable_memory, "memory")],
)
def test_clause_4_a_refused_put_removes_the_old_page(
    make_tmem: MakeTmem, kind: dict[str, Any], old: bytes, fault: Fault, reason: str
) -> None:
    source, backend = make_tmem(2)
    assert_a_refused_put_removes(old, backend, source, backend.new_pool(**kind), fault, reason)


def test_clause_4_an_incompressible_page_without_room_removes_the_old_one(make_tmem: MakeTmem) -> None:
    _, tmem = make_tmem(2)
    pool = tmem.new_pool(persistent=True)
    index = 0
    while pool.put(1, index, page_of(index, 1000)):
        index += 1
    assert not pool.put(1, 0, page_of(0, 4096))
    assert pool.get(1, 0) is None
    assert pool.get(1, 1) == page_of(1, 1000)


@pytest.mark.parametrize("length", [0, 1, 4095, 4097])
def test_clause_4_a_put_of_a_wrong_length_removes_the_old_page(make_tmem: MakeTmem, length: int) -> None:
    pool = make_tmem(1)[1].new_pool()
    pool.put(1, 1, page_of(1, 2000))
    with pytest.raises(ValueError, match="bytes"):
        pool.put(1, 1, bytes(length))
    assert pool.get(1, 1) is None


@pytest.mark.parametrize("kind", KINDS)
def test_clause_4_an_accepted_put_replaces_the_page(make_tmem: MakeTmem, kind: dict[str, Any]) -> None:
    pool = make_tmem(2)[1].new_pool(**kind)
    for size in (2000, 8, 4096, 100, 2000):
        assert pool.put(1, 1, page_of(size, size))
    assert pool.put(1, 1, filled(1))
    assert pool.put(1, 1, filled(2))
    assert pool.get(1, 1) == filled(2)
    assert pool.stats.pages == (0 if kind == KINDS[0] else 1)
