"""The lender's decisions, one at a time, in a simulated world."""

from __future__ import annotations

import pytest

from tests.lending.world import Guest, World, runs_of
from tmem.lending.lender.actions import GuestFault, Refusal
from tmem.lending.lender.lender import BATCH, EXCESS_AUDITS, PATIENCE, Lender
from tmem.lending.lender.stats import Denial
from tmem.lending.protocol import messages as m

SLAB = 65536


def world(size: int = 100, **options: object) -> World:
    return World(Lender(size, **options))  # type: ignore[arg-type]


def add(here: World, slabs: int = 1000, persistent: int | None = 0, uid: int = 1000) -> Guest:
    guest = Guest(len(here.guests).to_bytes(16, "big"), slabs, uid)
    here.join(guest, persistent)
    here.settle()
    return guest


def hold(here: World, guest: Guest, slabs: int, persistent: bool = False, age: float | None = None) -> None:
    assert guest.ask(slabs, persistent, age)
    here.settle()


def report(here: World, guest: Guest, age: float | None, **counters: int) -> None:
    fields = {"pages": 0, "used_bytes": 0, "puts": 0, "hits": 0, "misses": 0, "ghost_hits": 0}
    guest.say(m.Report(age, **(fields | counters)))
    here.hear(guest)


def counters(here: World) -> dict[str, int]:
    return here.lender.stats().counters


# Lending.


def test_what_is_free_is_lent_at_once() -> None:
    here = world()
    guest = add(here)
    guest.ask(30)
    here.hear(guest)
    here.work()
    assert guest.inbox[-1] == m.Lend(((0, 30),), 1, False, True)
    here.settle()
    assert here.lender.stats().free == 70


def test_a_large_ask_is_answered_in_batches_of_which_the_last_is_done() -> None:
    here = world(1000)
    guest = add(here)
    guest.ask(2 * BATCH + 1)
    here.hear(guest)
    here.work()
    lends = [message for message in guest.inbox if isinstance(message, m.Lend)]
    assert [sum(count for _, count in lend.runs) for lend in lends] == [BATCH, BATCH, 1]
    assert [lend.done for lend in lends] == [False, False, True]
    here.settle()


def test_an_ask_that_can_never_be_met_is_denied_with_the_reason() -> None:
    here = world(10)
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


def test_short_memory_denies_and_frees_what_was_not_made_real() -> None:
    here = world()
    guest = add(here)
    here.short = 3
    hold(here, guest, 5)
    hold(here, guest, 5)
    assert guest.ephemeral == {0, 1, 2}
    assert guest.denied == [Denial.MEMORY.value]
    assert here.lender.stats().free == 97
    assert counters(here)["unreal_slabs"] == 7


def test_who_asks_twice_at_once_is_at_fault() -> None:
    here = world()
    guest = add(here)
    guest.say(m.Ask(1, 5))
    guest.say(m.Ask(2, 5))
    with pytest.raises(GuestFault):
        here.hear(guest)
    assert counters(here)["faults"] == 1


# Taking back.


def test_the_guest_with_the_oldest_page_is_asked_to_give() -> None:
    here = world()
    old, young, asker = add(here), add(here), add(here)
    hold(here, old, 50)
    hold(here, young, 50)
    report(here, old, 100.0)
    report(here, young, 10.0)
    hold(here, asker, 20)
    assert (len(old.ephemeral), len(young.ephemeral), len(asker.ephemeral)) == (30, 50, 20)
    assert counters(here)["revoked_slabs"] == 20
    assert counters(here)["taken_slabs"] == 0


def test_nobody_gives_way_to_a_guest_whose_own_page_is_older() -> None:
    here = world()
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
    here = world()
    heavy, light, asker = add(here), add(here), add(here)
    hold(here, heavy, 50)
    hold(here, light, 50)
    report(here, heavy, 100.0)
    report(here, light, 60.0)
    here.perform(here.lender.set_limits(here.now, heavy.number, weight=2.0))
    hold(here, asker, 5)
    assert (len(heavy.ephemeral), len(light.ephemeral)) == (50, 45)


def test_a_floor_is_never_cut_into_and_always_granted() -> None:
    here = world()
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


