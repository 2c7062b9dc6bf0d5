"""Whatever the order in which guests, lender and executor act, no byte is wrong and the books agree in the end."""

from __future__ import annotations

import pytest

from tests.lending.together import Together

STEPS = 1500


def live_through(seed: int) -> None:
    """Let much happen, then let everybody finish."""
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
def test_guests_and_lender_agree_whatever_happens(seed: int) -> None:
    live_through(seed)


@pytest.mark.slow
def test_guests_and_lender_agree_whatever_happens_in_many_worlds() -> None:
    for seed in range(6, 300):
        live_through(seed)
