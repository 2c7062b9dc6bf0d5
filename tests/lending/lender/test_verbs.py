"""What a person does to the lending: each verb does what it says, or is refused and changes nothing."""

from __future__ import annotations

import pytest

from tests.lending.lender.simulation import add, hold, report, simulation
from tmem.lending.lender.actions import Refusal
from tmem.lending.lender.lender import Lender
from tmem.lending.lender.stats import Denial
from tmem.lending.protocol import messages as m
from tmem.lending.protocol.wire import encode, tmemctl_decoder


def test_resize_reclaims_down_to_the_persistent_slabs() -> None:
    here = simulation()
    guest, other = add(here, persistent=30), add(here)
    hold(here, guest, 30, persistent=True)
    hold(here, other, 70)
    size, actions = here.lender.resize(here.now, 50)
    here.perform(actions)
    assert here.lender.stats().free == 0
    here.settle()
    assert (size, len(other.ephemeral)) == (50, 20)
    size, actions = here.lender.resize(here.now, 10)
    here.perform(actions)
    here.settle()
    assert (size, len(other.ephemeral), len(guest.persistent)) == (30, 0, 30)
    size, actions = here.lender.resize(here.now, 200)
    here.perform(actions)
    hold(here, other, 100)
    assert (size, len(other.ephemeral)) == (200, 100)


def test_a_smaller_size_lowers_default_persistent_caps() -> None:
    here = simulation()
    guest = add(here, slabs=100, persistent=None)
    assert here.lender.rows(here.now)[0].persistent_cap == 50
    size, actions = here.lender.resize(here.now, 20)
    here.perform(actions)
    assert size == 20
    assert guest.inbox[-1] == m.Limits(20, 20, False)
    here.settle()


def test_a_frozen_guest_is_lent_nothing_until_it_is_thawed() -> None:
    here = simulation()
    guest, other = add(here), add(here)
    hold(here, guest, 10)
    here.perform(here.lender.freeze(here.now, guest.number))
    hold(here, guest, 10)
    assert guest.frozen
    assert (guest.denied, len(guest.ephemeral)) == ([Denial.FROZEN.value], 10)
    here.perform(here.lender.freeze(here.now, None))
    late = add(here)
    hold(here, late, 1)
    assert late.denied == [Denial.FROZEN.value]
    here.perform(here.lender.thaw(here.now, None))
    for each in (guest, other, late):
        hold(here, each, 5)
        assert not each.frozen
    assert len(late.ephemeral) == 5


def test_freezing_frees_slabs_that_are_being_populated() -> None:
    here = simulation()
    guest = add(here)
    guest.ask(10)
    here.hear(guest)
    here.perform(here.lender.freeze(here.now, guest.number))
    here.settle()
    assert guest.ephemeral == set()
    assert guest.denied == [Denial.FROZEN.value]


def test_a_drained_guest_gives_all_ephemeral_slabs_back_and_gets_none() -> None:
    here = simulation(300)
    guest = add(here, persistent=10)
    hold(here, guest, 200)
    hold(here, guest, 10, persistent=True)
    here.perform(here.lender.drain(here.now, guest.number))
    here.settle()
    assert (len(guest.ephemeral), len(guest.persistent)) == (0, 10)
    hold(here, guest, 1)
    assert guest.denied == [Denial.DRAINING.value]
    here.perform(here.lender.thaw(here.now, guest.number))
    hold(here, guest, 1)
    assert len(guest.ephemeral) == 1


def test_a_lower_cap_reclaims_the_slabs_above_it() -> None:
    here = simulation()
    guest = add(here)
    hold(here, guest, 80)
    here.perform(here.lender.set_limits(here.now, guest.number, cap=50))
    here.settle()
    assert len(guest.ephemeral) == 50


def test_slabs_being_populated_under_a_lower_cap_are_reclaimed_too() -> None:
    here = simulation()
    guest = add(here)
    guest.ask(64)
    here.hear(guest)
    here.perform(here.lender.set_limits(here.now, guest.number, cap=16))
    here.settle()
    assert len(guest.ephemeral) == 16


def test_slabs_being_populated_during_a_shrink_are_reclaimed_too() -> None:
    here = simulation()
    guest = add(here)
    guest.ask(64)
    here.hear(guest)
    here.perform(here.lender.resize(here.now, 16)[1])
    here.booked = 64
    here.settle()
    assert len(guest.ephemeral) == 16


