"""Guests join, are audited and end."""

from __future__ import annotations

import tracemalloc

import pytest

from tests.lending.lender.simulation import Simulation, add, counters, hold, simulation
from tmem.lending.lender import sweeper
from tmem.lending.lender.actions import Punch, Refusal
from tmem.lending.lender.ledger import UserBounds
from tmem.lending.lender.lender import BATCH_SLABS, EXCESS_AUDITS, Lender
from tmem.lending.lender.stats import Denial
from tmem.lending.protocol import messages as m
from tmem.lending.protocol.runs import runs_of, split_for_messages

SLAB = 65536


# Joining.


def test_promises_that_do_not_fit_are_refused() -> None:
    here = simulation()
    add(here, persistent=80)
    with pytest.raises(Refusal, match="--hswap"):
        add(here, persistent=30)
    add(here, persistent=20)
    assert here.lender.stats().counters["refused_promise"] == 1


def test_a_requested_persistent_cap_lowers_default_ones() -> None:
    here = simulation()
    add(here, slabs=160, persistent=None)
    add(here, persistent=60)
    assert [row.persistent_cap for row in here.lender.rows(0.0)] == [40, 60]


def caps(here: Simulation) -> list[int]:
    return [row.persistent_cap for row in here.lender.rows(here.now)]


def test_default_persistent_caps_share_the_rest_evenly() -> None:
    here = simulation()
    first = add(here, persistent=None)
    assert caps(here) == [100]
    hold(here, first, 40, persistent=True)
    second = add(here, persistent=None)
    assert caps(here) == [70, 30]
    assert first.inbox == second.inbox == type(first.inbox)()
    add(here, slabs=20, persistent=None)
    assert caps(here) == [65, 25, 10]


def test_a_default_persistent_cap_grows_back_when_there_is_room() -> None:
    here = simulation()
    first, second = add(here, slabs=120, persistent=None), add(here, persistent=80)
    assert caps(here) == [20, 80]
    here.perform(here.lender.set_limits(here.now, second.number, persistent_cap=70))
    assert caps(here) == [30, 70]
    here.perform(here.lender.resize(here.now, 110)[1])
    assert caps(here) == [40, 70]
    here.kill(second)
    here.work()
    assert caps(here) == [60], "half of its arena"
    assert first.inbox[-1] == m.Limits(110, 60, False)
    here.settle()


def test_default_persistent_caps_stay_within_the_users_cap() -> None:
    here = simulation(bounds=UserBounds(cap=30))
    add(here, persistent=None), add(here, persistent=None)
    add(here, persistent=None, uid=0)
    assert caps(here) == [15, 15, 70]


def test_a_limit_can_be_lowered_when_promises_exceed_the_size() -> None:
    here = simulation()
    guest = add(here, persistent=60)
    here.perform(here.lender.set_limits(here.now, guest.number, floor=30))
    there = Simulation(Lender(100, bounds=UserBounds(cap=20), holdings=here.lender.holdings()))
    (number,) = there.lender.guests_away()
    there.lender.set_limits(0.0, number, floor=10)
    with pytest.raises(Refusal, match="can be promised"):
        there.lender.set_limits(0.0, number, floor=11)


def test_another_version_is_refused() -> None:
    here = simulation()
    with pytest.raises(Refusal, match="upgrade"):
        here.lender.join(0.0, m.Hello(m.VERSION + 1, bytes(16), "/m", 10), 0, 1)


def test_the_guests_of_a_user_hold_the_users_cap_at_most() -> None:
    here = simulation(bounds=UserBounds(cap=30))
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


# What one user may have for good.


def test_by_default_a_user_is_promised_half_and_all_users_three_quarters() -> None:
    here = simulation(bounds=UserBounds(trusted=frozenset({0})))
    with pytest.raises(Refusal, match=r"only 3200K"):
        add(here, persistent=51)
    add(here, persistent=30)
    with pytest.raises(Refusal, match="uid-persistent"):
        add(here, persistent=21)
    add(here, persistent=20)
    add(here, persistent=20, uid=2000)
    with pytest.raises(Refusal, match="only 320K"):
        add(here, persistent=6, uid=3000)
    add(here, persistent=25, uid=0)
    hold(here, add(here), 100)
    assert here.lender.stats().ephemeral == 100, "what can be taken is not bounded"


