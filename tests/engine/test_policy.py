"""The policy in C counts what its oracle counts, and does what it was chosen for."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.policymodel import replay
from tmem.engine import ffi, lib


def replayed(pages: Sequence[int], capacity: int, share: float | None = None) -> int:
    """Return the misses of the C policy."""
    trace = array("Q", pages)
    buffer = ffi.cast("uint64_t *", ffi.from_buffer(trace))
    return int(lib.tmem_replay(buffer, len(trace), capacity, -1.0 if share is None else share))


def phase(kind: str, pages: int, accesses: int, seed: int) -> list[int]:
    """Return accesses of one kind."""
    source = random.Random(seed)
    if kind == "loop":
        return [number % pages for number in range(accesses)]
    if kind == "scan":
        return [seed * 1_000_000 + number for number in range(accesses)]
    if kind == "twice":  # each page again soon after
        return [seed * 1_000_000 + number // 2 - number % 2 * 3 for number in range(8, accesses)]
    return [int(pages * source.random() ** 3) for _ in range(accesses)]


PHASES = st.lists(
    st.tuples(
        st.sampled_from(["loop", "scan", "twice", "skewed"]),
        st.integers(1, 3000),
        st.integers(0, 2500),
        st.integers(1, 9),
    ),
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(PHASES, st.integers(1, 1500), st.sampled_from([None, 0.01, 0.1, 0.5, 0.9, 1.0]))
def test_c_counts_the_misses_of_the_oracle(
    phases: list[tuple[str, int, int, int]], capacity: int, share: float | None
) -> None:
    trace = [page for each in phases for page in phase(*each)]
    assert replayed(trace, capacity, share) == replay(trace, capacity, share)


@pytest.mark.parametrize("capacity", [600, 1279, 1281, 3000, 9000])
def test_c_chooses_as_the_oracle_where_pages_are_sampled(capacity: int) -> None:
    trace = [
        page
        for number in range(3)
        for kind in ("skewed", "loop", "scan")
        for page in phase(kind, 2 * capacity, 4 * capacity, number + 1)
    ]
    assert replayed(trace, capacity) == replay(trace, capacity, None)


@pytest.mark.parametrize("scan", [20_000, 33_000, 50_000, 64_000])
def test_main_gives_way_to_a_loop_though_it_was_not_used_for_long(scan: int) -> None:
    # A tick is one miss here: the stamps of main's pages get older than half of their range.
    old = [number % 80 for number in range(400)]
    loop = [10_000_000 + number % 60 for number in range(6000)]
    trace = [*old, *range(1_000_000, 1_000_000 + scan), *loop]
    misses = replayed(trace, 100, 0.1)
    assert misses == replay(trace, 100, 0.1)
    assert misses < 80 + scan + 20 * 60


def test_a_scan_does_not_push_out_pages_in_use() -> None:
    used = [number % 50 for number in range(500)]
    trace = [*used, *range(1000, 3000), *used]
    assert replayed(trace, 100) == 50 + 2000


def test_a_loop_that_is_too_long_keeps_a_part_of_itself() -> None:
    trace = [number % 120 for number in range(120 * 20)]
    assert replayed(trace, 100) < len(trace) / 2


@pytest.mark.parametrize("capacity", [0, 1, 2, 3, 7])
def test_tiny_capacities_work(capacity: int) -> None:
    trace = phase("skewed", 40, 3000, 1)
    assert replayed(trace, capacity) == replay(trace, max(1, capacity), None)


def test_pages_that_fit_miss_once() -> None:
    assert replayed([number % 70 for number in range(700)], 70) == 70
    assert replayed([], 70) == 0
