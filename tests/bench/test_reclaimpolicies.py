"""The policies that only benches use."""

from __future__ import annotations

from bench.models.reclaimpolicies import Greedy, Utility
from tests.lending.lender.test_reclaimpolicy import activity, divide, idle
from tmem.lending.lender.reclaimpolicy import IDLE_SECONDS


def test_utility_moves_memory_to_the_guest_with_more_hits() -> None:
    poor, rich, asker = activity(100, 1.0, 100), activity(100, 60.0, 1000), activity(100, 60.0, 500, ghosts=500)
    assert divide(Utility, [poor, rich], 10, asker) == [10, 0]
    assert divide(Utility, [rich], 10, asker) == [0]


def test_utility_reclaims_from_an_idle_guest_by_age() -> None:
    assert divide(Utility, [idle(100, 1.0)], 10, activity(10, 5.0)) == [10], "its pages are 10 s old by now"
    assert divide(Utility, [idle(100, 1.0)], 10, activity(10, 20.0)) == [0], "the asker's are older"


def test_utility_ranks_a_guest_without_reports_as_idle() -> None:
    stopped = activity(100, 1.0, hits=1000)
    assert Utility().value(stopped, 100.5)[0] == 1
    assert Utility().value(stopped, 100.1 + IDLE_SECONDS)[0] == 0


def test_greedy_takes_from_nobody() -> None:
    assert divide(Greedy, [idle(100, 60.0)], 10, activity(0, 1.0)) == [0]
