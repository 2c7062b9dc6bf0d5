"""Whose memory comes back: of whom it is asked, from whom it is taken, and what is never taken."""

from __future__ import annotations

from math import inf

import pytest

from tests.lending.lender.simulation import Guest, Simulation, add, counters, hold, report, simulation
from tmem.lending.lender.actions import GuestFault
from tmem.lending.lender.lender import BATCH_SLABS, REVOKE_TIMEOUT
from tmem.lending.lender.reclaimer import CHUNK_SLABS
from tmem.lending.lender.stats import Denial
from tmem.lending.protocol import messages as m
from tmem.lending.protocol.kind import Kind

# Taking back.


def test_the_guest_with_the_oldest_page_is_asked_to_give() -> None:
    here = simulation()
    old, young, asker = add(here), add(here), add(here)
    hold(here, old, 50)
    hold(here, young, 50)
    report(here, old, 100.0)
    report(here, young, 10.0)
    hold(here, asker, 20)
    assert (len(old.ephemeral), len(young.ephemeral), len(asker.ephemeral)) == (30, 50, 20)
    assert counters(here)["revoked_slabs"] == 20
    assert counters(here)["taken_slabs"] == 0


def test_a_guest_with_older_pages_gets_no_slabs_of_others() -> None:
    here = simulation()
    idle, busy = add(here), add(here)
    hold(here, idle, 50)
    hold(here, busy, 50)
    report(here, idle, 100.0)
    report(here, busy, 10.0)
    hold(here, idle, 10, age=100.0)
    assert idle.denied == [Denial.YOUNGER.value]
    hold(here, busy, 10, age=10.0)
    assert len(busy.ephemeral) == 60


def test_weight_makes_pages_count_as_younger() -> None:
    here = simulation()
    heavy, light, asker = add(here), add(here), add(here)
    hold(here, heavy, 50)
    hold(here, light, 50)
    report(here, heavy, 100.0)
    report(here, light, 60.0)
    here.perform(here.lender.set_limits(here.now, heavy.number, weight=2.0))
    hold(here, asker, 5)
    assert (len(heavy.ephemeral), len(light.ephemeral)) == (50, 45)


def test_a_floor_is_never_cut_into_and_always_granted() -> None:
    here = simulation()
    idle, other = add(here), add(here)
    here.perform(here.lender.set_limits(here.now, idle.number, floor=30))
    hold(here, idle, 100)
    report(here, idle, 1000.0)
    hold(here, other, 100)
    assert (len(idle.ephemeral), len(other.ephemeral)) == (30, 70)
    idle.give(20)
    here.settle()
    hold(here, other, 20)
    report(here, other, 1.0)
    hold(here, idle, 25, age=50.0)  # older, but below its floor as far as 20 of them go
    assert (len(idle.ephemeral), len(other.ephemeral)) == (30, 70)


def test_a_stopped_guest_is_reclaimed_after_its_timeout_and_recovers() -> None:
    here = simulation()
    stopped, asker = add(here), add(here)
    hold(here, stopped, 100)
    stopped.stopped = True
    report(here, stopped, 50.0)
    asker.ask(40)
    here.hear(asker)
    assert here.lender.deadline() == pytest.approx(here.now + REVOKE_TIMEOUT)
    here.settle()
    assert len(asker.ephemeral) == 40
    assert counters(here)["unanswered_revokes"] == 1
    assert counters(here)["taken_slabs"] == 40
    asker.ask(10)
    here.hear(asker)
    assert here.lender.deadline() is None, "a guest that was silent is not waited for again"
    here.settle()
    assert len(asker.ephemeral) == 50
    stopped.populated.add(0)  # a late put
    stopped.stopped = False
    here.settle()
    assert len(stopped.ephemeral) == 18, "it also answers the Revoke of 32 that it had not read"
    hold(here, stopped, 30)
    assert len(stopped.ephemeral) == 48


def test_a_return_waiting_in_the_socket_is_read_before_a_reclaim() -> None:
    here = simulation()
    slow, asker = add(here), add(here)
    hold(here, slow, 100)
    report(here, slow, 50.0)
    asker.ask(10)
    here.hear(asker)
    slow.read()
    here.pass_time(1.0)
    here.settle()
    assert counters(here)["taken_slabs"] == counters(here)["late_returned_slabs"] == 0
    assert len(asker.ephemeral) == 10


def test_takens_are_sent_in_steps() -> None:
    here = simulation(200)
    stopped, asker = add(here), add(here)
    hold(here, stopped, 200)
    stopped.stopped = True
    report(here, stopped, 50.0)
    asker.ask(150)
    here.hear(asker)
    here.pass_time(REVOKE_TIMEOUT)
    told = [message for message in stopped.inbox if isinstance(message, m.Taken)]
    assert [sum(count for _, count in taken.runs) for taken in told] == [32, 32, 32, 32, 22]
    stopped.stopped = False
    here.settle()


def test_a_guest_that_answers_with_less_is_taken_from() -> None:
    here = simulation()
    miser, asker = add(here), add(here)
    hold(here, miser, 100)
    report(here, miser, 50.0)
    asker.ask(10)
    here.hear(asker)
    revoke = miser.inbox.popleft()
    assert isinstance(revoke, m.Revoke)
    miser.give(4, answer=revoke.serial)
    here.settle()
    assert len(asker.ephemeral) == 10
    assert counters(here)["taken_slabs"] == 6