def test_a_guest_that_is_stopped_is_taken_from_after_its_patience_and_right_again_when_it_goes_on() -> None:
    here = world()
    stopped, asker = add(here), add(here)
    hold(here, stopped, 100)
    stopped.stopped = True
    report(here, stopped, 50.0)
    asker.ask(40)
    here.hear(asker)
    assert here.lender.deadline() == pytest.approx(here.now + PATIENCE)
    here.settle()
    assert len(asker.ephemeral) == 40
    assert counters(here)["unanswered_revokes"] == 1
    assert counters(here)["taken_slabs"] == 40
    asker.ask(10)
    here.hear(asker)
    assert here.lender.deadline() is None, "a guest that was silent is not waited for again"
    here.settle()
    assert len(asker.ephemeral) == 50
    stopped.real.add(0)  # a late put
    stopped.stopped = False
    here.settle()
    assert len(stopped.ephemeral) == 18, "it also answers the Revoke of 32 that it had not read"
    hold(here, stopped, 30)
    assert len(stopped.ephemeral) == 48


def test_an_answer_that_lies_in_the_socket_is_read_before_anything_is_taken() -> None:
    here = world()
    slow, asker = add(here), add(here)
    hold(here, slow, 100)
    report(here, slow, 50.0)
    asker.ask(10)
    here.hear(asker)
    slow.read()
    here.pass_time(1.0)
    here.settle()
    assert counters(here)["taken_slabs"] == counters(here)["late_returns"] == 0
    assert len(asker.ephemeral) == 10


def test_a_guest_that_answers_with_less_is_taken_from() -> None:
    here = world()
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
def test_who_gives_confirms_or_claims_what_is_not_its_is_at_fault(message: m.FromGuest) -> None:
    here = world()
    guest = add(here)
    guest.say(message)
    with pytest.raises(GuestFault):
        here.hear(guest)
    here.lender.check()


# Persistent slabs.


def test_a_persistent_request_takes_ephemeral_memory_and_never_persistent() -> None:
    here = world()
    ephemeral, persistent, asker = add(here), add(here, persistent=60), add(here, persistent=40)
    hold(here, persistent, 60, persistent=True)
    hold(here, ephemeral, 40)
    report(here, ephemeral, 1.0)
    hold(here, asker, 40, persistent=True, age=1000.0)
    assert (len(ephemeral.ephemeral), len(asker.persistent)) == (0, 40)
    hold(here, ephemeral, 10)
    assert ephemeral.denied == [Denial.YOUNGER.value]


def test_a_persistent_request_takes_the_askers_own_pages_when_they_are_the_oldest() -> None:
    here = world()
    asker, other = add(here, persistent=50), add(here)
    hold(here, asker, 50)
    hold(here, other, 50)
    report(here, asker, 100.0)
    report(here, other, 1.0)
    hold(here, asker, 10, persistent=True)
    assert (len(asker.ephemeral), len(asker.persistent), len(other.ephemeral)) == (40, 10, 50)


def test_persistent_slabs_are_asked_for_and_not_taken() -> None:
    here = world()
    guest = add(here, persistent=50)
    hold(here, guest, 20, persistent=True)
    guest.refuses = True
    here.perform(here.lender.revoke(here.now, guest.number, 5, persistent=True))
    here.pass_time(60.0)
    here.settle()
    assert len(guest.persistent) == 20
    guest.refuses = False
    here.perform(here.lender.revoke(here.now, guest.number, 50, persistent=True))
    here.settle()
    assert len(guest.persistent) == 0


# Verbs.


def test_resize_takes_back_until_it_fits_and_stays_as_large_as_persistent_slabs_need() -> None:
    here = world()
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


def test_what_nobody_asked_for_gives_way_when_the_size_gets_smaller() -> None:
    here = world()
    guest = add(here, slabs=100, persistent=None)
    assert here.lender.rows(here.now)[0].persistent_cap == 50
    size, actions = here.lender.resize(here.now, 20)
    here.perform(actions)
    assert size == 20
    assert guest.inbox[-1] == m.Limits(20, 20, False)
    here.settle()


def test_a_frozen_guest_is_lent_nothing_until_it_is_thawed() -> None:
    here = world()
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


def test_freezing_withdraws_what_is_being_made_real() -> None:
    here = world()
    guest = add(here)
    guest.ask(10)
    here.hear(guest)
    here.perform(here.lender.freeze(here.now, guest.number))
    here.settle()
    assert guest.ephemeral == set()
    assert guest.denied == [Denial.FROZEN.value]


def test_a_drained_guest_gives_all_ephemeral_slabs_back_and_gets_none() -> None:
    here = world(300)
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


def test_a_lower_cap_takes_back_what_is_above_it() -> None:
    here = world()
    guest = add(here)
    hold(here, guest, 80)
    here.perform(here.lender.set_limits(here.now, guest.number, cap=50))
    here.settle()
    assert len(guest.ephemeral) == 50


