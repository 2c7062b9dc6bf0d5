"""What a person does to the lending: limits, freezing, taking back, another size, and a look at it all."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from tmem.lending.lender.account import Account
from tmem.lending.lender.actions import Action, Close, HangUp, Holding, Refusal, Send
from tmem.lending.lender.allocator import Allocator
from tmem.lending.lender.ledger import UNBOUNDED, Ledger, UserBounds, as_bytes
from tmem.lending.lender.reattacher import Reattacher
from tmem.lending.lender.reclaimer import Reclaimer
from tmem.lending.lender.reclaimpolicy import DEFAULT, RECLAIM_POLICIES
from tmem.lending.lender.slabmap import State
from tmem.lending.lender.stats import Counters, LenderStats, Why
from tmem.lending.lender.sweeper import Sweeper
from tmem.lending.protocol.kind import Kind
from tmem.lending.protocol.messages import MAX_SECONDS, Evicted, Limits, Revoke, Row

EVICTED = "it was evicted from tmemd: its pages there are gone; unmount and mount it to borrow again"


class Governor:
    """The parts of the lender, and the verbs of a person; each verb may raise Refusal."""

    def __init__(
        self,
        size: int,
        *,
        policy: str = DEFAULT,
        bounds: UserBounds = UNBOUNDED,
        holdings: Sequence[Holding] = (),
    ) -> None:
        """Start with `size` slabs to lend; `bounds` are those of what the guests of one user have together.

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
        self._allocator = Allocator(self._ledger, self._reclaimer, RECLAIM_POLICIES[policy](), self._counters, act)
        self._reattacher = Reattacher(self._ledger, self._reclaimer, self._counters, act)
        self._sweeper = Sweeper(self._ledger, act)

    def _decided(self, now: float) -> list[Action]:
        """Serve who waits, and give the actions that were decided."""
        if self._ledger.shrink():
            self._tell_limits(self._accounts.values())
            self._allocator.fit(now)
        self._allocator.serve(now)
        actions = self._actions.copy()
        self._actions.clear()
        return actions

    def _tell_limits(self, accounts: Iterable[Account]) -> None:
        for account in accounts:
            if account.connected:
                limits = Limits(self._most(account), account.persistent_cap, account.frozen)
                self._actions.append(Send(account.number, limits))

    def _most(self, account: Account) -> int:
        """Give the slabs that a guest may hold at most: it plans with that, so a cap beyond the size says nothing."""
        return min(account.cap, self._ledger.size)

    def _enforce(self, now: float, account: Account) -> None:
        """Take back what a guest may not hold (any longer), and what the size does not allow."""
        ephemeral = account.map.counts[State.EPHEMERAL]
        over = ephemeral if account.draining or account.barred else account.held - account.cap
        self._reclaimer.owe(now, account, max(0, over - account.debt))
        self._allocator.fit(now)

    @property
    def size(self) -> int:
        """Slabs that there are to lend."""
        return self._ledger.size

    def find(self, guest: str) -> int:
        """Give the number of a guest by its number or name; Refusal when there is none or more than one."""
        there = {number: account for number, account in self._accounts.items() if not account.evicted}
        named = [account for account in there.values() if account.name == guest]
        # A name may stand for a guest that is gone and the next one at the same mountpoint.
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
        """Change limits; takes back what a lower cap no longer allows."""
        account = self._accounts[guest]
        try:
            self._tell_limits(self._ledger.set_limits(account, weight, cap, floor, persistent_cap))
        except Refusal as refusal:
            self._counters.refuse(refusal.why)
            raise
        self._enforce(now, account)
        return self._decided(now)

    def freeze(self, now: float, guest: int | None) -> list[Action]:
        """Freeze the pools of a guest, or of all and of those that come; nothing more is lent to them."""
        for account in self._chosen(guest, True):
            account.frozen = True
            self._tell_limits([account])
        return self._decided(now)

    def thaw(self, now: float, guest: int | None) -> list[Action]:
        """End what freeze and drain did."""
        for account in self._chosen(guest, False):
            account.frozen = account.draining = False
            self._tell_limits([account])
        return self._decided(now)

    def _chosen(self, guest: int | None, frozen: bool) -> list[Account]:
        if guest is not None:
            return [self._accounts[guest]]
        self._frozen = frozen
        return list(self._accounts.values())

    def revoke(self, now: float, guest: int, slabs: int, kind: Kind = Kind.EPHEMERAL) -> list[Action]:
        """Take so many slabs back from a guest; persistent ones are asked for and never taken."""
        account = self._accounts[guest]
        if kind is Kind.EPHEMERAL:
            self._reclaimer.owe(now, account, slabs)
        elif account.connected and (most := min(slabs, account.map.counts[State.PERSISTENT])):
            self._counters.revokes += 1
            self._actions.append(Send(guest, Revoke(account.next_serial(), most, True)))
        return self._decided(now)

    def drain(self, now: float, guest: int) -> list[Action]:
        """Take back all ephemeral slabs of a guest, and lend it nothing until it is thawed."""
        account = self._accounts[guest]
        account.draining = True
        self._enforce(now, account)
        return self._decided(now)

    def evict(self, now: float, guest: int, lose_persistent: bool) -> list[Action]:
        """End a guest: its memory is freed with all pages in it, and it is not let in again."""
        account = self._accounts[guest]
        if account.persistent and not lose_persistent:
            held = as_bytes(account.persistent)
            raise Refusal(f"{account.name} holds {held} for its hswap, which it would lose: add --yes if it may")
        self._counters.evictions += 1
        if account.connected:
            self._actions.append(Send(guest, Evicted(EVICTED)))
            self._actions.append(HangUp(guest))
        account.evicted = True
        self._leave(account)
        self._actions.append(Close(guest))
        return self._decided(now)

    def _leave(self, account: Account) -> None:
        """Note that a guest's connection has ended."""
        if account.connected:
            account.connected = False
            account.claims = None
            self._allocator.left(account)
            self._reclaimer.left(account)

    def resize(self, now: float, size: int) -> tuple[int, list[Action]]:
        """Change how much there is to lend; gives the new size, which persistent slabs and promises may keep larger."""
        self._ledger.resize(size)
        self._tell_limits(self._accounts.values())
        self._allocator.fit(now)
        return self._ledger.size, self._decided(now)

    def rows(self, now: float, uid: int | None = None) -> list[Row]:
        """Give the table of guests, of one user or of all, by number."""
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
            activity.weight,
            account.cap,
            account.floor,
            account.persistent_cap,
            None if activity.age is None else min(activity.oldest_age(now), MAX_SECONDS),
            *((report.pages, report.used_bytes, report.puts, report.hits, report.misses) if report else (0,) * 5),
            account.revoked,
            account.taken,
        )

    def stats(self) -> LenderStats:
        """Give the sums and the counters."""
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
            reserved=ledger.firm(),
            guests=len(accounts),
            connected=sum(account.connected for account in accounts),
            map_bytes=sum(account.map.size for account in accounts),
            counters=dataclasses.asdict(self._counters),
        )

    def check(self) -> None:
        """Raise AssertionError unless sums equal totals, no slab is in two states and budgets hold."""
        self._ledger.check()
        self._reclaimer.check()
        self._allocator.check()
        assert not self._actions, "actions that nobody was given"
