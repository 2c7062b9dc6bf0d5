"""What a guest says to tmemd: it asks in growing batches, pays what it owes, and loses what was taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from tests.lending.guest.pooledguest import SLAB_PAGES, PooledGuest, noise
from tmem.arena import punch
from tmem.lending.guest.borrower import FIRST_ASK, MAX_RETRY, REVOKE_STEP
from tmem.lending.protocol.kind import Kind
from tmem.lending.protocol.messages import (
    BATCH_SLABS,
    RETRY,
    Ask,
    Claim,
    Confirm,
    Deny,
    FromGuest,
    Hello,
    Lend,
    Limits,
    Report,
    Return,
    Revoke,
    Taken,
    Welcome,
)
from tmem.lending.protocol.runs import MAX_RUNS, slabs_of
from tmem.lending.protocol.wire import ProtocolError

Make = Callable[..., PooledGuest]


@pytest.fixture
def make() -> Iterator[Make]:
    """Return a factory of guests; each is checked at the end."""
    made: list[PooledGuest] = []

    def make_one(slabs: int = 256, cap: int = 256) -> PooledGuest:
        made.append(PooledGuest(slabs))
        made[-1].register(cap)
        return made[-1]

    yield make_one
    for guest in made:
        guest.check()
        guest.source.close()


def test_a_guest_that_puts_nothing_asks_once_and_returns_what_it_got(make: Make) -> None:
    guest = make()
    (ask,) = guest.sent(Ask)
    assert ask.slabs == FIRST_ASK
    guest.lend(((0, FIRST_ASK),), ask.serial)
    returned = 0
    for _ in range(4):
        guest.borrower.tick()
        messages = guest.borrower.outgoing(0.0)
        assert not [message for message in messages if isinstance(message, Ask)]
        returned += sum(len(slabs_of(message.runs)) for message in messages if isinstance(message, Return))
    assert returned == FIRST_ASK


def test_asks_grow_with_what_is_held_and_one_is_open_at_a_time(make: Make) -> None:
    guest = make(slabs=4096, cap=4096)
    held, sizes = 0, []
    for serial in range(1, 13):
        guest.fill(SLAB_PAGES * (held + 1))
        (ask,) = guest.sent(Ask)
        guest.fill(1)
        assert guest.sent(Ask) == [], "one is open"
        assert ask.serial == serial
        assert ask.slabs <= max(FIRST_ASK, held // 2)
        sizes.append(ask.slabs)
        guest.lend(((held, ask.slabs),), ask.serial)
        held += ask.slabs
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (FIRST_ASK, BATCH_SLABS)


def test_the_parts_of_a_lend_are_used_at_once_and_the_last_closes_the_ask(make: Make) -> None:
    guest = make()
    guest.fill(1)
    (ask,) = guest.sent(Ask)
    for first, done in ((0, False), (1, True)):
        guest.borrower.on_message(0.0, Lend(((first, 1),), ask.serial, done=done))
        assert guest.borrower._asks[Kind.EPHEMERAL].open_serial == (0 if done else ask.serial)
    guest.fill(2 * SLAB_PAGES + 1)
    assert len(guest.sent(Ask)) == 1


def test_a_guest_asks_ahead_of_its_need(make: Make) -> None:
    guest = make()
    guest.fill(1)
    (ask,) = guest.sent(Ask)
    guest.lend(((0, FIRST_ASK),), ask.serial)
    guest.fill((FIRST_ASK // 2 - 1) * SLAB_PAGES)
    assert guest.sent(Ask) == []
    guest.fill((FIRST_ASK // 2 + 2) * SLAB_PAGES)
    assert len(guest.sent(Ask)) == 1
    assert guest.source.stocked > 0


def test_a_denied_guest_asks_again_later_and_later(make: Make) -> None:
    guest = make()
    now, wait = 0.0, RETRY
    for _ in range(8):
        guest.fill(1)
        (ask,) = guest.sent(Ask, now)
        guest.borrower.on_message(now, Deny(ask.serial, "everything is lent"))
        guest.fill(1)
        assert guest.sent(Ask, now) == []
        due = guest.borrower.deadline()
        assert due == now + wait
        now, wait = due, min(2 * wait, MAX_RETRY)
    assert guest.borrower.counters.denies == 8


def test_a_guest_asks_for_no_more_than_its_cap(make: Make) -> None:
    guest = make(cap=3)
    guest.fill(1)
    (ask,) = guest.sent(Ask)
    assert ask.slabs == 3
    guest.lend(((0, 3),), ask.serial)
    guest.fill(10 * SLAB_PAGES)
    assert guest.sent(Ask) == []
    guest.borrower.on_message(0.0, Limits(5, 2))
    guest.fill(10 * SLAB_PAGES)
    (ask,) = guest.sent(Ask, now=1.0)
    assert ask.slabs == 2
    assert not guest.kept.put(1, 1, noise(1))


def test_a_revoke_is_paid_in_steps_from_stock_before_pages(make: Make) -> None:
    guest = make()
    guest.lend(((0, 40),))
    guest.fill(30 * SLAB_PAGES)
    guest.borrower.outgoing(0.0)
    guest.borrower.on_message(0.0, Revoke(7, 20))
    answers = [message for message in guest.answer_revokes() if isinstance(message, Return)]
    assert [len(slabs_of(answer.runs)) for answer in answers] == [REVOKE_STEP, REVOKE_STEP, 20 - 2 * REVOKE_STEP]
    assert [answer.last for answer in answers] == [False, False, True]
    assert {answer.answer for answer in answers} == {7}
    assert guest.pool.stats.pages == 20 * SLAB_PAGES
    assert not guest.pool.holds(1, 0)
    assert guest.pool.holds(1, 30 * SLAB_PAGES - 1)


def test_a_guest_that_has_less_gives_what_it_has_and_says_so(make: Make) -> None:
    guest = make()
    guest.lend(((0, 2),))
    assert guest.kept.put(1, 1, noise(1)) is False
    guest.lend(((2, 1),), persistent=True)
    assert guest.kept.put(1, 1, noise(1))
    guest.borrower.outgoing(0.0)
    for serial, count in ((1, 2), (2, 0)):
        guest.borrower.on_message(0.0, Revoke(serial, 5))
        (answer,) = guest.answer_revokes()
        assert isinstance(answer, Return)
        assert (len(slabs_of(answer.runs)), answer.last, answer.answer) == (count, True, serial)
    assert guest.kept.get(1, 1) == noise(1)


def test_empty_persistent_slabs_are_returned_and_hswap_is_told_the_rest(make: Make) -> None:
    guest = make()
    guest.lend(((0, 4),), persistent=True)
    for index in range(2 * SLAB_PAGES):
        assert guest.kept.put(1, index, noise(index))
    guest.borrower.outgoing(0.0)
    guest.borrower.on_message(0.0, Revoke(3, 4, True))
    (answer,) = guest.answer_revokes()
    assert isinstance(answer, Return)
    assert (len(slabs_of(answer.runs)), answer.persistent, answer.last) == (2, True, True)
    assert guest.released == [2]
    assert all(guest.kept.get(1, index) == noise(index) for index in range(2 * SLAB_PAGES))


def test_slabs_lent_after_a_lower_cap_do_not_count_towards_the_debt(make: Make) -> None:
    guest = make()
    guest.lend(((0, 4),), persistent=True)
    for index in range(3 * SLAB_PAGES):
        assert guest.kept.put(1, index, noise(index))
    guest.borrower.outgoing(0.0)
    guest.borrower.on_message(0.0, Limits(256, 0))
    guest.lend(((4, 3),), persistent=True)
    returned = [message for message in guest.answer_revokes() if isinstance(message, Return)]
    assert sum(len(slabs_of(message.runs)) for message in returned) == 4
    assert guest.released == [3]


def test_a_taken_slab_takes_its_pages_before_it_can_be_lent_again(make: Make) -> None:
    guest = make()
    guest.lend(((0, 2),))
    guest.fill(2 * SLAB_PAGES)
    guest.borrower.outgoing(0.0)
    guest.take(((0, 1),), serial=5)
    guest.lend(((0, 1),), serial=9)
    assert guest.sent(Confirm) == [Confirm(5)]
    assert guest.pool.stats.pages == SLAB_PAGES
    guest.check()
    for index in range(2 * SLAB_PAGES):
        assert guest.pool.get(1, index) in (None, noise(index))
    assert guest.pool.stats.corrupt == 0
    assert guest.borrower.counters.taken_slabs == 1


def test_what_was_taken_is_not_owed_any_more(make: Make) -> None:
    guest = make()
    guest.lend(((0, 8),))
    guest.fill(8 * SLAB_PAGES)
    guest.borrower.outgoing(0.0)
    guest.borrower.on_message(0.0, Revoke(1, 4))
    guest.take(((0, 4),))
    messages = guest.answer_revokes()
    assert [message for message in messages if isinstance(message, Return)] == [Return((), answer=1, age=0.0)]
    assert guest.pool.stats.pages == 4 * SLAB_PAGES


def test_a_page_read_between_the_taking_and_the_news_is_a_miss(make: Make) -> None:
    guest = make()
    guest.lend(((0, 1),))
    guest.fill(SLAB_PAGES)
    punch(guest.source.fd, 0)
    assert [guest.pool.get(1, index) for index in range(SLAB_PAGES)] == [None] * SLAB_PAGES
    assert guest.pool.stats.corrupt == SLAB_PAGES


def test_slabs_that_nothing_used_for_a_tick_go_back(make: Make) -> None:
    guest = make()
    guest.lend(((0, 10),))
    guest.fill(4 * SLAB_PAGES)
    guest.pool.flush_object(1)
    returned: list[Return] = []
    for _ in range(3):
        guest.borrower.tick()
        returned += [message for message in guest.borrower.outgoing(0.0) if isinstance(message, Return)]
    assert sorted(slab for message in returned for slab in slabs_of(message.runs)) == list(range(10))
    assert ({message.answer for message in returned}, guest.borrower.counters.returned_slabs) == ({0}, 10)


def test_a_guest_that_puts_keeps_a_few_unused_slabs(make: Make) -> None:
    guest = make()
    guest.lend(((0, 40),))
    for index in range(6):
        guest.pool.put(1, index, noise(index))
        guest.borrower.tick()
        guest.borrower.outgoing(0.0)
    assert 0 < guest.source.stocked <= FIRST_ASK // 2


def test_a_report_is_sent_while_something_moves_and_once_more(make: Make) -> None:
    guest = make()

    def reports() -> list[Report]:
        guest.borrower.tick()
        return [message for message in guest.borrower.outgoing(0.0) if isinstance(message, Report)]

    assert len(reports()) == 1
    assert len(reports()) == 1
    assert reports() == []
    guest.lend(((0, 1),))
    guest.fill(3)
    guest.pool.get(1, 1)
    guest.pool.get(1, 9)
    (report,) = reports()
    assert (report.puts, report.hits, report.misses, report.pages) == (3, 1, 1, 2)
    assert len(reports()) == 1
    assert reports() == []


def test_a_report_counts_pages_that_were_read_in_their_slots_as_hits(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = make()
    stats = replace(guest.pool.stats, succ_gets=2, reads=3)
    monkeypatch.setattr(guest.tmem, "ephemeral_stats", lambda: [stats])
    guest.borrower.tick()
    (report,) = (message for message in guest.borrower.outgoing(0.0) if isinstance(message, Report))
    assert report.hits == 5


def test_limits_freeze_and_thaw_all_pools(make: Make) -> None:
    guest = make()
    guest.lend(((0, 4),))
    guest.borrower.on_message(0.0, Limits(9, 9, frozen=True))
    assert not guest.pool.put(1, 1, noise(1))
    assert guest.sent(Ask) == []
    guest.borrower.on_message(0.0, Limits(9, 9))
    assert guest.pool.put(1, 1, noise(1))


def test_a_guest_that_comes_again_claims_exactly_what_it_holds(make: Make) -> None:
    guest = make()
    assert isinstance(guest.hello, Hello)
    assert not guest.hello.again
    guest.lend(((0, 4), (10, 1)))
    guest.lend(((6, 2),), persistent=True)
    guest.fill(3 * SLAB_PAGES)
    guest.borrower.on_message(0.0, Revoke(1, 5))
    given = guest.tmem.give_up(1)
    assert given == 1
    messages = guest.borrower.greeting()
    hello, claims = messages[0], messages[1:]
    assert isinstance(hello, Hello)
    assert hello.again
    assert hello.token == guest.hello.token
    assert all(isinstance(claim, Claim) for claim in claims)
    held: dict[bool, list[int]] = {False: [], True: []}
    for claim in claims:
        assert isinstance(claim, Claim)
        held[claim.persistent] += slabs_of(claim.runs)
    assert [claim.last for claim in claims if isinstance(claim, Claim)] == [False, True]
    assert held[True] == [6, 7]
    assert len(held[False]) == 4
    assert set(held[False]) < {0, 1, 2, 3, 10}
    guest.borrower.on_welcome(Welcome(4, 256, 128))
    assert not guest.borrower.has_open_revoke, "what the last connection wanted is void"
    assert guest.borrower.outgoing(0.0) == []
    guest.fill(5 * SLAB_PAGES)
    assert len(guest.sent(Ask)) == 1


def test_many_claims_are_split_and_only_the_final_one_is_the_last(make: Make) -> None:
    guest = make(slabs=20_000)
    guest.borrower.on_message(0.0, Lend(tuple((2 * n, 1) for n in range(MAX_RUNS)), 1))
    guest.borrower.on_message(0.0, Lend(tuple((2 * n, 1) for n in range(MAX_RUNS, 2 * MAX_RUNS)), 1))
    claims: list[FromGuest] = guest.borrower.greeting()[1:]
    assert [(claim.persistent, claim.last) for claim in claims if isinstance(claim, Claim)] == [
        (False, False),
        (False, False),
        (True, True),
    ]


@pytest.mark.parametrize(
    "message",
    [Lend(((255, 2),), 1), Lend(((0, 1),), 1), Taken(((300, 1),), 1), Taken(((4, 1),), 1), Welcome(1, 2, 3)],
    ids=lambda message: type(message).__name__,
)
def test_an_invalid_message_of_tmemd_ends_the_connection_unapplied(make: Make, message: Lend | Taken | Welcome) -> None:
    guest = make()
    guest.lend(((0, 2),))
    guest.lend(((4, 1),), persistent=True)
    with pytest.raises(ProtocolError):
        guest.borrower.on_message(0.0, message)
    assert (guest.source.held(Kind.EPHEMERAL), guest.source.held(Kind.PERSISTENT)) == (2, 1)