def test_slabs_reclaimed_for_a_smaller_size_answer_no_ask() -> None:
    here = simulation()
    guest, other = add(here), add(here, persistent=20)
    hold(here, guest, 100)
    guest.stopped = True
    here.perform(here.lender.resize(here.now, 60)[1])
    hold(here, other, 20, persistent=True)
    assert (len(other.persistent), other.denied) == (20, [])


def test_a_revoke_verb_reclaims_slabs_of_any_age() -> None:
    here = simulation()
    guest = add(here)
    hold(here, guest, 80)
    here.perform(here.lender.revoke(here.now, guest.number, 45))
    here.settle()
    assert len(guest.ephemeral) == 35


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"cap": 10, "floor": 20}, "below the floor"),
        ({"cap": 2000}, "exceeds the arena"),
        ({"floor": 90}, "can be promised"),
        ({"persistent_cap": 101}, "can be promised"),
    ],
)
def test_impossible_limits_are_refused_and_change_nothing(limits: dict[str, int], words: str) -> None:
    here = simulation()
    guest, _ = add(here), add(here, persistent=20)
    before = here.lender.rows(here.now)
    with pytest.raises(Refusal, match=words):
        here.lender.set_limits(here.now, guest.number, **limits)
    assert here.lender.rows(here.now) == before
    assert here.lender.stats().counters["refused_limits"] + here.lender.stats().counters["refused_promise"] == 1


def test_guests_are_found_by_name_and_number() -> None:
    here = simulation()
    guest = add(here)
    name = here.lender.rows(0.0)[0].name
    assert here.lender.find(name) == here.lender.find(str(guest.number)) == guest.number
    for unknown in ("/mnt/x", "77", "-1", ""):
        with pytest.raises(Refusal, match="tmemctl list"):
            here.lender.find(unknown)


def test_an_age_beyond_the_protocols_bound_is_capped_in_the_table() -> None:
    here = simulation()
    report(here, add(here), m.MAX_SECONDS)
    (row,) = here.lender.rows(here.now + 3600.0)
    assert row.age == m.MAX_SECONDS
    assert tmemctl_decoder().feed(encode(m.Table((row,), True)))


# The end of a guest.


def test_an_evicted_guest_has_nothing_and_the_size_can_be_made_smaller() -> None:
    here = simulation()
    guest, other = add(here, persistent=60), add(here)
    hold(here, guest, 60, persistent=True)
    hold(here, guest, 20)
    assert here.lender.resize(here.now, 10)[0] == 60
    with pytest.raises(Refusal, match="--yes"):
        here.lender.evict(here.now, guest.number, False)
    here.perform(here.lender.evict(here.now, guest.number, True))
    here.settle()
    assert (guest.connected, guest.ephemeral, guest.persistent, guest.populated) == (False, set(), set(), set())
    assert here.lender.stats().size == 10
    hold(here, other, 10)
    assert len(other.ephemeral) == 10


@pytest.mark.parametrize("restarted", [False, True], ids=["", "after a restart"])
def test_an_evicted_guest_is_not_let_in_again_as_long_as_its_process_runs(restarted: bool) -> None:
    here = simulation()
    guest = add(here)
    hold(here, guest, 10)
    here.hang_up(guest)
    here.evict(guest)
    here.settle()
    if restarted:
        here.restart(lambda holdings: Lender(100, holdings=holdings))
    assert [row.state for row in here.lender.rows(here.now)] == ["evicted"]
    with pytest.raises(Refusal, match="evicted") as refusal:
        here.join(guest, again=True)
    assert refusal.value.evicted
    with pytest.raises(Refusal, match="no guest"):
        here.lender.find(f"/mnt/{guest.token.hex()}")
    here.kill(guest)
    here.settle()
    assert here.lender.rows(here.now) == []
    here.join(guest)


def test_a_guest_can_be_evicted_during_a_revoke_and_during_a_lend() -> None:
    here = simulation()
    guest, asker = add(here), add(here)
    hold(here, guest, 90)
    guest.stopped = True
    assert guest.ask(10)
    assert asker.ask(20)
    here.hear(guest)
    here.hear(asker)
    here.evict(guest)
    here.settle()
    assert asker.denied == [] or asker.ask(20)
    here.settle()
    assert len(asker.ephemeral) == 20
