"""All of tmemd's decisions: who is lent slabs, who must give slabs back, and what an administrator changes.

Every method that decides takes `now`, seconds of any monotonic clock, and returns actions, which are carried out in
order. Guests are numbers, unique while tmemd runs. All sizes are slabs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from tmem.arena import SLAB_SIZE
from tmem.lending.lender.account import Account
from tmem.lending.lender.actions import Action, Close, CountPopulated, GuestFault, HangUp, Holding, Refusal, Send
from tmem.lending.lender.allocator import Allocator
from tmem.lending.lender.ledger import UNBOUNDED, Ledger, UserBounds, as_bytes
from tmem.lending.lender.reattacher import Reattacher
from tmem.lending.lender.reclaimer import REVOKE_TIMEOUT, Reclaimer
from tmem.lending.lender.reclaimpolicy import AgeUtility, ReclaimPolicy
from tmem.lending.lender.slabmap import State
from tmem.lending.lender.stats import Counters, LenderStats, Why
from tmem.lending.lender.sweeper import Sweeper
from tmem.lending.protocol.kind import Kind
from tmem.lending.protocol.messages import (
    BATCH_SLABS,
    MAX_SECONDS,
    Ask,
    Claim,
    Confirm,
    Evicted,
    FromGuest,
    Hello,
    Limits,
    Report,
    Return,
    Revoke,
    Row,
    Welcome,
)
from tmem.lending.protocol.runs import Runs

__all__ = ["BATCH_SLABS", "REVOKE_TIMEOUT", "Lender"]

EXCESS_AUDITS = 3  # audits in a row that find more than a batch in excess before a guest is barred
EVICTED = "it was evicted from tmemd: its pages there are gone; unmount and mount it to borrow again"


class Lender:
    """Messages of guests, results of actions and verbs of the administrator go in; actions come out."""

    def __init__(
        self,
        size: int,
        *,
        policy: type[ReclaimPolicy] = AgeUtility,
        bounds: UserBounds = UNBOUNDED,
        holdings: Sequence[Holding] = (),
    ) -> None:
        """Start with `size` slabs to lend, and `bounds` for the guests of each user.

        `holdings` are those of guests whose process is alive, from before a restart: they stay booked and are
        not lent to others until their guests claim them or end. `guests_away` gives their numbers.
        """
        self._actions: list[Action] = []
        self._frozen = False
        self._counters = Counters()
        self._ledger = Ledger(size, bounds)
        self._ledger.restore(holdings)
        self._accounts = self._ledger.accounts
        act = self._actions.append
        self._reclaimer = Reclaimer(self._ledger, self._counters, act)
        self._allocator = Allocator(self._ledger, self._reclaimer, policy(), self._counters, act)
        self._reattacher = Reattacher(self._ledger, self._reclaimer, self._counters, act)
        self._sweeper = Sweeper(self._ledger, act)

    # Guests come and go.

    def guests_away(self) -> dict[int, Holding]:
        """Return the guests that are not connected: watch their processes and call `on_process_ended`."""
        return {number: self.holding(number) for number, account in self._accounts.items() if not account.connected}

    def holdings(self) -> list[Holding]:
        """Return what every guest holds, to be kept for a restart."""
        return [self.holding(number) for number in self._accounts]

    def holding(self, guest: int) -> Holding:
        """Return what a guest holds, with slabs that are being populated or not punched yet."""
        account = self._accounts[guest]
        return Holding(
            account.token,
            account.name,
            account.uid,
            account.pid,
            account.map.total,
            min(account.ephemeral + account.unpunched, account.map.total - account.persistent),
            account.persistent,
            account.settings,
        )

    def join(self, now: float, hello: Hello, uid: int, pid: int) -> tuple[int, list[Action]]:
        """Register a guest and return its number. Its memfd must be sealed and have `hello.slabs` slabs.

        Refusal when it may not join; `retry` is set when it may later. With `again` the number is the one it
        had when its token is known.
        """
        known = next((account for account in self._accounts.values() if account.token == hello.token), None)
        try:
            if known is None:
                account, changed = self._ledger.admit(hello, uid, pid)
                self._counters.joins += 1
                account.slabs_unknown = hello.again
                account.change(frozen=self._frozen)
            else:
                account, changed = self._readmit(known, hello, uid, pid), []
                self._counters.rejoins += 1
        except Refusal as refusal:
            self._counters.refuse(refusal.why)
            raise
        account.connected = True
        if hello.again:
            self._reattacher.start(now, account)
        welcome = Welcome(account.number, self._effective_cap(account), account.persistent_cap, account.settings.frozen)
        self._actions.append(Send(account.number, welcome))
        self._tell_limits(changed)
        return account.number, self._decide(now)

    @staticmethod
    def _readmit(account: Account, hello: Hello, uid: int, pid: int) -> Account:
        """Admit a guest that the ledger knows; Refusal when it may not come back."""
        if account.settings.evicted:
            raise Refusal(EVICTED, Why.EVICTED, evicted=True)
        if account.uid != uid or account.map.total != hello.slabs or not hello.again:
            raise Refusal("the token is another guest's: start again with a new one", Why.TOKEN)
        if account.connected or account.ended:
            raise Refusal("the guest's old connection has not ended: try again", Why.CONNECTED, retry=True)
        account.name, account.pid = hello.name, pid
        return account

    def on_message(self, now: float, guest: int, message: FromGuest) -> list[Action]:
        """Handle a message of a connected guest; GuestFault when no honest guest sends it."""
        account = self._accounts[guest]
        if not account.connected:
            raise ValueError(f"guest {guest} is not connected")
        account.unresponsive = False
        try:
            self._handle(now, account, message)
        except GuestFault:
            self._counters.faults += 1
            raise
        return self._decide(now)

    def _handle(self, now: float, account: Account, message: FromGuest) -> None:
        if isinstance(message, Report):
            account.activity.on_report(now, message)
        elif isinstance(message, Claim):
            if self._reattacher.on_claim(now, account, message):
                self._enforce(now, account)
        elif account.claims is not None:
            raise GuestFault("it did not finish its claims")
        elif isinstance(message, Ask):
            self._allocator.ask(now, account, message)
        elif isinstance(message, Return):
            if message.age is not None:
                account.activity.update_age(now, message.age)
            self._reclaimer.on_return(now, account, message)
        elif isinstance(message, Confirm):
            self._reclaimer.on_confirm(account, message.serial)
        else:
            raise GuestFault("it said hello twice")

    def on_disconnected(self, now: float, guest: int) -> list[Action]:
        """Handle the end of a connection, after all of it was read; the guest keeps its slabs."""
        self._disconnect(self._accounts[guest])
        return self._decide(now)

    def on_process_ended(self, now: float, guest: int) -> list[Action]:
        """Handle the end of a guest's process and connection: close its memfd."""
        account = self._accounts[guest]
        account.ended = True
        self._disconnect(account)
        self._actions.append(Close(guest))
        return self._decide(now)

    def on_closed(self, now: float, guest: int) -> list[Action]:
        """Free the slabs of a guest whose memfd is closed; remove it if its process has ended."""
        account = self._accounts.get(guest)
        if account is not None:
            self._allocator.on_closed(account)
            self._reclaimer.on_closed(account)
            self._reattacher.on_closed(account)
            self._sweeper.on_closed(account)
            if account.ended:
                self._counters.ends += 1
            self._tell_limits(self._ledger.close(account) if account.ended else self._ledger.clear(account))
        return self._decide(now)

    # What the executor found out.

    def on_populated(self, now: float, guest: int, batch: int, runs: Runs) -> list[Action]:
        """Lend the slabs that were populated; the others were punched. Deny when there are none.

        May be called for a guest that disconnected or ended since.
        """
        account = self._accounts.get(guest)
        if account is not None:
            self._allocator.on_populated(now, batch, account, runs)
            self._enforce(now, account)  # a limit may have been lowered meanwhile
        return self._decide(now)

    def on_holes_found(self, now: float, guest: int, runs: Runs) -> list[Action]:
        """Take claimed ephemeral slabs that are holes."""
        account = self._accounts.get(guest)
        if account is not None:
            self._reattacher.on_holes_found(now, account, runs)
        return self._decide(now)

    def on_socket_drained(self, now: float, guest: int) -> list[Action]:
        """Take the rest of the target, or settle the claims, after DrainSocket."""
        account = self._accounts.get(guest)
        if account is not None:
            self._reclaimer.on_socket_drained(now, account)
            if self._reattacher.on_socket_drained(now, account):
                self._counters.faults += 1
                self._actions.append(HangUp(guest))
                self._disconnect(account)
        return self._decide(now)

    def on_punched(self, now: float, guest: int, freed: int) -> list[Action]:
        """Free slabs that were punched."""
        account = self._accounts.get(guest)
        if account is not None:
            self._ledger.unpunched.add(account, -freed)
        return self._decide(now)

    def on_hang(self, now: float, guest: int, hangs: bool) -> list[Action]:
        """Record whether a call on a guest's arena hangs; meanwhile no Ask waits for its slabs."""
        account = self._accounts.get(guest)
        if account is not None:
            self._counters.hangs += hangs
            self._ledger.unpunched.set_hanging(account, hangs)
            self._allocator.reclaim_excess(now)
        return self._decide(now)

    def on_pinned(self, now: float, pinned_bytes: int) -> list[Action]:
        """Book memory that stays in use after its punch, as far as its user is known."""
        self._ledger.unpunched.update_pinned(pinned_bytes // SLAB_SIZE, self._accounts.values())
        self._allocator.reclaim_excess(now)
        return self._decide(now)

    def audit(self) -> list[Action]:
        """Count the populated bytes of each arena."""
        accounts = self._accounts.values()
        return [
            CountPopulated(one.number, one.held)
            for one in accounts
            if not (one.hanging or one.ended or one.settings.evicted)
        ]

    def on_audited(self, now: float, guest: int, held: int, populated_bytes: int) -> list[Action]:
        """Compare an arena's populated bytes (st_blocks * 512) with what the guest held, both as of a CountPopulated.

        An excess is punched and counted. A guest with more than a batch in EXCESS_AUDITS audits in a row is barred.
        """
        account = self._accounts.get(guest)
        if account is None:
            return []
        self._counters.audits += 1
        if account.slabs_unknown:
            self._reattacher.book_populated(account, populated_bytes)
            return self._decide(now)
        excess = populated_bytes - held * SLAB_SIZE
        if excess > 0:
            self._counters.excess_audits += 1
            self._counters.excess_bytes += excess
            if self._sweeper.is_sweeping(account):  # the last excess is not punched yet
                return self._decide(now)
            self._sweeper.start(now, account)
        account.excess_audits = account.excess_audits + 1 if excess > BATCH_SLABS * SLAB_SIZE else 0
        if account.excess_audits >= EXCESS_AUDITS and not account.barred:
            account.barred = True
            self._counters.barred_guests += 1
            self._reclaimer.take_all(account)
        return self._decide(now)

    def deadline(self) -> float | None:
        """Return the time at which `wake` is to be called, or None."""
        deadlines = (self._reclaimer.deadline(), self._reattacher.deadline(), self._sweeper.deadline())
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def wake(self, now: float) -> list[Action]:
        """Handle all deadlines that are due."""
        self._reclaimer.wake(now)
        self._reattacher.wake(now)
        self._sweeper.wake(now)
        return self._decide(now)

    # Verbs of the administrator; each may raise Refusal.

    @property
    def size(self) -> int:
        """Number of slabs to lend."""
        return self._ledger.size

    def find(self, guest: str) -> int:
        """Return the number of a guest by its number or name; Refusal when there is none or more than one."""
        there = {number: account for number, account in self._accounts.items() if not account.settings.evicted}
        named = [account for account in there.values() if account.name == guest]
        # A guest that ended and the next one at the same mountpoint have the same name.
        found = [account for account in named if account.connected] or named
        if not found and guest.isdecimal() and int(guest) in there:
            return int(guest)
        if len(found) == 1:
            return found[0].number
        self._counters.refuse(Why.UNKNOWN)
        if found:
            raise Refusal(f"{len(found)} guests are called {guest}: use the number (tmemctl list)", Why.UNKNOWN)
        raise Refusal(f"there is no guest {guest}: tmemctl list shows them", Why.UNKNOWN)

    def set_limits(
        self,
        now: float,
        guest: int,
        *,
        weight: float | None = None,
        cap: int | None = None,
        floor: int | None = None,
        persistent_cap: int | None = None,
    ) -> list[Action]:
        """Change limits; reclaim what a lower cap no longer allows."""
        account = self._accounts[guest]
        try:
            self._tell_limits(self._ledger.set_limits(account, weight, cap, floor, persistent_cap))
        except Refusal as refusal:
            self._counters.refuse(refusal.why)
            raise
        self._enforce(now, account)
        return self._decide(now)

    def freeze(self, now: float, guest: int | None) -> list[Action]:
        """Freeze the pools of a guest, or of all present and future ones; lend them nothing more."""
        for account in self._select(guest, True):
            account.change(frozen=True)
            self._tell_limits([account])
        return self._decide(now)

    def thaw(self, now: float, guest: int | None) -> list[Action]:
        """End freeze and drain."""
        for account in self._select(guest, False):
            account.change(frozen=False, draining=False)
            self._tell_limits([account])
        return self._decide(now)

    def _select(self, guest: int | None, frozen: bool) -> list[Account]:
        if guest is not None:
            return [self._accounts[guest]]
        self._frozen = frozen
        return list(self._accounts.values())

    def revoke(self, now: float, guest: int, slabs: int, kind: Kind = Kind.EPHEMERAL) -> list[Action]:
        """Reclaim slabs from a guest; persistent ones are revoked and never taken."""
        account = self._accounts[guest]
        if kind is Kind.EPHEMERAL:
            self._reclaimer.reclaim(now, account, slabs)
        elif account.connected and (most := min(slabs, account.map.counts[State.PERSISTENT])):
            self._counters.revokes += 1
            self._actions.append(Send(guest, Revoke(account.next_serial(), most, True)))
        return self._decide(now)

    def drain(self, now: float, guest: int) -> list[Action]:
        """Reclaim all ephemeral slabs of a guest; lend it nothing until it is thawed."""
        account = self._accounts[guest]
        account.change(draining=True)
        self._enforce(now, account)
        return self._decide(now)

    def evict(self, now: float, guest: int, lose_persistent: bool) -> list[Action]:
        """Free all memory of a guest and refuse it from now on; Refusal when it would lose persistent slabs."""
        account = self._accounts[guest]
        if account.persistent and not lose_persistent:
            held = as_bytes(account.persistent)
            raise Refusal(f"{account.name} holds {held} for its hswap, which it would lose: add --yes if it may")
        self._counters.evictions += 1
        if account.connected:
            self._actions.append(Send(guest, Evicted(EVICTED)))
            self._actions.append(HangUp(guest))
        account.change(evicted=True)
        self._disconnect(account)
        self._actions.append(Close(guest))
        return self._decide(now)

    def resize(self, now: float, size: int) -> tuple[int, list[Action]]:
        """Change the size; return the new one, which persistent slabs and promises may keep larger."""
        self._ledger.resize(size)
        self._tell_limits(self._accounts.values())
        self._allocator.reclaim_excess(now)
        return self._ledger.size, self._decide(now)

    # Tables and sums.

    def rows(self, now: float, uid: int | None = None) -> list[Row]:
        """Return the table of guests, of one user or of all, by number."""
        return [self._row(now, account) for account in self._accounts.values() if uid in (None, account.uid)]

    @staticmethod
    def _row(now: float, account: Account) -> Row:
        activity = account.activity
        report = activity.report
        return Row(
            account.number,
            account.name,
            account.uid,
            account.pid,
            account.state,
            account.map.total,
            account.ephemeral,
            account.persistent,
            account.settings.weight,
            account.settings.cap,
            account.settings.floor,
            account.persistent_cap,
            None if activity.age is None else min(activity.oldest_age(now), MAX_SECONDS),
            *((report.pages, report.used_bytes, report.puts, report.hits, report.misses) if report else (0,) * 5),
            account.revoked,
            account.taken,
        )

    def stats(self) -> LenderStats:
        """Return the sums and the counters."""
        ledger, totals = self._ledger, self._ledger.totals
        accounts = self._accounts.values()
        return LenderStats(
            size=ledger.size,
            free=ledger.free,
            ephemeral=totals[State.EPHEMERAL],
            persistent=totals[State.PERSISTENT],
            promised=totals[State.POPULATING_EPHEMERAL] + totals[State.POPULATING_PERSISTENT],
            unpunched=ledger.unpunched.total - ledger.unpunched.pinned.of.total(),
            pinned=ledger.unpunched.pinned.of.total(),
            reserved=ledger.committed(),
            guests=len(accounts),
            connected=sum(account.connected for account in accounts),
            map_bytes=sum(account.map.size for account in accounts),
            counters=dataclasses.asdict(self._counters),
        )

    # Helpers.

    def _decide(self, now: float) -> list[Action]:
        """Serve open Asks; return and clear the collected actions."""
        if self._ledger.shrink():
            self._tell_limits(self._accounts.values())
            self._allocator.reclaim_excess(now)
        self._allocator.serve(now)
        actions = self._actions.copy()
        self._actions.clear()
        return actions

    def _tell_limits(self, accounts: Iterable[Account]) -> None:
        for account in accounts:
            if account.connected:
                limits = Limits(self._effective_cap(account), account.persistent_cap, account.settings.frozen)
                self._actions.append(Send(account.number, limits))

    def _effective_cap(self, account: Account) -> int:
        """Return the cap that the guest is told: at most the size."""
        return min(account.settings.cap, self._ledger.size)

    def _enforce(self, now: float, account: Account) -> None:
        """Reclaim what exceeds a guest's limits or the size."""
        ephemeral = account.map.counts[State.EPHEMERAL]
        over = ephemeral if account.settings.draining or account.barred else account.held - account.settings.cap
        self._reclaimer.reclaim(now, account, max(0, over - account.reclaim_target))
        self._allocator.reclaim_excess(now)

    def _disconnect(self, account: Account) -> None:
        """Drop the state of a guest's connection."""
        if account.connected:
            account.connected = False
            account.claims = None
            self._allocator.on_disconnected(account)
            self._reclaimer.on_disconnected(account)

    def check(self) -> None:
        """Raise AssertionError unless sums equal totals, no slab is in two states and budgets hold."""
        self._ledger.check()
        self._reclaimer.check()
        self._allocator.check()
        assert not self._actions, "actions that were not returned"
