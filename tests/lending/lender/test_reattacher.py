"""Guests that lost their connection, or their tmemd, and come back with what they hold."""

from __future__ import annotations

import pytest

from tests.lending.lender.simulation import Guest, Simulation
from tmem.lending.lender.actions import GuestFault, Refusal
from tmem.lending.lender.lender import EXCESS_AUDITS, Lender
from tmem.lending.lender.reattacher import CLAIM_SECONDS
from tmem.lending.lender.reclaimer import MAX_UNCONFIRMED, STEP_SLABS
from tmem.lending.protocol import messages as m
from tmem.lending.protocol.messages import BATCH_SLABS


def guest_of(slabs: int = 1000, number: int = 1) -> Guest:
    return Guest(number.to_bytes(16, "big"), slabs)


def holding(size: int = 100, ephemeral: int = 40, persistent: int = 10) -> tuple[Simulation, Guest]:
    """Return a simulation with one guest that holds something."""
    here, guest = Simulation(Lender(size)), guest_of()
    here.join(guest, persistent_slabs=20)
    for slabs, kind in ((ephemeral, False), (persistent, True)):
        if slabs:
            guest.ask(slabs, kind)
    here.settle()
    return here, guest


def restarted(here: Simulation, size: int = 100, forget: bool = False) -> Simulation:
    """Kill tmemd and start it anew."""
    here.restart(lambda holdings: Lender(size, holdings=holdings), forget)
    return here


def test_a_guest_that_comes_back_holds_what_it_held() -> None:
    here, guest = holding()
    here.hang_up(guest)
    assert here.lender.stats().free == 50
    here.join(guest, 20, again=True)
    here.settle()
    assert (len(guest.ephemeral), len(guest.persistent)) == (40, 10)
    assert here.lender.stats().counters["rejoins"] == 1


def test_slabs_of_an_unread_lend_are_not_held() -> None:
    here, guest = holding()
    guest.ask(5)
    here.hear(guest)
    here.work()
    here.hang_up(guest)
    here.join(guest, 20, again=True)
    here.settle()
    assert len(guest.ephemeral) == 40


def test_slabs_being_populated_when_the_connection_ended_are_freed() -> None:
    here, guest = holding()
    guest.ask(5)
    here.hear(guest)
    here.hang_up(guest)
    here.join(guest, 20, again=True)
    here.settle()
    assert len(guest.ephemeral) == 40
    assert here.lender.stats().promised == 0


def test_a_disconnected_guest_hears_of_lost_slabs_when_it_returns() -> None:
    here, guest = holding()
    here.hang_up(guest)
    other = guest_of(number=2)
    here.join(other)
    other.ask(60)
    here.settle()
    assert len(other.ephemeral) == 60
    assert here.lender.stats().counters["taken_slabs"] == 10
    here.join(guest, 20, again=True)
    here.settle()
    assert (len(guest.ephemeral), len(guest.persistent)) == (30, 10)
    assert here.lender.stats().counters["lost_slabs"] == 10


def test_a_guest_that_never_ends_its_claims_is_treated_as_disconnected() -> None:
    here, guest = holding()
    here.hang_up(guest)
    here.join(guest, 20, again=True)
    last = guest.outbox.pop()
    here.hear(guest)
    other = guest_of(number=2)
    here.join(other)
    other.ask(60)
    here.settle()
    assert len(other.ephemeral) == 60
    guest.say(last)
    here.settle()
    assert (len(guest.ephemeral), len(guest.persistent)) == (30, 10)


def test_a_known_token_is_admitted_once_and_only_from_its_guest() -> None:
    here, guest = holding()
    hello = m.Hello(m.VERSION, guest.token, "/x", guest.slabs, 20, True)
    with pytest.raises(Refusal, match="try again") as refusal:
        here.lender.join(0.0, hello, guest.uid, 1)
    assert refusal.value.retry
    here.hang_up(guest)
    for wrong, uid in (
        (m.Hello(m.VERSION, guest.token, "/x", guest.slabs, 20, False), guest.uid),
        (m.Hello(m.VERSION, guest.token, "/x", guest.slabs + 1, 20, True), guest.uid),
        (hello, guest.uid + 1),
    ):
        with pytest.raises(Refusal):
            here.lender.join(0.0, wrong, uid, 1)
    assert here.lender.stats().counters["refused_token"] == 3


