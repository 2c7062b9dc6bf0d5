"""The borrower's side of the protocol, without I/O and without a clock.

    the stock runs low --> Ask --> Lend --> stock                 Deny: ask again later if it is still low
    Revoke --> slabs are given up in steps (stock, spares, compaction, coldest pages) --> Return ... Return(last)
    Taken --> the pool drops the slabs at once --> Confirm
    unused for a whole tick --> Return
    connection lost --> pool and slabs stay in use; the next Hello has `again` set, and Claims list what is held

Lend, Revoke and Taken arrive in one ordered stream, and the pool drops a taken slab before the next message is
handled. So no entry can refer to an earlier loan of a slab. tmemd lends the slab again only after the Confirm, so it
can ignore a Return that crosses the Taken.
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
NO_SERIAL = 0  # instead of a Revoke's serial: slabs above a lowered persistent cap
FIRST_ASK = BATCH_SLABS // 4
MAX_RETRY = 1.6  # seconds
DROP_STEP = 32  # slabs of an evicted guest that are dropped between two requests of the mount
REVOKE_STEP = 8  # slabs given up between two requests of the mount: about 5 ms


@dataclass(slots=True)
class Counters:
    """Messages and slabs since the guest started."""

    asks: int = 0
    lent_slabs: int = 0
    denies: int = 0
    revokes: int = 0
    revoked_slabs: int = 0  # returned for them
    returned_slabs: int = 0  # returned without a Revoke
    taken_slabs: int = 0  # taken by tmemd
    reconnects: int = 0


class _AskState:
    """The state of the Asks for one kind of slabs."""

    def __init__(self) -> None:
        self.open_serial = 0  # serial of the unanswered Ask; 0 if there is none
        self.batch = FIRST_ASK
        self.retry = RETRY
        self.not_before = float("-inf")

    def granted(self, held: int) -> None:
        # At most half of what is held, because a small pool would be mostly stock otherwise.
        self.open_serial = 0
        self.batch = min(2 * self.batch, BATCH_SLABS, max(FIRST_ASK, held // 2))
        self.retry = RETRY

    def denied(self, now: float) -> None:
        self.open_serial = 0
        self.batch = FIRST_ASK
        self.not_before = now + self.retry
        self.retry = min(2 * self.retry, MAX_RETRY)


class PersistentPages(Protocol):
    """The owner of the persistent pools."""

    def request_release(self, slabs: int) -> None:
        """Start to free slabs that pages use and tmemd wants back."""

    def note_eviction(self) -> None:
        """Mark all persistent pages as lost."""


class Borrower:
    """The state of one guest's loans. `now` is seconds on any monotonic clock."""

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
        self._evicted_slabs: deque[Runs] = deque()  # ephemeral slabs of an evicted guest that the pool still has
        self._tmem = tmem
        self.name = guest_name(name)
        self._persistent_slabs = persistent_slabs
        self._token = os.urandom(TOKEN_BYTES)
        self._registered = False
        self._frozen = False
        self._serial = 0
        self._asks = (_AskState(), _AskState())
        self._revokes: deque[tuple[int, int, Kind]] = deque()  # serial, slabs left, kind
        self._outbox: list[FromGuest] = []
        self._reported: Report | None = None
        self._was_active = False
        self._spares = [0, 0]  # of the pool, at the last tick

    # Connecting.

    def greeting(self) -> list[FromGuest]:
        """Return the first messages of a new connection; drop all that the last one had not sent."""
        self._asks = (_AskState(), _AskState())
        self._revokes.clear()
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

    def on_welcome(self, message: Welcome) -> None:
        """Handle the answer to the greeting."""
        self.counters.reconnects += self._registered
        if not self._registered:
            self.source.wanted[Kind.EPHEMERAL] = True  # a stock for the first puts
        self._registered = True
        self._set_limits(message.cap, message.persistent_cap, message.frozen)

    # Messages from tmemd.

    def on_message(self, now: float, message: ToGuest) -> None:
        """Handle a message. Raise ProtocolError for one that no honest tmemd sends."""
        try:
            match message:
                case Lend():
                    self._on_lend(message)
                case Deny():
                    self.counters.denies += 1
                    for kind in Kind:
                        if self._asks[kind].open_serial == message.serial:
                            self._asks[kind].denied(now)
                            self.source.wanted[kind] = False
                case Revoke():
                    self.counters.revokes += 1
                    self._revokes.append((message.serial, message.slabs, message.kind))
                case Taken():
                    self._on_taken(message)
                case Limits():
                    self._set_limits(message.cap, message.persistent_cap, message.frozen)
                case Evicted():
                    self.on_evicted()
                case Welcome() | Refused():
                    raise ValueError(f"an unexpected {type(message).__name__}")
        except ValueError as error:
            raise ProtocolError(str(error)) from error

    def on_evicted(self) -> None:
        """Handle an eviction: nothing is on loan any more. Call `drop_evicted` until it returns False."""
        self.evicted = True
        self._tmem.freeze()
        self._revokes.clear()
        self._outbox.clear()
        for kind in Kind:
            self.source.return_stock(self.source.total, kind)
            self.source.pop_returning(kind)
        self._evicted_slabs.extend(split_by_slabs(self.source.claims(Kind.EPHEMERAL), DROP_STEP))
        if self._persistent_pages is not None:
            self._persistent_pages.note_eviction()

    def drop_evicted(self) -> bool:
        """Drop the pages of some slabs of an evicted guest; return False if none are left."""
        if not self._evicted_slabs:
            return False
        for slab in self.source.take(self._evicted_slabs.popleft()):
            self._tmem.lose(slab)
        return True

    def _on_lend(self, message: Lend) -> None:
        lent = self.source.lend(message.runs, message.kind)
        self.counters.lent_slabs += lent
        over = self.source.held(Kind.PERSISTENT) - self.persistent_cap
        if message.kind is Kind.PERSISTENT and over > 0:
            # The cap was lowered while these were on their way. They must not count for slabs that are revoked.
            self.source.return_stock(min(over, lent), Kind.PERSISTENT)
        ask = self._asks[message.kind]
        if message.done and ask.open_serial == message.serial:
            ask.granted(self.source.held(message.kind))
        self.source.reserve[message.kind] = ask.batch // 2
        self.source.wanted[message.kind] = False
        self._tmem.follow_capacity()
        if self._tmem.short and message.kind is Kind.EPHEMERAL:
            self._tmem.restock()  # the engine's thread waits for them

    def _on_taken(self, message: Taken) -> None:
        for slab in self.source.take(message.runs):
            self._tmem.lose(slab)
        taken = count(message.runs)
        self.counters.taken_slabs += taken
        # Taken slabs count for the Revokes.
        for place, (serial, left, kind) in enumerate(self._revokes):
            if kind is Kind.EPHEMERAL and taken:
                less = min(left, taken)
                self._revokes[place] = (serial, left - less, kind)
                taken -= less
        self._outbox.append(Confirm(message.serial))

    def _set_limits(self, cap: int, persistent_cap: int, frozen: bool) -> None:
        self.source.cap, self.persistent_cap = cap, persistent_cap
        self._tmem.follow_capacity()
        if frozen != self._frozen:
            self._frozen = frozen
            (self._tmem.freeze if frozen else self._tmem.thaw)()
        if (over := self.source.held(Kind.PERSISTENT) - persistent_cap) > 0:
            self._revokes.append((NO_SERIAL, over, Kind.PERSISTENT))

    # Messages to tmemd.

    @property
    def has_open_revoke(self) -> bool:
        """Whether a Revoke is not fully answered; call `answer_revoke` then."""
        return bool(self._revokes)

    def answer_revoke(self, slabs: int = REVOKE_STEP) -> None:
        """Give up some of the revoked slabs, coldest pages first."""
        serial, left, kind = self._revokes.popleft()
        if serial == NO_SERIAL:
            left = max(0, min(left, self.source.held(Kind.PERSISTENT) - self.persistent_cap))
        self._queue_returns(kind)
        wanted = min(slabs, left)
        given = self.source.return_stock(wanted, kind)
        if given < wanted:
            given += self._tmem.give_up(wanted - given, kind.persistent)
        left -= given
        last = left == 0 or given < wanted
        self.counters.revoked_slabs += given
        self._queue_returns(kind, serial, last)
        if not last:
            self._revokes.appendleft((serial, left, kind))
        elif kind is Kind.PERSISTENT and left and self._persistent_pages is not None:
            self._persistent_pages.request_release(left)

    def _queue_returns(self, kind: Kind, answer: int = 0, last: bool = True) -> None:
        """Queue Returns for the slabs on their way back; `answer` is the serial of a Revoke."""
        runs = self.source.pop_returning(kind)
        if not runs and not answer:
            return
        if not answer:
            self.counters.returned_slabs += count(runs)
        age = self._tmem.oldest_age()
        for part, final in split_for_messages(runs):
            self._outbox.append(Return(part, kind.persistent, answer, last and final, age))

    def tick(self) -> None:
        """Return unused slabs; queue a Report if a counter changed, and once after the last change."""
        report = self._report()
        active = self._reported is None or self._without_age(report) != self._without_age(self._reported)
        for kind in Kind:
            self._return_unused(kind, self._asks[kind].batch // 2 if active else 0)
        if active or self._was_active:
            self._outbox.append(report)
            self._reported = report
        self._was_active = active

    def _return_unused(self, kind: Kind, keep: int) -> None:
        """Return slabs that no page used since the last tick, except `keep` of them."""
        spares = self._tmem.spares(kind.persistent)
        unused = min(spares, self._spares[kind]) - keep
        given = self._tmem.give_up(unused, kind.persistent, only_spares=True) if unused > 0 else 0
        self._spares[kind] = spares - given
        if (idle := self.source.count_unused(kind) - keep) > 0:
            self.source.return_stock(idle, kind)
            self._asks[kind].batch = FIRST_ASK

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
            hits=sum(pool.succ_gets + pool.reads for pool in pools),
            misses=sum(pool.failed_gets for pool in pools),
            ghost_hits=sum(pool.ghost_hits for pool in pools),
        )

    def outgoing(self, now: float) -> list[FromGuest]:
        """Return and clear the messages to send now, in order."""
        if self.evicted:
            return []
        for kind in Kind:
            self._queue_returns(kind)
            self._ask(now, kind)
        messages, self._outbox = self._outbox, []
        return messages

    def _ask(self, now: float, kind: Kind) -> None:
        ask = self._asks[kind]
        if not self.source.wanted[kind] or ask.open_serial or now < ask.not_before or self._frozen:
            return
        ephemeral, kept = self.source.held(Kind.EPHEMERAL), self.source.held(Kind.PERSISTENT)
        room = self.source.cap - ephemeral - kept
        if kind is Kind.PERSISTENT:
            room = min(room, self.persistent_cap - kept)
        self.source.wanted[kind] = False
        if room <= 0:
            ask.not_before = now + RETRY
            return
        self._serial = ask.open_serial = self._serial % 0xFFFFFFFF + 1
        self.counters.asks += 1
        self._outbox.append(Ask(ask.open_serial, min(ask.batch, room), kind.persistent, self._tmem.oldest_age()))

    def deadline(self) -> float | None:
        """Return the time at which a postponed Ask is due; None if there is none."""
        times = [
            ask.not_before
            for kind, ask in zip(Kind, self._asks, strict=True)
            if self.source.wanted[kind] and not ask.open_serial
        ]
        return min(times, default=None)

    def check(self) -> None:
        """Raise AssertionError unless the pool has as many slabs as the source gave it."""
        self.source.check()
        out = sum(self.source.held(kind) for kind in Kind) - self.source.stocked
        assert out == self._tmem.stats().slabs, "the pool has other slabs than were given to it"
        assert all(left >= 0 for _, left, _ in self._revokes)
