"""What a guest says to tmemd: it asks in growing batches, pays what it owes, and loses what was taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator

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
    """Give a maker of guests; each is checked at the end."""
    made: list[PooledGuest] = []

    def make_one(slabs: int = 256, cap: int = 256) -> PooledGuest:
        made.append(PooledGuest(slabs, cap))
        return made[-1]

    yield make_one
    for loan in made:
        loan.check()
        loan.source.close()


def test_a_guest_that_puts_nothing_asks_once_and_returns_what_it_got(make: Make) -> None:
    loan = make()
    (ask,) = loan.sent(Ask)
    assert ask.slabs == FIRST_ASK
    loan.lend(((0, FIRST_ASK),), ask.serial)
    returned = 0
    for _ in range(4):
        loan.borrower.tick()
        messages = loan.borrower.outgoing(0.0)
        assert not [message for message in messages if isinstance(message, Ask)]
        returned += sum(len(slabs_of(message.runs)) for message in messages if isinstance(message, Return))
    assert returned == FIRST_ASK


def test_asks_grow_with_what_is_held_and_one_is_open_at_a_time(make: Make) -> None:
    loan = make(slabs=4096, cap=4096)
    held, sizes = 0, []
    for serial in range(1, 13):
        loan.fill(SLAB_PAGES * (held + 1))
        (ask,) = loan.sent(Ask)
        loan.fill(1)
        assert loan.sent(Ask) == [], "one is open"
        assert ask.serial == serial
        assert ask.slabs <= max(FIRST_ASK, held // 2)
        sizes.append(ask.slabs)
        loan.lend(((held, ask.slabs),), ask.serial)
        held += ask.slabs
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (FIRST_ASK, BATCH_SLABS)


def test_the_parts_of_a_lend_are_used_at_once_and_the_last_closes_the_ask(make: Make) -> None:
    loan = make()
    loan.fill(1)
    (ask,) = loan.sent(Ask)
    for first, done in ((0, False), (1, True)):
        loan.borrower.on_message(0.0, Lend(((first, 1),), ask.serial, done=done))
        assert loan.borrower._asks[Kind.EPHEMERAL].open_serial == (0 if done else ask.serial)
    loan.fill(2 * SLAB_PAGES + 1)
    assert len(loan.sent(Ask)) == 1


def test_a_guest_asks_ahead_of_its_need(make: Make) -> None:
    loan = make()
    loan.fill(1)
    (ask,) = loan.sent(Ask)
    loan.lend(((0, FIRST_ASK),), ask.serial)
    loan.fill((FIRST_ASK // 2 - 1) * SLAB_PAGES)
    assert loan.sent(Ask) == []
    loan.fill((FIRST_ASK // 2 + 2) * SLAB_PAGES)
    assert len(loan.sent(Ask)) == 1
    assert loan.source.stocked > 0


def test_a_denied_guest_asks_again_later_and_later(make: Make) -> None:
    loan = make()
    now, wait = 0.0, RETRY
    for _ in range(8):
        loan.fill(1)
        (ask,) = loan.sent(Ask, now)
        loan.borrower.on_message(now, Deny(ask.serial, "everything is lent"))
        loan.fill(1)
        assert loan.sent(Ask, now) == []
        due = loan.borrower.deadline()
        assert due == now + wait
        now, wait = due, min(2 * wait, MAX_RETRY)
    assert loan.borrower.counters.denies == 8


def test_a_guest_asks_for_no_more_than_its_cap(make: Make) -> None:
    loan = make(cap=3)
    loan.fill(1)
    (ask,) = loan.sent(Ask)
    assert ask.slabs == 3
    loan.lend(((0, 3),), ask.serial)
    loan.fill(10 * SLAB_PAGES)
    assert loan.sent(Ask) == []
    loan.borrower.on_message(0.0, Limits(5, 2))
    loan.fill(10 * SLAB_PAGES)
    (ask,) = loan.sent(Ask, now=1.0)
    assert ask.slabs == 2
    assert not loan.kept.put(1, 1, noise(1))


def test_a_revoke_is_paid_in_steps_from_stock_before_pages(make: Make) -> None:
    loan = make()
    loan.lend(((0, 40),))
    loan.fill(30 * SLAB_PAGES)
    loan.borrower.outgoing(0.0)
    loan.borrower.on_message(0.0, Revoke(7, 20))
    answers = [message for message in loan.pay() if isinstance(message, Return)]
    assert [len(slabs_of(answer.runs)) for answer in answers] == [REVOKE_STEP, REVOKE_STEP, 20 - 2 * REVOKE_STEP]
    assert [answer.last for answer in answers] == [False, False, True]
    assert {answer.answer for answer in answers} == {7}
    assert loan.pool.stats.pages == 20 * SLAB_PAGES
    assert not loan.pool.holds(1, 0)
    assert loan.pool.holds(1, 30 * SLAB_PAGES - 1)


def test_a_guest_that_has_less_gives_what_it_has_and_says_so(make: Make) -> None:
    loan = make()
    loan.lend(((0, 2),))
    assert loan.kept.put(1, 1, noise(1)) is False
    loan.lend(((2, 1),), persistent=True)
    assert loan.kept.put(1, 1, noise(1))
    loan.borrower.outgoing(0.0)
    for serial, count in ((1, 2), (2, 0)):
        loan.borrower.on_message(0.0, Revoke(serial, 5))
        (answer,) = loan.pay()
        assert isinstance(answer, Return)
        assert (len(slabs_of(answer.runs)), answer.last, answer.answer) == (count, True, serial)
    assert loan.kept.get(1, 1) == noise(1)


def test_empty_persistent_slabs_are_returned_and_hswap_is_told_the_rest(make: Make) -> None:
    loan = make()
    loan.lend(((0, 4),), persistent=True)
    for index in range(2 * SLAB_PAGES):
        assert loan.kept.put(1, index, noise(index))
    loan.borrower.outgoing(0.0)
    loan.borrower.on_message(0.0, Revoke(3, 4, True))
    (answer,) = loan.pay()
    assert isinstance(answer, Return)
    assert (len(slabs_of(answer.runs)), answer.persistent, answer.last) == (2, True, True)
    assert loan.released == [2]
    assert all(loan.kept.get(1, index) == noise(index) for index in range(2 * SLAB_PAGES))


def test_slabs_lent_after_a_lower_cap_do_not_count_towards_the_debt(make: Make) -> None:
    loan = make()
    loan.lend(((0, 4),), persistent=True)
    for index in range(3 * SLAB_PAGES):
        assert loan.kept.put(1, index, noise(index))
    loan.borrower.outgoing(0.0)
    loan.borrower.on_message(0.0, Limits(256, 0))
    loan.lend(((4, 3),), persistent=True)
    returned = [message for message in loan.pay() if isinstance(message, Return)]
    assert sum(len(slabs_of(message.runs)) for message in returned) == 4
    assert loan.released == [3]


def test_a_taken_slab_takes_its_pages_before_it_can_be_lent_again(make: Make) -> None:
    loan = make()
    loan.lend(((0, 2),))
    loan.fill(2 * SLAB_PAGES)
    loan.borrower.outgoing(0.0)
    loan.take(((0, 1),), serial=5)
    loan.lend(((0, 1),), serial=9)
    assert loan.sent(Confirm) == [Confirm(5)]
    assert loan.pool.stats.pages == SLAB_PAGES
    loan.check()
    for index in range(2 * SLAB_PAGES):
        assert loan.pool.get(1, index) in (None, noise(index))
    assert loan.pool.stats.corrupt == 0
    assert loan.borrower.counters.taken_slabs == 1


def test_what_was_taken_is_not_owed_any_more(make: Make) -> None:
    loan = make()
    loan.lend(((0, 8),))
    loan.fill(8 * SLAB_PAGES)
    loan.borrower.outgoing(0.0)
    loan.borrower.on_message(0.0, Revoke(1, 4))
    loan.take(((0, 4),))
    messages = loan.pay()
    assert [message for message in messages if isinstance(message, Return)] == [Return((), answer=1, age=0.0)]
    assert loan.pool.stats.pages == 4 * SLAB_PAGES


def test_a_page_read_between_the_taking_and_the_news_is_a_miss(make: Make) -> None:
    loan = make()
    loan.lend(((0, 1),))
    loan.fill(SLAB_PAGES)
    punch(loan.source.fd, 0)
    assert [loan.pool.get(1, index) for index in range(SLAB_PAGES)] == [None] * SLAB_PAGES
    assert loan.pool.stats.corrupt == SLAB_PAGES


def test_slabs_that_nothing_used_for_a_tick_go_back(make: Make) -> None:
    loan = make()
    loan.lend(((0, 10),))
    loan.fill(4 * SLAB_PAGES)
    loan.pool.flush_object(1)
    returned: list[Return] = []
    for _ in range(3):
        loan.borrower.tick()
        returned += [message for message in loan.borrower.outgoing(0.0) if isinstance(message, Return)]
    assert sorted(slab for message in returned for slab in slabs_of(message.runs)) == list(range(10))
    assert ({message.answer for message in returned}, loan.borrower.counters.returned_slabs) == ({0}, 10)


def test_a_guest_that_puts_keeps_a_few_unused_slabs(make: Make) -> None:
    loan = make()
    loan.lend(((0, 40),))
    for index in range(6):
        loan.pool.put(1, index, noise(index))
        loan.borrower.tick()
        loan.borrower.outgoing(0.0)
    assert 0 < loan.source.stocked <= FIRST_ASK // 2


def test_a_report_is_sent_while_something_moves_and_once_more(make: Make) -> None:
    loan = make()

    def reports() -> list[Report]:
        loan.borrower.tick()
        return [message for message in loan.borrower.outgoing(0.0) if isinstance(message, Report)]

    assert len(reports()) == 1
    assert len(reports()) == 1
    assert reports() == []
    loan.lend(((0, 1),))
    loan.fill(3)
    loan.pool.get(1, 1)
    loan.pool.get(1, 9)
    (report,) = reports()
    assert (report.puts, report.hits, report.misses, report.pages) == (3, 1, 1, 2)
    assert len(reports()) == 1
    assert reports() == []


def test_limits_freeze_and_thaw_all_pools(make: Make) -> None:
    loan = make()
    loan.lend(((0, 4),))
    loan.borrower.on_message(0.0, Limits(9, 9, frozen=True))
    assert not loan.pool.put(1, 1, noise(1))
    assert loan.sent(Ask) == []
    loan.borrower.on_message(0.0, Limits(9, 9))
    assert loan.pool.put(1, 1, noise(1))


def test_a_guest_that_comes_again_claims_exactly_what_it_holds(make: Make) -> None:
    loan = make()
    assert isinstance(loan.hello, Hello)
    assert not loan.hello.again
    loan.lend(((0, 4), (10, 1)))
    loan.lend(((6, 2),), persistent=True)
    loan.fill(3 * SLAB_PAGES)
    loan.borrower.on_message(0.0, Revoke(1, 5))
    given = loan.tmem.give_up(1)
    assert given == 1
    messages = loan.borrower.greeting()
    hello, claims = messages[0], messages[1:]
    assert isinstance(hello, Hello)
    assert hello.again
    assert hello.token == loan.hello.token
    assert all(isinstance(claim, Claim) for claim in claims)
    held: dict[bool, list[int]] = {False: [], True: []}
    for claim in claims:
        assert isinstance(claim, Claim)
        held[claim.persistent] += slabs_of(claim.runs)
    assert [claim.last for claim in claims if isinstance(claim, Claim)] == [False, True]
    assert held[True] == [6, 7]
    assert len(held[False]) == 4
    assert set(held[False]) < {0, 1, 2, 3, 10}
    loan.borrower.on_welcome(Welcome(4, 256, 128))
    assert not loan.borrower.has_open_revoke, "what the last connection wanted is void"
    assert loan.borrower.outgoing(0.0) == []
    loan.fill(5 * SLAB_PAGES)
    assert len(loan.sent(Ask)) == 1


def test_many_claims_are_split_and_only_the_final_one_is_the_last(make: Make) -> None:
    loan = make(slabs=20_000)
    loan.borrower.on_message(0.0, Lend(tuple((2 * n, 1) for n in range(MAX_RUNS)), 1))
    loan.borrower.on_message(0.0, Lend(tuple((2 * n, 1) for n in range(MAX_RUNS, 2 * MAX_RUNS)), 1))
    claims: list[FromGuest] = loan.borrower.greeting()[1:]
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
    loan = make()
    loan.lend(((0, 2),))
    loan.lend(((4, 1),), persistent=True)
    with pytest.raises(ProtocolError):
        loan.borrower.on_message(0.0, message)
    assert (loan.source.held(Kind.EPHEMERAL), loan.source.held(Kind.PERSISTENT)) == (2, 1)
