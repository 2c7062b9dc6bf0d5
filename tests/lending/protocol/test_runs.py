"""Runs of slab numbers: counted, made, joined and cut without losing a slab."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.lending.protocol import samples
from tmem.lending.protocol.runs import (
    Runs,
    count,
    end,
    merge,
    pop_slabs,
    runs_of,
    slabs_of,
    split_by_slabs,
    split_for_messages,
    validate,
)

small_runs = st.sets(st.integers(0, 60)).map(runs_of)


def test_numbers_become_runs() -> None:
    assert runs_of([]) == ()
    assert runs_of([5, 1, 2, 3, 9, 8]) == ((1, 3), (5, 1), (8, 2))


@given(st.sets(st.integers(0, 60)))
def test_runs_hold_the_numbers_that_they_are_made_of(slabs: set[int]) -> None:
    runs = runs_of(slabs)
    assert slabs_of(runs) == sorted(slabs)
    assert count(runs) == len(slabs)
    assert end(runs) == max(slabs, default=-1) + 1
    assert merge(runs) == merge((slab, 1) for slab in sorted(slabs)) == runs
    validate(runs, 61)


@given(small_runs, st.integers(1, 20))
def test_pieces_are_full_but_for_the_last_and_lose_nothing(runs: Runs, max_slabs: int) -> None:
    pieces = list(split_by_slabs(runs, max_slabs))
    assert [slab for piece in pieces for slab in slabs_of(piece)] == slabs_of(runs)
    assert all(count(piece) == max_slabs for piece in pieces[:-1])
    assert all(0 < count(piece) <= max_slabs for piece in pieces)


@given(samples.runs(), st.integers(1, 5))
def test_runs_in_parts_are_all_there(runs: Runs, most: int) -> None:
    parts = list(split_for_messages(runs, most))
    assert sum((part for part, _ in parts), ()) == runs
    assert [last for _, last in parts] == [False] * (len(parts) - 1) + [True]
    assert all(len(part) <= most for part, _ in parts)


def test_a_piece_of_a_queue_stays_ascending() -> None:
    queue = deque([(4, 2), (8, 1), (0, 3)])
    assert pop_slabs(queue, 9) == ((4, 2), (8, 1))
    assert pop_slabs(queue, 2) == ((0, 2),)
    assert list(queue) == [(2, 1)]


@pytest.mark.parametrize("runs", [((0, 2), (1, 1)), ((3, 1), (0, 1)), ((0, 9),)])
def test_runs_that_overlap_descend_or_leave_the_arena_are_invalid(runs: Runs) -> None:
    with pytest.raises(ValueError, match="run"):
        validate(runs, 8)
