"""Whose the memory is that was punched and lives on, and what follows for its user."""

from __future__ import annotations

from collections import Counter

from tests.lending.lender.simulation import Simulation, add, hold, simulation
from tmem.arena import SLAB_SIZE
from tmem.lending.lender.ledger import UserBounds
from tmem.lending.lender.pinned import Pinned


def look(here: Simulation, slabs: int) -> None:
    here.perform(here.lender.on_pinned(here.now, slabs * SLAB_SIZE))
    here.settle()


def test_a_sole_user_is_charged_at_most_what_it_gave_up() -> None:
    pinned = Pinned()
    pinned.update(5, Counter())
    pinned.punched(1, 10)
    pinned.update(12, Counter())
    assert pinned.of == {1: 7}
    pinned.punched(1, 10)
    pinned.update(100, Counter())
    assert pinned.of == {1: 17}


def test_earlier_pinned_memory_and_that_of_several_suspects_is_unbooked() -> None:
    pinned = Pinned()
    pinned.punched(1, 10)
    pinned.update(10, Counter())
    assert not pinned.of.total()
    pinned.punched(1, 10)
    pinned.punched(2, 4)
    pinned.update(10 + 9, Counter())
    assert (pinned.of[1], pinned.of[2]) == (5, 0), "of nine the second may have kept four"


def test_slabs_punched_without_a_report_make_their_user_a_suspect() -> None:
    pinned = Pinned()
    pinned.update(0, Counter())
    pinned.punched(1, 10)
    pinned.update(10, Counter({2: 6}))
    assert pinned.of == {1: 4}


def test_shrinking_pinned_memory_lowers_the_booking_of_every_user() -> None:
    pinned = Pinned()
    pinned.update(0, Counter())
    for uid, slabs in ((1, 10), (2, 4)):
        pinned.punched(uid, slabs)
        pinned.update(pinned.of.total() + slabs, Counter())
    assert pinned.of == {1: 10, 2: 4}
    pinned.update(8, Counter())
    assert pinned.of == {1: 4}
    pinned.update(0, Counter())
    assert not pinned.of


def test_a_user_is_lent_less_by_its_pinned_memory_and_within_the_size() -> None:
    here = simulation(100, bounds=UserBounds(cap=60))
    look(here, 0)
    bad, good = add(here, uid=1000), add(here, uid=2000)
    hold(here, bad, 40)
    bad.give(40)
    here.settle()
    look(here, 40)
    assert here.lender.stats().pinned == 40
    hold(here, bad, 60)
    assert len(bad.ephemeral) == 20
    hold(here, good, 60)
    assert (len(bad.ephemeral), len(good.ephemeral)) == (10, 50), "what it keeps is of its part"
    look(here, 0)
    assert here.lender.stats().pinned == 0
    hold(here, good, 10)
    assert len(good.ephemeral) == 60


def test_memory_pinned_by_an_ended_guest_is_booked_to_its_user_alone() -> None:
    for evicted in (False, True):
        here = simulation(100)
        look(here, 0)
        bad, good = add(here, uid=1000), add(here, uid=2000)
        hold(here, bad, 40)
        hold(here, good, 40)
        (here.evict if evicted else here.kill)(bad)
        good.give(10)
        here.hear(good)
        look(here, 20)
        assert here.lender._ledger.unpunched.pinned.of == {1000: 10}, "ten of the twenty may be the other's"
        here.settle()
        look(here, 30)
        assert here.lender._ledger.unpunched.pinned.of == {1000: 10}
    here = simulation(100)
    look(here, 0)
    bad, good = add(here, uid=1000), add(here, uid=2000)
    hold(here, bad, 40)
    hold(here, good, 40)
    here.kill(bad)
    here.settle()
    good.give(10)
    here.settle()
    look(here, 40)
    assert here.lender._ledger.unpunched.pinned.of == {1000: 30}
