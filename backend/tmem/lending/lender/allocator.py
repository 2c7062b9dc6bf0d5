"""Answers each Ask: first from free slabs, then from slabs that are reclaimed for it.

Asks are served in order of arrival. Missing slabs are reclaimed from the guests whose slabs have the lowest value, as
long as that is below the asker's bid. Values are ignored for a guest below its floor, for a persistent Ask, and when
the size was made smaller: then the lowest value goes in any case. An Ask ends when it is complete or when no more slabs
will come back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

from tmem.lending.lender.account import Account
from tmem.lending.lender.actions import Action, GuestFault, Populate, Send
from tmem.lending.lender.fairness import Candidates, UserShares
from tmem.lending.lender.ledger import Ledger
from tmem.lending.lender.reclaimer import Reclaimer
from tmem.lending.lender.reclaimpolicy import ReclaimPolicy, choose
from tmem.lending.lender.slabmap import State
from tmem.lending.lender.stats import Counters, Denial
from tmem.lending.protocol.kind import Kind
from tmem.lending.protocol.messages import BATCH_SLABS, Ask, Deny, Lend
from tmem.lending.protocol.runs import Runs, count, split_for_messages


@dataclass(slots=True, eq=False)
class OpenAsk:
    """An Ask that is not complete."""

    account: Account
    serial: int
    kind: Kind
    missing: int
    denial: Denial | None = None  # why it gets no more than what is being populated
    batches: int = 0  # being populated


@dataclass(slots=True, eq=False)
class Batch:
    """Slabs that are being populated for an Ask."""

    account: Account
    ask: OpenAsk
    runs: Runs


class Allocator:
    """The open Asks, and the batches that are being populated. `act` appends an action."""

    def __init__(
        self,
        ledger: Ledger,
        reclaimer: Reclaimer,
        policy: ReclaimPolicy,
        counters: Counters,
        act: Callable[[Action], None],
    ) -> None:
        self._ledger = ledger
        self._reclaimer = reclaimer
        self.policy = policy
        self._counters = counters
        self._act = act
        self._open: dict[tuple[int, Kind], OpenAsk] = {}
        self._batches: dict[int, Batch] = {}
        self._batch = 0

    def ask(self, now: float, account: Account, message: Ask) -> None:
        """Open an Ask and serve it; GuestFault when one of its kind is open."""
        key = (account.number, message.kind)
        if key in self._open:
            raise GuestFault("it asked again before it was answered")
        self._counters.asks += 1
        if message.kind is Kind.EPHEMERAL:
            account.activity.ask(now, message.age)
        ask = self._open[key] = OpenAsk(account, message.serial, message.kind, message.slabs)
        self._populate_free(now, ask)
        if ask.missing:
            self._reclaim_missing(now, ask)

    def serve(self, now: float) -> None:
        """Serve open Asks from free slabs; end those for which no more slabs will come back."""
        nothing_comes = not self._incoming
        for ask in [*self._open.values()]:
            self._populate_free(now, ask)
            if ask.missing and nothing_comes:
                self._end(ask, ask.denial or Denial.YOUNGER)

    @property
    def _incoming(self) -> int:
        """Slabs that will come back."""
        return self._reclaimer.outstanding + self._ledger.unpunched.incoming

    def _room(self, ask: OpenAsk) -> int:
        """Return how many slabs the limits allow for an Ask; record which limit denies the rest."""
        account, ledger = ask.account, self._ledger
        denial = self._denial(account)
        if denial is not None:
            ask.denial = denial
            return 0
        room = ledger.room(account, ask.kind)
        if room < ask.missing:
            ask.denial = Denial.UID_CAP
            if account.settings.cap - account.held <= room:
                ask.denial = Denial.CAP
            elif ask.kind is Kind.PERSISTENT and account.persistent_cap - account.persistent <= room:
                ask.denial = Denial.PERSISTENT_CAP
        return room

    @staticmethod
    def _denial(account: Account) -> Denial | None:
        if account.barred:
            return Denial.BARRED
        if account.hanging:
            return Denial.HANGS
        if account.settings.draining:
            return Denial.DRAINING
        return Denial.FROZEN if account.settings.frozen or account.claims is not None else None

    def _populate_free(self, now: float, ask: OpenAsk) -> None:
        """Populate free slabs for an Ask within the limits; end it when they allow no more."""
        room = self._room(ask)
        slabs = min(ask.missing, room, self._ledger.free)
        account = ask.account
        while slabs > 0:
            runs = account.map.lowest_free(min(slabs, BATCH_SLABS))
            if not runs:
                break
            self._ledger.move(account, runs, State.populating(ask.kind))
            self._batch += 1
            self._batches[self._batch] = Batch(account, ask, runs)
            ask.batches += 1
            ask.missing -= count(runs)
            slabs -= count(runs)
            if ask.kind is Kind.EPHEMERAL:
                account.activity.lent = now
            self._act(Populate(account.number, self._batch, runs, ask.kind))
        if ask.missing and self._room(ask) <= 0:
            self._end(ask, ask.denial or Denial.CAP)

    def _end(self, ask: OpenAsk, denial: Denial) -> None:
        """Drop what is missing; deny now, or answer with the last batch."""
        ask.missing = 0
        ask.denial = denial
        if not ask.batches:
            del self._open[ask.account.number, ask.kind]
            self._counters.deny(denial)
            self._act(Send(ask.account.number, Deny(ask.serial, denial.value)))

    def _reclaim_missing(self, now: float, ask: OpenAsk) -> None:
        """Reclaim what is missing for an Ask."""
        account, others = ask.account, sum(other.missing for other in self._open.values() if other is not ask)
        incoming = self._incoming - max(0, self._ledger.booked - self._ledger.size) - others
        want = min(ask.missing, self._room(ask)) - max(0, incoming)
        if ask.kind is Kind.PERSISTENT:
            unconditional, spared = want, None
        else:
            unconditional, spared = min(want, max(0, account.settings.floor - account.ephemeral)), account
        self._reclaim(now, unconditional, None, spared)
        self._reclaim(now, want - unconditional, account, account)
        self.serve(now)

    def _reclaim(self, now: float, slabs: int, asker: Account | None, but: Account | None) -> None:
        """Reclaim slabs whose value is below the asker's bid; without an asker, those of the lowest value."""
        if slabs <= 0:
            return
        accounts = self._ledger.accounts.values()
        self.policy.survey((account.activity for account in accounts), now)
        victims = [account for account in accounts if account is not but and account.reclaimable]
        victims.sort(key=lambda account: self.policy.value(account.activity, now))
        shares = UserShares(self._ledger, now)
        if asker is None:
            slabs -= self._reclaim_from(now, shares, shares.by_value(victims, None), slabs, _ANY_VALUE)
            self._reclaim_from(now, shares, shares.unlimited(victims), slabs, _ANY_VALUE)
        else:
            deficit = min(slabs, shares.deficit(asker.uid))
            slabs -= self._reclaim_from(now, shares, shares.above_share(victims, asker.uid), deficit, _ANY_VALUE)
            bid = self.policy.bid(asker.activity, now)
            self._reclaim_from(now, shares, shares.by_value(victims, asker.uid), slabs, bid)

    def _reclaim_from(
        self, now: float, shares: UserShares, candidates: Candidates, slabs: int, bid: tuple[float, float]
    ) -> int:
        """Reclaim up to `slabs` slabs with a value below the bid; return how many."""
        given = choose(self.policy, [(account.activity, most) for account, most in candidates], slabs, bid, now)
        for (account, _), slabs_given in zip(candidates, given, strict=True):
            if slabs_given:
                shares.debit(account.uid, slabs_given)
                self._reclaimer.reclaim(now, account, slabs_given)
        return sum(given)

    def reclaim_excess(self, now: float) -> None:
        """Reclaim what is booked beyond the size."""
        self._reclaim(now, self._ledger.booked - self._ledger.size - self._incoming, None, None)

    def on_populated(self, now: float, batch_number: int, account: Account, populated: Runs) -> None:
        """Lend the populated slabs of a batch and free the rest; a shortage of memory ends the Ask."""
        batch = self._batches.pop(batch_number, None)
        if batch is None and account.settings.evicted:
            return
        if batch is None or batch.account is not account:
            raise ValueError(f"no batch {batch_number} of guest {account.number}")
        ask = batch.ask
        ask.batches -= 1
        still_open = self._open.get((account.number, ask.kind)) is ask
        populating = State.populating(ask.kind)
        if not account.map.holds(populated, populating):
            raise ValueError(f"not of batch {batch_number}: {populated}")
        if not still_open or ask.denial in _CANCELS_POPULATING:
            self._reclaimer.free(account, batch.runs)
            populated = ()
        else:
            self._ledger.move(account, populated, State.held(ask.kind))
            missing = account.map.by_state(batch.runs).get(populating, ())
            self._counters.unreal_slabs += self._reclaimer.free(account, missing)
            if missing:
                ask.missing, ask.denial = 0, Denial.MEMORY
        if still_open:
            self._lend(ask, populated)

    def _lend(self, ask: OpenAsk, runs: Runs) -> None:
        """Send populated slabs; Lend(done) or Deny is the last answer to an Ask."""
        number, over = ask.account.number, not ask.batches and not ask.missing
        for part, last in split_for_messages(runs):
            if part:
                self._counters.lends += 1
                self._counters.lent_slabs += count(part)
                self._act(Send(number, Lend(part, ask.serial, ask.kind.persistent, over and last)))
        if over:
            del self._open[number, ask.kind]
            if not runs:
                denial = ask.denial or Denial.MEMORY
                self._counters.deny(denial)
                self._act(Send(number, Deny(ask.serial, denial.value)))

    def on_disconnected(self, account: Account) -> None:
        """Drop the guest's Asks. Its batches are freed once they are populated."""
        for kind in Kind:
            self._open.pop((account.number, kind), None)

    def on_closed(self, account: Account) -> None:
        """Drop the batches of a guest whose memfd is closed."""
        self._batches = {number: batch for number, batch in self._batches.items() if batch.account is not account}

    def check(self) -> None:
        """Raise AssertionError unless batches = slabs being populated, and every open Ask waits for something."""
        populating = self._ledger.totals[State.POPULATING_EPHEMERAL] + self._ledger.totals[State.POPULATING_PERSISTENT]
        assert sum(count(batch.runs) for batch in self._batches.values()) == populating
        for (number, kind), ask in self._open.items():
            assert ask.account is self._ledger.accounts[number]
            assert ask.account.connected
            assert ask.kind is kind
            assert ask.batches == sum(batch.ask is ask for batch in self._batches.values())
            assert ask.batches or (ask.missing and self._incoming), "an Ask that waits for nothing"


_ANY_VALUE = (inf, inf)  # a bid above any value
_CANCELS_POPULATING = (Denial.FROZEN, Denial.DRAINING, Denial.BARRED)
