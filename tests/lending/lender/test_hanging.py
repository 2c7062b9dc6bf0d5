"""Memory that was given up stays booked until it is free; a guest whose arena cannot be punched stops nobody else."""

from __future__ import annotations

from tests.lending.lender.simulation import add, counters, hold, simulation
from tmem.lending.lender.ledger import UserBounds
from tmem.lending.lender.lender import Lender
from tmem.lending.lender.stats import Denial


def test_returned_slabs_are_lent_only_after_the_punch() -> None:
    here = simulation(100)
    giver, asker = add(here), add(here)
    hold(here, giver, 100)
    giver.give(100)
    here.hear(giver)
    assert asker.ask(60)
    here.hear(asker)
    assert here.lender.stats().unpunched == 100
    assert here.lender.stats().promised == 0, "nothing is promised that may still be populated"
    here.settle()
    assert len(asker.ephemeral) == 60


def test_a_hanging_guest_keeps_its_memory_booked_and_others_go_on() -> None:
    here = simulation(100)
    bad, one, two = add(here), add(here), add(here)
    hold(here, bad, 40)
    hold(here, one, 60, age=1.0)
    here.hang(bad)
    bad.give(40)
    here.settle()
    assert here.lender.stats().unpunched == 40
    hold(here, two, 30, age=100.0)
    assert two.ephemeral == set()
    assert two.denied, "nobody waits for it"
    one.give(20)
    here.settle()
    hold(here, two, 30, age=100.0)
    assert len(two.ephemeral) == 20
    assert len(bad.populated) + len(one.populated) + len(two.populated) == 100
    hold(here, bad, 1)
    assert bad.denied == [Denial.HANGS.value]
    here.go_on(bad)
    hold(here, two, 30, age=100.0)
    assert len(two.ephemeral) == 50
    assert counters(here)["hangs"] == 1


def test_slabs_of_a_hanging_guest_are_not_asked_for_by_others() -> None:
    here = simulation(100)
    bad, good, asker = add(here), add(here), add(here)
    hold(here, bad, 50, age=1000.0)
    hold(here, good, 50, age=500.0)
    here.hang(bad)
    hold(here, asker, 10, age=1.0)
    assert len(bad.ephemeral) == 50
    assert (len(good.ephemeral), len(asker.ephemeral)) == (40, 10)


def test_slabs_of_a_hanging_guest_count_for_its_user() -> None:
    here = simulation(100, bounds=UserBounds(cap=30))
    bad, peer, other = add(here), add(here), add(here, uid=2000)
    hold(here, bad, 20)
    here.hang(bad)
    bad.give(20)
    here.settle()
    hold(here, peer, 30)
    hold(here, other, 30)
    assert (len(peer.ephemeral), len(other.ephemeral)) == (10, 30)
    here.go_on(bad)
    here.settle()
    hold(here, peer, 30)
    assert len(peer.ephemeral) == 30


def test_slabs_of_a_hanging_guest_are_booked_after_a_restart() -> None:
    here = simulation(100)
    bad = add(here)
    hold(here, bad, 60)
    here.hang(bad)
    bad.give(60)
    here.settle()
    here.restart(lambda holdings: Lender(100, holdings=holdings))
    other = add(here)
    hold(here, other, 100)
    assert len(other.ephemeral) == 40


def test_a_hanging_guest_that_ends_is_forgotten() -> None:
    here = simulation(100)
    bad, other = add(here), add(here)
    hold(here, bad, 100)
    here.hang(bad)
    bad.give(30)
    here.settle()
    here.kill(bad)
    here.settle()
    hold(here, other, 10)
    assert other.ephemeral == set()
    here.go_on(bad)
    hold(here, other, 64)
    assert len(other.ephemeral) == 64


def test_a_hanging_evicted_guest_is_booked_after_a_restart_until_it_ends() -> None:
    here = simulation(100)
    bad = add(here, persistent=50)
    hold(here, bad, 40)
    hold(here, bad, 20, persistent=True)
    here.hang(bad)
    bad.give(10)
    here.hear(bad)
    here.evict(bad)
    here.settle()
    here.restart(lambda holdings: Lender(100, holdings=holdings))
    assert here.lender.stats().unpunched == 60
    other = add(here)
    hold(here, other, 64)
    assert len(other.ephemeral) == 40
    here.restart(lambda holdings: Lender(100, holdings=holdings))
    assert here.lender.stats().unpunched == 60
    assert {account.settings.evicted for account in here.lender._accounts.values()} == {True, False}
    here.kill(next(guest for guest in here.guests.values() if guest.token == bad.token))
    here.settle()
    assert here.lender.stats().unpunched == 0


def test_an_evicted_guest_with_a_closed_arena_is_not_booked_at_restart() -> None:
    here = simulation(100)
    gone = add(here)
    hold(here, gone, 40)
    here.evict(gone)
    here.settle()
    here.restart(lambda holdings: Lender(100, holdings=holdings))
    assert here.lender.stats().unpunched == 0
    assert here.lender.stats().free == 100
