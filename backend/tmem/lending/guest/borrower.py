"""What a guest says to tmemd and how it answers: the borrower's side of the protocol, without I/O and without a clock.

    acquire finds the stock low --> Ask --> Lend --> stock        Deny: ask again later, if it still runs low
    Revoke --> owed; paid in steps (stock, spares, compaction, coldest pages) --> Return ... Return(last)
    Taken --> the pool loses the slabs at once --> Confirm
    unused for a whole tick --> Return
    connection lost --> pool and slabs stay; the next Hello says `again` and Claims what is held

Lend, Revoke and Taken come in one ordered stream, and the pool loses a taken slab before the next message is read: no
entry can refer to a slab's earlier life. tmemd lends it again only after the Confirm, so a Return that crosses the
Taken means nothing either.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from tmem.lending.guest.borrowedarena import BorrowedArena
from tmem.lending.protocol.kind import Kind
from tmem.lending.protocol.messages import (
    BATCH_SLABS,
    RETRY,
    TOKEN_BYTES,
    VERSION,
    Ask,
    Claim,
    Confirm,
    Deny,
    Evicted,
    FromGuest,
    Hello,
    Lend,
    Limits,
    Refused,
    Report,
    Return,
    Revoke,
    Taken,
    ToGuest,
    Welcome,
    guest_name,
)
from tmem.lending.protocol.runs import Runs, count, split_by_slabs, split_for_messages
from tmem.lending.protocol.wire import ProtocolError
from tmem.pool import Tmem

TICK = 0.9  # seconds between reports
UNASKED = 0  # in the place of a Revoke's serial: what a lower persistent cap does not allow any more
FIRST_ASK = BATCH_SLABS // 4
MAX_RETRY = 1.6  # seconds
LOSE = 32  # slabs forgotten between two looks at the requests
STEP = 8  # slabs given up between two looks at the requests: about 5 ms


@dataclass(slots=True)
class Counters:
    """What was said and heard since the guest began."""

    asks: int = 0
    lent_slabs: int = 0
    denies: int = 0
    revokes: int = 0
    revoked_slabs: int = 0  # given back because of them
    returned_slabs: int = 0  # given back unasked
    taken_slabs: int = 0  # taken without an answer
    reconnects: int = 0


class _Need:
    """The asking for one kind of slabs."""

    def __init__(self) -> None:
        self.open = 0  # serial of the Ask that is not answered yet
        self.batch = FIRST_ASK
        self.retry = RETRY
        self.not_before = float("-inf")

    def granted(self, held: int) -> None:
        # Not more than half of what is held, so that a small pool is not mostly stock.
        self.open = 0
        self.batch = min(2 * self.batch, BATCH_SLABS, max(FIRST_ASK, held // 2))
        self.retry = RETRY

    def denied(self, now: float) -> None:
        self.open = 0
        self.batch = FIRST_ASK
        self.not_before = now + self.retry
        self.retry = min(2 * self.retry, MAX_RETRY)


class PersistentPages(Protocol):
    """The owner of the persistent pools."""

    def request_release(self, slabs: int) -> None:
        """Free slabs soon that tmemd wants back and that pages still use."""

    def note_eviction(self) -> None:
        """Note that the memory of all persistent pools is gone."""


class Borrower:
    """One guest's dealings with tmemd. `now` is seconds on any one monotonic clock."""

    def __init__(
        self,
        source: BorrowedArena,
        tmem: Tmem,
        name: str,
        persistent_slabs: int | None = 0,
        persistent_pages: PersistentPages | None = None,
    ) -> None:
        self.source = source
        self._persistent_pages = persistent_pages
        self.counters = Counters()
        self.persistent_cap = 0  # slabs
        self.evicted = False
        self._gone: deque[Runs] = deque()  # ephemeral slabs that the pool has and that are on loan no more
        self._tmem = tmem
        self.name = guest_name(name)
        self._persistent_slabs = persistent_slabs
        self._token = os.urandom(TOKEN_BYTES)
        self._registered = False
        self._frozen = False
        self._serial = 0
        self._needs = (_Need(), _Need())
        self._owed: deque[tuple[int, int, Kind]] = deque()  # serial of the Revoke, slabs left, kind
        self._outbox: list[FromGuest] = []
        self._reported: Report | None = None
        self._moved = False
        self._spares = [0, 0]  # of the pool, at the last tick

    # The connection begins and ends.

    def greeting(self) -> list[FromGuest]:
        """Give what a new connection begins with; whatever the last one still had to say is void."""
        self._needs = (_Need(), _Need())
        self._owed.clear()
        self._outbox.clear()
        self._reported = None
        self.source.wanted = [False, False]
        hello = Hello(VERSION, self._token, self.name, self.source.total, self._persistent_slabs, self._registered)
        claims: list[FromGuest] = []
        if self._registered:
            for kind in Kind:
                parts = split_for_messages(self.source.claims(kind))
                claims += [Claim(part, kind.persistent, last and kind.persistent) for part, last in parts]
        return [hello, *claims]

    def welcome(self, message: Welcome) -> None:
        """Take in that the greeting was accepted."""
        self.counters.reconnects += self._registered
        if not self._registered:
            self.source.wanted[Kind.EPHEMERAL] = True  # for the first pages to be put
        self._registered = True
        self._limit(message.cap, message.persistent_cap, message.frozen)

    # Messages come in.

    def received(self, now: float, message: ToGuest) -> None:
        """Act on a message; ProtocolError when no honest tmemd sends it."""
        try:
            match message:
                case Lend():
                    self._lent(message)
                case Deny():
                    self.counters.denies += 1
                    for kind in Kind:
                        if self._needs[kind].open == message.serial:
                            self._needs[kind].denied(now)
                            self.source.wanted[kind] = False
                case Revoke():
                    self.counters.revokes += 1
                    self._owed.append((message.serial, message.slabs, message.kind))
                case Taken():
                    self._taken(message)
                case Limits():
                    self._limit(message.cap, message.persistent_cap, message.frozen)
                case Evicted():
                    self.evict()
                case Welcome() | Refused():
                    raise ValueError(f"a {type(message).__name__} in the middle")
        except ValueError as error:
            raise ProtocolError(str(error)) from error

    def evict(self) -> None:
        """Take in that nothing is on loan any more, for good: `forget` then, until it is done."""
        self.evicted = True
        self._tmem.freeze()
        self._owed.clear()
        self._outbox.clear()
        for kind in Kind:
            self.source.shed(self.source.total, kind)
            self.source.returned(kind)
        self._gone.extend(split_by_slabs(self.source.claims(Kind.EPHEMERAL), LOSE))
        if self._persistent_pages is not None:
            self._persistent_pages.note_eviction()

    def forget(self) -> bool:
        """Lose some of the ephemeral slabs that are gone; False when none was left."""
        if not self._gone:
            return False
        for slab in self.source.take(self._gone.popleft()):
            self._tmem.lose(slab)
        return True

    def _lent(self, message: Lend) -> None:
        lent = self.source.lend(message.runs, message.kind)
        self.counters.lent_slabs += lent
        over = self.source.held(Kind.PERSISTENT) - self.persistent_cap
        if message.kind is Kind.PERSISTENT and over > 0:
            # The cap was lowered while these were on their way: they are not to stand in for slabs that are owed.
            self.source.shed(min(over, lent), Kind.PERSISTENT)
        need = self._needs[message.kind]
        if message.done and need.open == message.serial:
            need.granted(self.source.held(message.kind))
        self.source.reserve[message.kind] = need.batch // 2
        self.source.wanted[message.kind] = False

    def _taken(self, message: Taken) -> None:
        for slab in self.source.take(message.runs):
            self._tmem.lose(slab)
        taken = count(message.runs)
        self.counters.taken_slabs += taken
        # What was taken needs not be given any more.
        for place, (serial, left, kind) in enumerate(self._owed):
            if kind is Kind.EPHEMERAL and taken:
                less = min(left, taken)
                self._owed[place] = (serial, left - less, kind)
                taken -= less
        self._outbox.append(Confirm(message.serial))

    def _limit(self, cap: int, persistent_cap: int, frozen: bool) -> None:
        self.source.cap, self.persistent_cap = cap, persistent_cap
        if frozen != self._frozen:
            self._frozen = frozen
            (self._tmem.freeze if frozen else self._tmem.thaw)()
        if (over := self.source.held(Kind.PERSISTENT) - persistent_cap) > 0:
            self._owed.append((UNASKED, over, Kind.PERSISTENT))

    # Messages go out.

    @property
    def owes(self) -> bool:
        """Tell whether a Revoke is not answered yet: `pay` then."""
        return bool(self._owed)

    def pay(self, slabs: int = STEP) -> None:
        """Give up a few of the slabs that are owed, coldest pages first."""
        serial, left, kind = self._owed.popleft()
        if serial == UNASKED:
            left = max(0, min(left, self.source.held(Kind.PERSISTENT) - self.persistent_cap))
        self._give_back(kind)
        wanted = min(slabs, left)
        given = self.source.shed(wanted, kind)
        if given < wanted:
            given += self._tmem.give_up(wanted - given, kind.persistent)
        left -= given
        last = left == 0 or given < wanted
        self.counters.revoked_slabs += given
        self._give_back(kind, serial, last)
        if not last:
            self._owed.appendleft((serial, left, kind))
        elif kind is Kind.PERSISTENT and left and self._persistent_pages is not None:
            self._persistent_pages.request_release(left)

    def _give_back(self, kind: Kind, answer: int = 0, last: bool = True) -> None:
        """Send back what the pool released and the stock shed."""
        runs = self.source.returned(kind)
        if not runs and not answer:
            return
        if not answer:
            self.counters.returned_slabs += count(runs)
        age = self._tmem.oldest_age()
        for part, final in split_for_messages(runs):
            self._outbox.append(Return(part, kind.persistent, answer, last and final, age))

    def tick(self) -> None:
        """Report when something moved, and once more when nothing does any longer; return what was not used."""
        report = self._report()
        moved = self._reported is None or self._without_age(report) != self._without_age(self._reported)
        for kind in Kind:
            self._return_unused(kind, self._needs[kind].batch // 2 if moved else 0)
        if moved or self._moved:
            self._outbox.append(report)
            self._reported = report
        self._moved = moved

    def _return_unused(self, kind: Kind, keep: int) -> None:
        """Return what no page used since the last tick, but for a few slabs where there may be need in a moment."""
        spares = self._tmem.spares(kind.persistent)
        unused = min(spares, self._spares[kind]) - keep
        self._spares[kind] = spares - (self._tmem.give_up(unused, kind.persistent) if unused > 0 else 0)
        if (idle := self.source.idle(kind) - keep) > 0:
            self.source.shed(idle, kind)
            self._needs[kind].batch = FIRST_ASK

    @staticmethod
    def _without_age(report: Report) -> tuple[int, ...]:
        return (report.pages, report.used_bytes, report.puts, report.hits, report.misses, report.ghost_hits)

    def _report(self) -> Report:
        held, pools = self._tmem.stats(), self._tmem.ephemeral_stats()
        return Report(
            self._tmem.oldest_age(),
            held.pages,
            held.used_bytes,
            puts=sum(pool.puts for pool in pools),
            hits=sum(pool.succ_gets for pool in pools),
            misses=sum(pool.failed_gets for pool in pools),
            ghost_hits=sum(pool.ghost_hits for pool in pools),
        )

    def outgoing(self, now: float) -> list[FromGuest]:
        """Give what is to be sent now, in order."""
        if self.evicted:
            return []
        for kind in Kind:
            self._give_back(kind)
            self._ask(now, kind)
        messages, self._outbox = self._outbox, []
        return messages

    def _ask(self, now: float, kind: Kind) -> None:
        need = self._needs[kind]
        if not self.source.wanted[kind] or need.open or now < need.not_before or self._frozen:
            return
        ephemeral, kept = self.source.held(Kind.EPHEMERAL), self.source.held(Kind.PERSISTENT)
        room = self.source.cap - ephemeral - kept
        if kind is Kind.PERSISTENT:
            room = min(room, self.persistent_cap - kept)
        self.source.wanted[kind] = False
        if room <= 0:
            need.not_before = now + RETRY
            return
        self._serial = need.open = self._serial % 0xFFFFFFFF + 1
        self.counters.asks += 1
        self._outbox.append(Ask(need.open, min(need.batch, room), kind.persistent, self._tmem.oldest_age()))

    def deadline(self) -> float | None:
        """Give the time at which a postponed Ask is due; None when there is none."""
        times = [
            need.not_before
            for kind, need in zip(Kind, self._needs, strict=True)
            if self.source.wanted[kind] and not need.open
        ]
        return min(times, default=None)

    def check(self) -> None:
        """Raise AssertionError unless the slabs that the pool has are those that the source gave it."""
        self.source.check()
        out = sum(self.source.held(kind) for kind in Kind) - self.source.stocked
        assert out == self._tmem.stats().slabs, "the pool has other slabs than were given to it"
        assert all(left >= 0 for _, left, _ in self._owed)
