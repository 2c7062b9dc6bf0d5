"""Whatever guests do in whatever order, the ledger is right and nobody loses a persistent slab."""

from __future__ import annotations

import pytest

from tests.lending.lender.churn import Churn
from tmem.lending.lender.reclaimpolicy import RECLAIM_POLICIES


@pytest.mark.parametrize("policy", RECLAIM_POLICIES)
@pytest.mark.parametrize("seed", range(2))
def test_a_few_guests_that_do_anything_leave_a_ledger_that_holds(policy: str, seed: int) -> None:
    churn = Churn(seed, guests=5, size=120, policy=policy)
    world = churn.run(800, check_every=1)
    assert world.lender.stats().counters["lent_slabs"] > 0


def test_a_hundred_guests_leave_a_ledger_that_holds() -> None:
    world = Churn(1, guests=100, size=2000, policy="mix").run(2000, check_every=200)
    assert len(world.guests) > 50


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_thousand_guests_leave_a_ledger_that_holds(seed: int) -> None:
    world = Churn(seed, guests=1000, size=20_000, policy="mix").run(8000, check_every=500)
    assert len(world.guests) > 500