@pytest.mark.parametrize(
    "claims",
    [
        pytest.param([m.Claim(((0, 1),), True, True)], id="an ephemeral slab as persistent"),
        pytest.param([m.Claim(((40, 1),), False, True)], id="a persistent slab as ephemeral"),
        pytest.param([m.Claim(((90, 1),), True, True)], id="a persistent slab that was never lent"),
        pytest.param([m.Claim(((0, 2),), False, False), m.Claim(((1, 2),), False, True)], id="a slab twice"),
        pytest.param([m.Claim(((999, 2),), False, True)], id="a slab beyond the arena"),
        pytest.param([m.Claim(((0, 1),), False, False), m.Ask(1, 1)], id="an Ask among the claims"),
    ],
)
def test_false_claims_are_a_fault_and_change_nothing(claims: list[m.FromGuest]) -> None:
    here, guest = holding()
    here.hang_up(guest)
    before = here.lender.holdings()
    guest.connected = True
    _, actions = here.lender.join(0.0, m.Hello(m.VERSION, guest.token, "/x", 1000, 20, True), guest.uid, 1)
    here.perform(actions)
    for claim in claims:
        guest.say(claim)
    with pytest.raises(GuestFault):
        here.hear(guest)
    guest.outbox.clear()
    here.hang_up(guest)
    assert [holding.ephemeral for holding in here.lender.holdings()] == [holding.ephemeral for holding in before]
    here.lender.check()


# A new tmemd.


def test_slabs_of_old_guests_are_not_lent_to_newcomers() -> None:
    here, guest = holding()
    there = restarted(here)
    newcomer = guest_of(number=2)
    there.join(newcomer)
    newcomer.ask(80)
    there.settle()
    assert len(newcomer.ephemeral) == 50
    there.join(guest, 20, again=True)
    there.settle()
    assert (len(guest.ephemeral), len(guest.persistent)) == (40, 10)
    assert there.lender.stats().free == 0


def test_a_guest_that_ended_during_the_restart_frees_its_memory() -> None:
    here, guest = holding()
    there = restarted(here)
    there.kill(guest)
    there.settle()
    assert there.lender.stats().free == 100


def test_a_slab_that_the_old_tmemd_had_just_taken_is_answered_as_taken() -> None:
    here, guest = holding()
    guest.populated -= {3, 4, 39}
    there = restarted(here)
    there.join(guest, 20, again=True)
    there.settle()
    assert guest.ephemeral == set(range(40)) - {3, 4, 39}
    assert there.lender.stats().counters["lost_slabs"] == 3


def test_holes_found_during_a_second_return_are_not_a_guest_fault() -> None:
    here, guest = holding()
    guest.populated -= {3, 4}
    there = restarted(here)
    there.join(guest, 20, again=True)
    there.hear(guest)
    there.hang_up(guest)
    there.join(guest, 20, again=True)
    there.work()
    there.settle()
    assert guest.ephemeral == set(range(40)) - {3, 4}


@pytest.mark.parametrize("forget", [False, True])
def test_nothing_is_reclaimed_from_a_guest_before_its_claims(forget: bool) -> None:
    here, guest = holding(ephemeral=0, persistent=10)  # the lowest slabs, where holdings have ephemeral ones
    guest.ask(40)
    here.settle()
    there = restarted(here, forget=forget)
    claims = guest.outbox
    there.join(guest, 20, again=True)
    last = claims.pop()
    there.hear(guest)
    there.hang_up(guest)
    other = guest_of(number=2)
    there.join(other)
    other.ask(90)
    there.settle()
    for _ in range(4):
        there.audit()
        there.settle()
    assert guest.persistent <= guest.populated, "a persistent page is lost"
    assert isinstance(last, m.Claim)
    there.join(guest, 20, again=True)
    there.settle()
    assert guest.persistent == set(range(10))
    assert there.lender.stats().counters["barred_guests"] == 0


