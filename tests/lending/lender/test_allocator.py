"""How an Ask is answered: at once, in batches, not at all; one decision at a time, in a simulated simulation."""

from __future__ import annotations

import pytest

from tests.lending.lender.simulation import add, counters, hold, simulation
from tmem.lending.lender.actions import GuestFault
from tmem.lending.lender.lender import BATCH_SLABS
from tmem.lending.lender.stats import Denial
from tmem.lending.protocol import messages as m


def test_free_slabs_are_lent_at_once() -> None:
    here = simulation()
    guest = add(here)
    guest.ask(30)
    here.hear(guest)
    here.work()
    assert guest.inbox[-1] == m.Lend(((0, 30),), 1, False, True)
    here.settle()
    assert here.lender.stats().free == 70


def test_a_large_ask_is_answered_in_batches_of_which_the_last_is_done() -> None:
    here = simulation(1000)
    guest = add(here)
    guest.ask(2 * BATCH_SLABS + 1)
    here.hear(guest)
    here.work()
    lends = [message for message in guest.inbox if isinstance(message, m.Lend)]
    assert [sum(count for _, count in lend.runs) for lend in lends] == [BATCH_SLABS, BATCH_SLABS, 1]
    assert [lend.done for lend in lends] == [False, False, True]
    here.settle()


def test_an_ask_that_can_never_be_met_is_denied_with_the_reason() -> None:
    here = simulation(10)
    guest = add(here, slabs=20)
    hold(here, guest, 15)
    assert len(guest.ephemeral) == 10
    hold(here, guest, 1)
    hold(here, guest, 1, persistent=True)
    assert guest.denied == [Denial.YOUNGER.value, Denial.PERSISTENT_CAP.value]
    here.perform(here.lender.set_limits(here.now, guest.number, cap=10))
    hold(here, guest, 1)
    assert guest.denied[-1] == Denial.CAP.value
    assert counters(here)["denied_cap"] == counters(here)["denied_persistent_cap"] == 1


def test_a_memory_shortage_denies_and_frees_unpopulated_slabs() -> None:
    here = simulation()
    guest = add(here)
    here.short = 3
    hold(here, guest, 5)
    hold(here, guest, 5)
    assert guest.ephemeral == {0, 1, 2}
    assert guest.denied == [Denial.MEMORY.value]
    assert here.lender.stats().free == 97
    assert counters(here)["unreal_slabs"] == 7


def test_a_second_ask_before_the_answer_is_a_fault() -> None:
    here = simulation()
    guest = add(here)
    guest.say(m.Ask(1, 5))
    guest.say(m.Ask(2, 5))
    with pytest.raises(GuestFault):
        here.hear(guest)
    assert counters(here)["faults"] == 1
