"""The policies: whose slab goes first, and who may have it."""

from __future__ import annotations

from math import inf

import pytest

from tmem.lending.lender.reclaimpolicy import (
    IDLE_SECONDS,
    AgeUtility,
    GuestActivity,
    ReclaimPolicy,
    choose,
)
from tmem.lending.protocol.messages import Report

FORCED = (inf, inf)
POLICIES = [AgeUtility, ReclaimPolicy]


def report(age: float | None, hits: int = 0, ghost_hits: int = 0, misses: int = 0) -> Report:
    return Report(age, 100, 0, hits + misses, hits, misses, ghost_hits)


def activity(slabs: int, age: float | None, hits: int = 0, ghosts: int = 0, weight: float = 1.0) -> GuestActivity:
    """Return a guest that is busy at time 100 and has had so many hits a second for a minute."""
    made = GuestActivity(weight, slabs)
    for second in range(41, 101):
        made.on_report(second, report(age, hits * second, ghosts * second, second))
    return made


def idle(slabs: int, age: float) -> GuestActivity:
    """Return a guest that was last busy at time 90."""
    made = GuestActivity(1.0, slabs)
    for second in range(41, 91):
        made.on_report(second, report(age, 1000 * second))
    made.on_report(91.0, report(age + 1.0, 90_000))
    return made


def divide(
    made: type[ReclaimPolicy], victims: list[GuestActivity], slabs: int, asker: GuestActivity | None = None
) -> list[int]:
    policy = made()
    policy.survey([*victims, *([asker] if asker is not None else [])], 100.0)
    bid = FORCED if asker is None else policy.bid(asker, 100.0)
    return choose(policy, [(victim, victim.slabs) for victim in victims], slabs, bid, 100.0)


@pytest.mark.parametrize("policy", POLICIES)
def test_an_unconditional_bid_gets_as_many_slabs_as_victims_have(policy: type[ReclaimPolicy]) -> None:
    victims = [activity(10, 5.0, 3), idle(10, 1.0), activity(10, None), activity(5, 50.0, 100)]
    assert divide(policy, victims, 35) == [10, 10, 10, 5]
    assert divide(policy, victims, 99) == [10, 10, 10, 5]
    assert sum(divide(policy, victims, 7)) == 7


def test_age_takes_from_the_oldest_until_another_is_older() -> None:
    assert divide(ReclaimPolicy, [activity(100, 60.0), activity(100, 30.0)], 30) == [30, 0]
    given = divide(ReclaimPolicy, [activity(100, 60.0), activity(100, 50.0)], 100)
    assert given[0] > given[1] > 0, "what is left of the older one is younger than the other in the end"


def test_a_guest_without_a_page_gives_its_unused_slabs_first() -> None:
    unused = activity(10, None)
    unused.lent = 10.0
    fresh = activity(10, None)
    fresh.lent = 200.0
    assert divide(ReclaimPolicy, [activity(10, 60.0), unused], 5) == [0, 5]
    assert divide(ReclaimPolicy, [activity(10, 60.0), fresh], 5) == [5, 0], "it has just been lent them"


@pytest.mark.parametrize("policy", POLICIES)
def test_a_guest_that_does_nothing_gives_way_by_age_and_at_once(policy: type[ReclaimPolicy]) -> None:
    asker = activity(10, 5.0)
    assert divide(policy, [idle(100, 1.0)], 10, asker) == [10], "its pages are 10 s old by now"
    assert divide(policy, [idle(100, 1.0)], 10, activity(10, 20.0)) == [0], "the asker's are older"


def test_a_guest_without_reports_is_idle() -> None:
    stopped, asker = activity(100, 1.0, hits=1000), activity(10, 1.5)
    policy = AgeUtility()
    policy.survey([stopped, asker], 100.5)
    assert policy.value(stopped, 100.5)[0] == 1
    assert policy.value(stopped, 100.1 + IDLE_SECONDS)[0] == 0


def test_mix_lets_useful_pages_stay_longer() -> None:
    useful, useless, asker = activity(100, 60.0, hits=400), activity(100, 40.0, hits=1), activity(100, 30.0, hits=100)
    assert divide(ReclaimPolicy, [useful, useless], 10, asker) == [10, 0]
    assert divide(AgeUtility, [useful, useless], 10, asker) == [0, 10]


def test_mix_gives_a_newcomer_without_hits_some_memory() -> None:
    newcomer = activity(10, 1.0)
    assert divide(AgeUtility, [activity(1000, 60.0, hits=10_000)], 10, newcomer) == [10]


@pytest.mark.parametrize("policy", POLICIES)
def test_weight_makes_pages_count_as_younger(policy: type[ReclaimPolicy]) -> None:
    assert divide(policy, [activity(10, 60.0, weight=3.0), activity(10, 30.0)], 2) == [0, 2]
