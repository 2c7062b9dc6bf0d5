"""Whatever guests do in whatever order, the ledger is right and nobody loses a persistent slab."""

from __future__ import annotations

import pytest

from tests.lending.lender.churn import Churn
from tmem.lending.lender.reclaimpolicy import RECLAIM_POLICIES, ReclaimPolicy


@pytest.mark.parametrize("policy", RECLAIM_POLICIES.values())
@pytest.mark.parametrize("seed", range(2))
def test_the_ledger_holds_for_a_few_random_guests(policy: type[ReclaimPolicy], seed: int) -> None:
    churn = Churn(seed, guests=5, size=120, policy=policy)
    simulation = churn.run(800, check_every=1)
    assert simulation.lender.stats().counters["lent_slabs"] > 0


def test_the_ledger_holds_for_a_hundred_random_guests() -> None:
    simulation = Churn(1, guests=100, size=2000).run(2000, check_every=200)
    assert len(simulation.guests) > 50


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_the_ledger_holds_for_a_thousand_random_guests(seed: int) -> None:
    simulation = Churn(seed, guests=1000, size=20_000).run(8000, check_every=500)
    assert len(simulation.guests) > 500