def test_slabs_that_holdings_had_as_the_other_kind_stay_the_guests() -> None:
    here, guest = holding(ephemeral=0, persistent=10)
    guest.ask(40)
    here.settle()
    there = restarted(here)
    newcomer = guest_of(number=2)
    there.join(newcomer)
    newcomer.ask(50)
    there.settle()
    there.join(guest, 20, again=True)
    there.settle()
    assert (len(guest.ephemeral), len(guest.persistent)) == (40, 10)
    assert there.lender.stats().counters["refused_claim_slabs"] == 0


def test_a_smaller_size_takes_back_ephemeral_slabs_until_it_fits() -> None:
    here, guest = holding()
    there = restarted(here, size=25)
    assert there.lender.stats().free == 0
    there.join(guest, 20, again=True)
    there.settle()
    assert (len(guest.ephemeral), len(guest.persistent)) == (15, 10)


def test_the_size_stays_at_least_the_persistent_slabs() -> None:
    here, guest = holding()
    there = restarted(here, size=4)
    there.join(guest, 20, again=True)
    there.settle()
    assert (there.lender.size, len(guest.ephemeral), len(guest.persistent)) == (10, 0, 10)
    assert there.lender.rows(0.0)[0].persistent_cap == 10


def test_a_size_held_up_by_persistent_slabs_falls_with_them() -> None:
    here, guest = Simulation(Lender(100)), guest_of()
    here.join(guest, persistent_slabs=None)
    guest.ask(10, persistent=True)
    here.settle()
    there = restarted(here, size=4)
    assert there.lender.size == 10
    guest.persistent -= {0, 1, 2, 3}
    there.join(guest, None, again=True)
    there.settle()
    assert (there.lender.size, there.lender.rows(0.0)[0].persistent_cap) == (6, 6)
    guest.give(1, True)
    there.settle()
    assert (there.lender.size, there.lender.rows(0.0)[0].persistent_cap) == (5, 5)


def test_limits_outlive_a_restart() -> None:
    here, guest = holding()
    here.perform(here.lender.set_limits(0.0, guest.number, weight=3.0, cap=70, floor=11))
    here.perform(here.lender.freeze(0.0, guest.number))
    here.perform(here.lender.drain(0.0, guest.number))
    here.settle()
    there = restarted(here)
    row = there.lender.rows(0.0)[0]
    assert (row.weight, row.cap, row.floor, row.persistent_cap) == (3.0, 70, 11, 20)
    there.join(guest, 20, again=True)
    assert guest.inbox[-1] == m.Welcome(guest.number, 70, 20, frozen=True)
    there.settle()
    assert there.lender.rows(0.0)[0].state == "draining"


def test_without_holdings_claims_are_accepted_while_there_is_room() -> None:
    here, guest = holding()
    there = restarted(here, forget=True)
    other = guest_of(number=2)
    there.join(other)
    other.ask(70)
    there.settle()
    there.join(guest, 20, again=True)
    there.settle()
    assert (len(guest.ephemeral), len(guest.persistent)) == (20, 10)
    assert there.lender.stats().counters["refused_claim_slabs"] == 20


def test_without_holdings_persistent_claims_are_bounded_by_the_cap() -> None:
    here, guest = holding()
    there = restarted(here, forget=True)
    with pytest.raises(Refusal, match="promised"):
        there.lender.join(0.0, m.Hello(m.VERSION, guest.token, "/x", 1000, 500, True), guest.uid, 1)
    there.join(guest, 9, again=True)
    with pytest.raises(GuestFault):
        there.hear(guest)


def test_a_drained_guest_that_comes_back_gives_back_all_it_claims() -> None:
    here, guest = holding()
    guest.stopped = True
    here.perform(here.lender.drain(0.0, guest.number))
    here.hang_up(guest)
    guest.stopped = False
    here.join(guest, 20, again=True)
    here.settle()
    assert guest.ephemeral == set()


# What a few bytes may cost.


def test_claims_of_more_slabs_than_exist_are_a_fault_without_an_answer() -> None:
    here, stranger = Simulation(Lender(1000)), guest_of(1 << 24)
    here.join(stranger, again=True)
    stranger.read()
    stranger.outbox.clear()
    stranger.say(m.Claim(((0, 1 << 24),), False, True))
    with pytest.raises(GuestFault, match="more slabs than"):
        here.hear(stranger)
    assert not stranger.inbox
    here.lender.check()


