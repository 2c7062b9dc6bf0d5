"""Guests and lender act in random order: no byte is wrong, and the ledger agrees with the guests in the end."""

from __future__ import annotations

import pytest

from tests.lending.together import Together

STEPS = 1500


def run(seed: int) -> None:
    """Do many random steps, then settle and compare."""
    world = Together(seed, size=32)
    try:
        for _ in range(STEPS):
            world.step()
        world.settle()
        world.check()
        world.agree()
        assert sum(guest.borrower.counters.lent_slabs for guest in world.guests) > world.size
    finally:
        world.close()


@pytest.mark.parametrize("seed", range(6))
def test_guests_and_lender_agree_after_random_steps(seed: int) -> None:
    run(seed)


@pytest.mark.slow
def test_guests_and_lender_agree_for_many_seeds() -> None:
    for seed in range(6, 300):
        run(seed)