def test_revoking_takes_so_many_slabs_whatever_the_age() -> None:
    here = world()
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
def test_limits_that_cannot_be_are_refused_and_change_nothing(limits: dict[str, int], words: str) -> None:
    here = world()
    guest, _ = add(here), add(here, persistent=20)
    before = here.lender.rows(here.now)
    with pytest.raises(Refusal, match=words):
        here.lender.set_limits(here.now, guest.number, **limits)
    assert here.lender.rows(here.now) == before
    assert here.lender.stats().counters["refused_limits"] + here.lender.stats().counters["refused_promise"] == 1


def test_guests_are_found_by_name_and_number() -> None:
    here = world()
    guest = add(here)
    name = here.lender.rows(0.0)[0].name
    assert here.lender.find(name) == here.lender.find(str(guest.number)) == guest.number
    for unknown in ("/mnt/x", "77", "-1", ""):
        with pytest.raises(Refusal, match="tmemctl list"):
            here.lender.find(unknown)


# Joining.


def test_promises_that_do_not_fit_are_refused() -> None:
    here = world()
    add(here, persistent=80)
    with pytest.raises(Refusal, match="--hswap"):
        add(here, persistent=30)
    add(here, persistent=20)
    assert here.lender.stats().counters["refused_promise"] == 1


def test_a_cap_that_was_not_asked_for_gives_way_to_one_that_was() -> None:
    here = world()
    add(here, slabs=160, persistent=None)
    add(here, persistent=60)
    assert [row.persistent_cap for row in here.lender.rows(0.0)] == [40, 60]


def test_another_version_is_refused() -> None:
    here = world()
    with pytest.raises(Refusal, match="upgrade"):
        here.lender.join(0.0, m.Hello(m.VERSION + 1, bytes(16), "/m", 10), 0, 1)


def test_the_guests_of_a_user_hold_the_users_cap_at_most() -> None:
    here = world(uid_cap=30)
    one, two, root, stranger = add(here), add(here), add(here, uid=0), add(here, uid=2000)
    hold(here, one, 20)
    hold(here, two, 20)
    assert (len(two.ephemeral), counters(here)["denied_uid_cap"]) == (10, 0)
    hold(here, two, 1)
    assert two.denied == [Denial.UID_CAP.value]
    hold(here, root, 40)
    hold(here, stranger, 30)
    assert len(root.ephemeral) == 40
    with pytest.raises(Refusal, match="promised"):
        add(here, persistent=31, uid=2000)


# The audit.


def test_an_excess_is_punched_and_one_that_stays_ends_the_lending() -> None:
    here = world(200)
    guest = add(here)
    hold(here, guest, 10)
    for _ in range(EXCESS_AUDITS + 2):
        guest.real |= set(range(100, 100 + BATCH))
        here.perform(here.lender.audited(here.now, guest.number, len(guest.real) * SLAB))
        here.settle()
        assert len(guest.real) == 10, "an excess of one batch may come from late puts: punched, no more"
    for _ in range(EXCESS_AUDITS):
        assert not here.lender.stats().counters["barred_guests"]
        guest.real |= set(range(100, 101 + BATCH))
        here.perform(here.lender.audited(here.now, guest.number, len(guest.real) * SLAB))
        here.settle()
    assert here.lender.stats().counters["barred_guests"] == 1
    assert guest.ephemeral == guest.real == set()
    hold(here, guest, 1)
    assert guest.denied == [Denial.BARRED.value]


def test_an_audit_that_finds_what_is_booked_or_less_does_nothing() -> None:
    here = world()
    guest = add(here)
    hold(here, guest, 10)
    assert here.lender.audited(here.now, guest.number, 10 * SLAB) == []
    assert here.lender.audited(here.now, guest.number, 3 * SLAB) == []
    assert counters(here)["excess_audits"] == 0


# The end.


def test_the_memory_of_a_dead_guest_is_free_once_its_arena_is_closed() -> None:
    here = world()
    guest, other = add(here), add(here)
    hold(here, guest, 100)
    here.perform(here.lender.disconnected(here.now, guest.number))
    guest.connected = False
    assert here.lender.stats().free == 0, "the end of a connection is not the end of a guest"
    here.kill(guest)
    assert here.lender.stats().free == 0
    here.settle()
    assert here.lender.stats().free == 100
    hold(here, other, 100)
    assert len(other.ephemeral) == 100
    assert runs_of(other.ephemeral) == ((0, 100),)
