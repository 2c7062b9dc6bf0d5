"""What a user may have tmemd do, whatever the number of its connections."""

from __future__ import annotations

import pytest

from tmem.lending.daemon.budget import (
    ALL_FRAMES_AT_ONCE,
    CONNECT_FRAMES,
    FRAMES_A_SECOND,
    FRAMES_AT_ONCE,
    Budget,
    Budgets,
)


def delay(budgets: Budgets, uid: int, now: float = 0.0) -> float:
    """Tell how long a new connection of the user would have to wait."""
    return max((budget.delay(now) for budget in budgets.of(uid, (), now)), default=0.0)


def test_a_budget_is_spent_and_grows_again() -> None:
    budget = Budget(10.0, 100.0, 0.0)
    budget.spend(0.0, 100)
    assert budget.delay(0.0) == 0.0
    budget.spend(0.0, 20)
    assert budget.delay(0.0) == pytest.approx(2.0)
    assert budget.delay(1.5) == pytest.approx(0.5)
    assert budget.delay(2.0) == 0.0
    assert not budget.is_full(2.0)
    assert budget.is_full(100.0)


def test_all_connections_of_a_user_share_one_budget() -> None:
    budgets = Budgets(frozenset({0}), 0.0)
    for _ in range(4):
        for budget in budgets.of(1000, (), 0.0):
            budget.spend(0.0, int(FRAMES_AT_ONCE / 4))
    assert delay(budgets, 1000) == pytest.approx(5 * CONNECT_FRAMES / FRAMES_A_SECOND)
    assert delay(budgets, 2000) == 0.0


def test_all_users_that_are_not_trusted_share_another() -> None:
    budgets = Budgets(frozenset({0, 7}), 0.0)
    for uid in range(1000, 1004):
        for budget in budgets.of(uid, (), 0.0):
            budget.spend(0.0, int(ALL_FRAMES_AT_ONCE / 4))
    assert delay(budgets, 2000) > 0.0
    assert delay(budgets, 0) == delay(budgets, 7) == 0.0


def test_who_hangs_up_and_connects_again_has_no_more_for_it() -> None:
    budgets = Budgets(frozenset(), 0.0)
    budgets.of(1000, (), 0.0)[0].spend(0.0, 2 * int(FRAMES_AT_ONCE))
    budgets.of(2000, (), 0.0)
    assert delay(budgets, 1000) > 1.0
    kept = budgets.of(3000, (), 1000.0)[0]
    budgets.of(4000, {3000}, 2000.0)
    assert budgets.of(3000, (), 2000.0)[0] is kept, "there is a connection that spends of it"
