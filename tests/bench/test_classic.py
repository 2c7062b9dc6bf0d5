"""The classic policies count as by hand, and none beats Belady."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from bench.models.classic import POLICIES, belady, fifo, lru, s3fifo


def best_possible(trace: list[int], pages: int) -> int:
    """Return the fewest misses that any choice of victims gives, by trying all."""
    held: dict[frozenset[int], int] = {frozenset(): 0}
    for page in trace:
        following: dict[frozenset[int], int] = {}
        for cache, misses in held.items():
            if page in cache:
                choices = [(cache, misses)]
            else:
                kept = min(len(cache), pages - 1)
                choices = [(frozenset(some) | {page}, misses + 1) for some in combinations(cache, kept)]
            for choice, count in choices:
                following[choice] = min(count, following.get(choice, count))
        held = following
    return min(held.values())


def test_lru_and_fifo_count_as_by_hand() -> None:
    trace = [1, 2, 1, 3, 1, 2]
    assert lru(trace, 2) == 4, "3 evicts 2, 2 evicts 3"
    assert fifo(trace, 2) == 5, "3 evicts 1, 1 evicts 2, 2 evicts 3"


@pytest.mark.parametrize("seed", range(8))
def test_belady_is_the_best_possible(seed: int) -> None:
    source = random.Random(seed)
    trace = [source.randrange(6) for _ in range(14)]
    assert belady(trace, 3) == best_possible(trace, 3)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("pages", [1, 2, 10, 40])
def test_no_policy_beats_belady_nor_misses_less_than_every_page_once(pages: int, seed: int) -> None:
    source = random.Random(seed)
    trace = [int(100 * source.random() ** 2) for _ in range(2000)]
    least = belady(trace, pages)
    for policy in POLICIES.values():
        assert len(set(trace)) <= least <= policy(trace, pages) <= len(trace)


def test_every_policy_misses_each_page_once_when_all_fit() -> None:
    trace = [number % 30 for number in range(300)]
    assert {policy(trace, 40) for policy in POLICIES.values()} == {30}


def test_a_scan_does_not_push_out_what_s3fifo_has_in_main() -> None:
    hot = [number % 8 for number in range(80)]
    scan = list(range(1000, 1100))
    assert s3fifo(hot + scan + hot, 20) == 8 + 100
    assert lru(hot + scan + hot, 20) == 8 + 100 + 8