@pytest.mark.parametrize(
    "message", [m.Return(((0, 1),)), m.Return(((5000, 1),)), m.Confirm(7), m.Claim((), True, True)]
)
def test_returning_confirming_or_claiming_foreign_slabs_is_a_fault(message: m.FromGuest) -> None:
    here = simulation()
    guest = add(here)
    guest.say(message)
    with pytest.raises(GuestFault):
        here.hear(guest)
    here.lender.check()


def test_a_large_target_is_taken_in_chunks_with_messages_in_between() -> None:
    here = simulation(4 * CHUNK_SLABS)
    away, other = add(here, 4 * CHUNK_SLABS), add(here)
    while len(away.ephemeral) < 3 * CHUNK_SLABS:
        hold(here, away, 1024)
    here.hang_up(away)
    for piece in range(1, 4):
        if piece == 1:
            here.perform(here.lender.drain(here.now, away.number))
        else:
            assert here.lender.deadline() == -inf, "the rest is taken at once, and not in the same stretch"
            here.pass_time(0.0)
        assert counters(here)["taken_slabs"] == piece * CHUNK_SLABS
        report(here, other, None)
    assert here.lender.deadline() is None
    here.settle()
    assert here.lender.stats().ephemeral == 0


# Between users.


def busy(here: Simulation, guest: Guest, age: float, hits: int) -> None:
    """Send Reports of a busy guest with so many hits."""
    for times in (1, 2):
        report(here, guest, age, hits=hits * times, puts=times, misses=times)


def test_a_user_reaches_exactly_its_share_whatever_others_report() -> None:
    here = simulation(200)
    liar, modest = add(here, uid=1), add(here, uid=2)
    hold(here, liar, 200)
    busy(here, liar, 0.0, 10**9)
    hold(here, modest, 130, age=1000.0)
    assert (len(liar.ephemeral), len(modest.ephemeral)) == (100, 100)
    hold(here, modest, 1, age=1000.0)
    busy(here, modest, 1000.0, 0)
    hold(here, liar, 1, age=0.0)
    assert modest.denied == liar.denied == [Denial.YOUNGER.value]


def test_memory_that_a_user_does_not_use_is_lent_to_others() -> None:
    here = simulation()
    first, second = add(here, uid=1), add(here, uid=2)
    hold(here, first, 100)
    busy(here, first, 10.0, 1)
    here.pass_time(60.0)
    hold(here, second, 100, age=1.0)
    assert len(second.ephemeral) == 100, "an idle guest keeps no part"


def test_a_smaller_size_reclaims_first_from_users_above_their_share() -> None:
    here = simulation()
    liar, modest = add(here, uid=1), add(here, uid=2)
    hold(here, liar, 70)
    hold(here, modest, 30)
    busy(here, liar, 0.0, 10**9)
    busy(here, modest, 1000.0, 0)
    here.perform(here.lender.resize(here.now, 60)[1])
    here.settle()
    assert (len(liar.ephemeral), len(modest.ephemeral)) == (30, 30)


def test_a_guest_that_reports_no_age_gets_a_start_and_then_yields() -> None:
    here = simulation(300)
    silent, other = add(here), add(here)
    hold(here, other, 300)
    busy(here, other, 0.5, 1)
    hold(here, silent, BATCH_SLABS)
    here.pass_time(1.0)
    busy(here, other, 0.5, 1)
    hold(here, silent, 100)
    assert len(silent.ephemeral) == BATCH_SLABS
    assert silent.denied == [Denial.YOUNGER.value]


# Persistent slabs.


def test_a_persistent_request_takes_ephemeral_memory_and_never_persistent() -> None:
    here = simulation()
    ephemeral, persistent, asker = add(here), add(here, persistent=60), add(here, persistent=40)
    hold(here, persistent, 60, persistent=True)
    hold(here, ephemeral, 40)
    report(here, ephemeral, 1.0)
    hold(here, asker, 40, persistent=True, age=1000.0)
    assert (len(ephemeral.ephemeral), len(asker.persistent)) == (0, 40)
    hold(here, ephemeral, 10)
    assert ephemeral.denied == [Denial.YOUNGER.value]


def test_a_persistent_request_takes_the_guests_own_pages_if_oldest() -> None:
    here = simulation()
    asker, other = add(here, persistent=50), add(here)
    hold(here, asker, 50)
    hold(here, other, 50)
    report(here, asker, 100.0)
    report(here, other, 1.0)
    hold(here, asker, 10, persistent=True)
    assert (len(asker.ephemeral), len(asker.persistent), len(other.ephemeral)) == (40, 10, 50)


def test_persistent_slabs_are_revoked_and_not_taken() -> None:
    here = simulation()
    guest = add(here, persistent=50)
    hold(here, guest, 20, persistent=True)
    guest.refuses = True
    here.perform(here.lender.revoke(here.now, guest.number, 5, Kind.PERSISTENT))
    here.pass_time(60.0)
    here.settle()
    assert len(guest.persistent) == 20
    guest.refuses = False
    here.perform(here.lender.revoke(here.now, guest.number, 50, Kind.PERSISTENT))
    here.settle()
    assert len(guest.persistent) == 0