def test_default_persistent_caps_keep_user_shares_unless_root_sets_more() -> None:
    here = simulation(bounds=UserBounds(trusted=frozenset({0})))
    add(here, persistent=None), add(here, persistent=None), add(here, persistent=None, uid=2000)
    assert caps(here) == [25, 25, 25]
    guest = add(here, persistent=None, uid=3000)
    assert caps(here)[3] == 0
    here.perform(here.lender.set_limits(here.now, guest.number, persistent_cap=80))
    assert caps(here)[3] == 80
    here.settle()


def test_the_bound_on_promises_to_a_user_can_be_set() -> None:
    here = simulation(bounds=UserBounds(persistent=90, trusted=frozenset({0})))
    add(here, persistent=90)
    with pytest.raises(Refusal):
        add(here, persistent=1, uid=2000)


# The audit.


def test_an_excess_is_punched_and_a_lasting_one_bars_the_guest() -> None:
    here = simulation(200)
    guest = add(here)
    hold(here, guest, 10)
    for _ in range(EXCESS_AUDITS + 2):
        guest.populated |= set(range(100, 100 + BATCH_SLABS))
        here.audit()
        here.settle()
        assert len(guest.populated) == 10, "an excess of one batch may come from late puts: punched, no more"
    for _ in range(EXCESS_AUDITS):
        assert not here.lender.stats().counters["barred_guests"]
        guest.populated |= set(range(100, 101 + BATCH_SLABS))
        here.audit()
        here.settle()
    assert here.lender.stats().counters["barred_guests"] == 1
    assert guest.ephemeral == guest.populated == set()
    hold(here, guest, 1)
    assert guest.denied == [Denial.BARRED.value]


def test_an_excess_in_a_large_fragmented_arena_is_punched_in_chunks() -> None:
    slabs = 4 * sweeper.CHUNK_RUNS
    here = simulation(slabs)
    guest = add(here, slabs=slabs)
    while len(guest.ephemeral) < slabs:
        hold(here, guest, min(m.MAX_ASK, slabs - len(guest.ephemeral)))
    every_second = [slab for slab in guest.ephemeral if slab % 2]
    guest.ephemeral.difference_update(every_second)
    for part, last in split_for_messages(runs_of(every_second)):
        guest.say(m.Return(part, last=last))
    here.settle()
    guest.populated |= {1, slabs - 1}
    here.perform(here.lender.on_audited(here.now, guest.number, slabs // 2, (slabs // 2 + 2) * SLAB))
    (punch,) = here.queue
    assert isinstance(punch, Punch)
    assert len(punch.runs) == sweeper.CHUNK_RUNS
    hold(here, guest, m.MAX_ASK)
    assert guest.populated == guest.ephemeral
    assert counters(here)["excess_audits"] == 1


def test_an_audit_without_an_excess_does_nothing() -> None:
    here = simulation()
    guest = add(here)
    hold(here, guest, 10)
    assert here.lender.on_audited(here.now, guest.number, 10, 10 * SLAB) == []
    assert here.lender.on_audited(here.now, guest.number, 10, 3 * SLAB) == []
    assert counters(here)["excess_audits"] == 0


# The end.


def test_the_memory_of_an_ended_guest_is_free_once_its_arena_is_closed() -> None:
    here = simulation()
    guest, other = add(here), add(here)
    hold(here, guest, 100)
    here.perform(here.lender.on_disconnected(here.now, guest.number))
    guest.connected = False
    assert here.lender.stats().free == 0, "the end of a connection is not the end of a guest"
    here.kill(guest)
    assert here.lender.stats().free == 0
    here.settle()
    assert here.lender.stats().free == 100
    hold(here, other, 100)
    assert len(other.ephemeral) == 100
    assert runs_of(other.ephemeral) == ((0, 100),)


# What is kept for a restart.


def test_counting_a_fragmented_arena_does_not_list_its_slabs() -> None:
    here = simulation(2048)
    guest = add(here, slabs=2048)
    for _ in range(2):
        hold(here, guest, m.MAX_ASK)
    every_second = [slab for slab in guest.ephemeral if slab % 2]
    guest.ephemeral.difference_update(every_second)
    guest.say(m.Return(runs_of(every_second)))
    here.settle()
    tracemalloc.start()
    (holding,) = here.lender.holdings()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (holding.ephemeral, holding.persistent) == (1024, 0)
    assert peak < 16_000, "1,024 runs would take 100 KB: this is done every second, for every guest"
