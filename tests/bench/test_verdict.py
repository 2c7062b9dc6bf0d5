"""The interval holds the true median as often as it says; a goal inside it is not decided."""

from __future__ import annotations

import random

import pytest

from bench.tools.verdict import Verdict, in_turn, spread


@pytest.mark.parametrize(("count", "cut"), [(6, 1), (8, 1), (9, 2), (11, 2), (12, 3), (15, 4), (20, 6)])
def test_as_many_values_are_cut_off_as_the_tables_of_the_sign_test_say(count: int, cut: int) -> None:
    found = spread([float(value) for value in range(1, count + 1)])
    assert (found.low, found.high) == (cut, count + 1 - cut)
    assert found.median == (count + 1) / 2


def test_the_interval_covers_the_true_median_in_95_percent_of_runs() -> None:
    source = random.Random(7)
    inside = 0
    for _ in range(2000):
        found = spread([source.expovariate(1.0) ** 3 for _ in range(9)])
        inside += found.low <= 0.6931**3 <= found.high
    assert inside >= 0.95 * 2000 - 30


def test_a_goal_is_decided_only_if_the_interval_excludes_it() -> None:
    found = spread([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert [found.at_most(bound) for bound in (0.5, 3.0, 6.0)] == [Verdict.MISSED, Verdict.OPEN, Verdict.MET]
    assert [found.at_least(bound) for bound in (1.0, 3.0, 6.5)] == [Verdict.MET, Verdict.OPEN, Verdict.MISSED]


def test_fewer_than_six_values_decide_nothing_and_show_their_extremes() -> None:
    found = spread([1.0, 1.0, 1.1, 1.0, 1.2])
    assert found.at_most(99.0) == found.at_least(0.0) == Verdict.OPEN
    assert found.text(".2f", "×") == "1.00× (1.00 to 1.20)"
    assert spread([2.0]).text(".1f", " s") == "2.0 s"


def test_every_second_round_goes_backwards() -> None:
    assert [in_turn("abc", number) for number in range(3)] == [["a", "b", "c"], ["c", "b", "a"], ["a", "b", "c"]]