def test_a_known_guest_cannot_claim_above_its_highest_lent_slab() -> None:
    here, guest = holding()
    here.hang_up(guest)
    here.join(guest, 20, again=True)
    guest.outbox.clear()
    guest.say(m.Claim(((50, 1),), False, True))
    with pytest.raises(GuestFault, match="not lent"):
        here.hear(guest)


def test_takens_are_sent_no_faster_than_the_guest_confirms_them() -> None:
    here, guest = holding(size=1000, ephemeral=1000, persistent=0)
    there = restarted(here, size=1000, forget=True)
    other = guest_of(number=2)
    there.join(other)
    other.ask(900)
    there.settle()
    there.join(guest, again=True)
    there.hear(guest)
    told = [message for message in guest.inbox if isinstance(message, m.Taken)]
    assert len(told) == MAX_UNCONFIRMED < 900 / STEP_SLABS
    there.settle()
    assert len(guest.ephemeral) == 100
    assert there.lender.stats().counters["lost_slabs"] == 900


# Claims that do not come.


def put_off(here: Simulation, slabs: int) -> Guest:
    """Return a guest that joins again with populated slabs and does not claim them."""
    guest = guest_of(number=7)
    guest.populated = set(range(slabs))
    here.join(guest, 20, again=True)
    guest.outbox.clear()
    return guest


def test_populated_slabs_of_a_guest_that_does_not_claim_are_booked() -> None:
    here = Simulation(Lender(100))
    guest, other = put_off(here, 30), guest_of(number=8)
    here.audit()
    here.settle()
    assert here.lender.stats().ephemeral == 30
    guest.populated |= set(range(50))
    here.audit()
    here.settle()
    assert here.lender.stats().ephemeral == 50
    here.join(other)
    other.ask(100)
    here.settle()
    assert len(other.ephemeral) == 50
    guest.populated |= set(range(500))
    here.audit()
    here.settle()
    assert here.lender.stats().ephemeral == 100, "there is no room for more"


@pytest.mark.parametrize("stays", [True, False])
def test_an_unknown_guest_that_does_not_claim_in_time_has_nothing(stays: bool) -> None:
    here = Simulation(Lender(100))
    guest = put_off(here, 30)
    if not stays:
        here.hang_up(guest)
    for _ in range(3):
        here.pass_time(CLAIM_SECONDS / 4)
        here.audit()
        here.settle()
        if not stays:
            here.join(guest, 20, again=True)
            guest.outbox.clear()
            here.hang_up(guest)
        assert len(guest.populated) == here.lender.stats().ephemeral == 30
    here.pass_time(CLAIM_SECONDS / 4)
    here.settle()
    assert (len(guest.populated), here.lender.stats().ephemeral) == (0, 0)
    for _ in range(EXCESS_AUDITS):
        guest.populated = set(range(BATCH_SLABS + 1))
        here.audit()
        here.settle()
        assert guest.populated == set()
    assert here.lender.stats().counters["barred_guests"] == 1


def test_claims_waiting_in_the_socket_are_in_time() -> None:
    here, guest = holding()
    there = restarted(here, forget=True)
    there.join(guest, 20, again=True)
    there.pass_time(CLAIM_SECONDS)
    there.settle()
    assert (len(guest.ephemeral), len(guest.persistent)) == (40, 10)


@pytest.mark.parametrize("restart", [True, False])
def test_a_known_guest_late_with_its_claims_is_cut_off_without_loss(restart: bool) -> None:
    here, guest = holding()
    here.hang_up(guest)
    there = restarted(here) if restart else here
    there.join(guest, 20, again=True)
    guest.outbox.clear()
    there.pass_time(CLAIM_SECONDS)
    there.settle()
    assert not guest.connected
    assert there.lender.stats().counters["faults"] == 1
    there.join(guest, 20, again=True)
    there.settle()
    assert (len(guest.ephemeral), len(guest.persistent)) == (40, 10)
    there.pass_time(CLAIM_SECONDS)
    assert guest.connected
