"""Who is lent what and who gives way: all of tmemd's decisions, without I/O and without a clock.

Every method that decides takes `now`, seconds of any monotonic clock, and returns actions, which are to be carried
out in order. Guests are numbers, unique while tmemd runs. All sizes are slabs.
"""

from __future__ import annotations

from tmem.arena import SLAB_SIZE
from tmem.lending.lender.account import Account
from tmem.lending.lender.actions import Action, Close, CountPopulated, GuestFault, HangUp, Holding, Refusal, Send
from tmem.lending.lender.governor import EVICTED, Governor
from tmem.lending.lender.reclaimer import PATIENCE
from tmem.lending.lender.stats import Why
from tmem.lending.protocol.messages import BATCH, Ask, Claim, Confirm, FromGuest, Hello, Report, Return, Welcome
from tmem.lending.protocol.runs import Runs

__all__ = ["BATCH", "PATIENCE", "Lender"]

EXCESS_AUDITS = 3  # audits in a row that find more than a batch in excess before a guest is barred


class Lender(Governor):
    """Joins, asks, returns, reports and ends go in, actions come out; verbs are the Governor's."""

    # Guests come and go.

    def guests_away(self) -> dict[int, Holding]:
        """Give the guests that are not connected, with what they hold (watch their processes, call `ended`)."""
        return {number: self.holding(number) for number, account in self._accounts.items() if not account.connected}

    def holdings(self) -> list[Holding]:
        """Give what every guest holds, to be kept for a restart."""
        return [self.holding(number) for number in self._accounts]

    def holding(self, guest: int) -> Holding:
        """Give what a guest holds; what is being made real counts, and what is not punched yet."""
        account = self._accounts[guest]
        return Holding(
            account.token,
            account.name,
            account.uid,
            account.pid,
            account.map.total,
            min(account.ephemeral + account.unpunched, account.map.total - account.persistent),
            account.persistent,
            account.activity.weight,
            account.cap,
            account.floor,
            account.persistent_cap if account.persistent_set else None,
            account.frozen,
            account.draining,
            account.evicted,
        )

    def join(self, now: float, hello: Hello, uid: int, pid: int) -> tuple[int, list[Action]]:
        """Register a guest and give its number; its memfd must be known to be of `hello.slabs` and sealed.

        Refusal when it may not join; `retry` is set when it may later. With `again` the number is the one it
        had when its token is known.
        """
        known = next((account for account in self._accounts.values() if account.token == hello.token), None)
        try:
            if known is None:
                account, changed = self._ledger.admit(hello, uid, pid)
                self._counters.joins += 1
                account.from_before, account.frozen = hello.again, self._frozen
            else:
                account, changed = self._known(known, hello, uid, pid), []
                self._counters.rejoins += 1
        except Refusal as refusal:
            self._counters.refuse(refusal.why)
            raise
        account.connected = True
        if hello.again:
            self._reattacher.expect(now, account)
        welcome = Welcome(account.number, self._most(account), account.persistent_cap, account.frozen)
        self._actions.append(Send(account.number, welcome))
        self._tell_limits(changed)
        return account.number, self._decided(now)

    @staticmethod
    def _known(account: Account, hello: Hello, uid: int, pid: int) -> Account:
        """Let a guest back in that the ledger knows."""
        if account.evicted:
            raise Refusal(EVICTED, Why.EVICTED, evicted=True)
        if account.uid != uid or account.map.total != hello.slabs or not hello.again:
            raise Refusal("the token is another guest's: start again with a new one", Why.TOKEN)
        if account.connected or account.ended:
            raise Refusal("the guest's old connection has not ended: try again", Why.CONNECTED, retry=True)
        account.name, account.pid = hello.name, pid
        return account

    def received(self, now: float, guest: int, message: FromGuest) -> list[Action]:
        """Take a message of a connected guest; GuestFault when no honest guest sends it."""
        account = self._accounts[guest]
        if not account.connected:
            raise ValueError(f"guest {guest} is not connected")
        account.silent = False
        try:
            self._take_in(now, account, message)
        except GuestFault:
            self._counters.faults += 1
            raise
        return self._decided(now)

    def _take_in(self, now: float, account: Account, message: FromGuest) -> None:
        if isinstance(message, Report):
            account.activity.take_in(now, message)
        elif isinstance(message, Claim):
            if self._reattacher.claim(now, account, message):
                self._enforce(now, account)
        elif account.claims is not None:
            raise GuestFault("it did not finish its claims")
        elif isinstance(message, Ask):
            self._allocator.ask(now, account, message)
        elif isinstance(message, Return):
            if message.age is not None:
                account.activity.tell(now, message.age)
            self._reclaimer.returned(now, account, message)
        elif isinstance(message, Confirm):
            self._reclaimer.confirmed(account, message.serial)
        else:
            raise GuestFault("it said hello twice")

    def disconnected(self, now: float, guest: int) -> list[Action]:
        """Note that the connection ended, after all that it held was read; the guest keeps what it holds."""
        self._leave(self._accounts[guest])
        return self._decided(now)

    def ended(self, now: float, guest: int) -> list[Action]:
        """Note that the guest's process is gone (its connection too); gives Close."""
        account = self._accounts[guest]
        account.ended = True
        self._leave(account)
        self._actions.append(Close(guest))
        return self._decided(now)

    def closed(self, now: float, guest: int) -> list[Action]:
        """Note that the memfd is closed: the guest's slabs are free, and its number is forgotten with its process."""
        account = self._accounts.get(guest)
        if account is not None:
            self._allocator.closed(account)
            self._reclaimer.closed(account)
            self._reattacher.closed(account)
            self._sweeper.closed(account)
            if account.ended:
                self._counters.ends += 1
            self._tell_limits(self._ledger.close(account) if account.ended else self._ledger.clear(account))
        return self._decided(now)

    # What the executor found out.

    def made(self, now: float, guest: int, batch: int, runs: Runs) -> list[Action]:
        """Note which slabs of a Populate are real; the others are punched. Lends them, or denies if there are none.

        May be called for a guest that disconnected or ended since.
        """
        account = self._accounts.get(guest)
        if account is not None:
            self._allocator.made(now, batch, account, runs)
            self._enforce(now, account)  # a limit may have been lowered meanwhile
        return self._decided(now)

    def holes(self, now: float, guest: int, runs: Runs) -> list[Action]:
        """Note which claimed slabs turned out to be holes; ephemeral ones are answered as taken."""
        account = self._accounts.get(guest)
        if account is not None:
            self._reattacher.holes(now, account, runs)
        return self._decided(now)

    def dry(self, now: float, guest: int) -> list[Action]:
        """Note that the guest's socket was read dry, after DrainSocket: what it still owes is taken."""
        account = self._accounts.get(guest)
        if account is not None:
            self._reclaimer.dry(now, account)
            if self._reattacher.dry(now, account):
                self._counters.faults += 1
                self._actions.append(HangUp(guest))
                self._leave(account)
        return self._decided(now)

    def punched(self, now: float, guest: int, freed: int) -> list[Action]:
        """Note that a Punch is done: its slabs are free."""
        account = self._accounts.get(guest)
        if account is not None:
            self._ledger.unpunched.add(account, -freed)
        return self._decided(now)

    def hangs(self, now: float, guest: int, does: bool) -> list[Action]:
        """Note that a call on a guest's arena does not return, or that it did; meanwhile nobody waits for its slabs."""
        account = self._accounts.get(guest)
        if account is not None:
            self._counters.hangs += does
            self._ledger.unpunched.set_hanging(account, does)
            self._allocator.fit(now)
        return self._decided(now)

    def looked(self, now: float, pinned_bytes: int) -> list[Action]:
        """Take in how much memory was punched and lives on: it stays booked, as far as it is known whose it is."""
        self._ledger.unpunched.look(pinned_bytes // SLAB_SIZE, self._accounts.values())
        self._allocator.fit(now)
        return self._decided(now)

    def audit(self) -> list[Action]:
        """Have what is real of each guest's arena counted."""
        accounts = self._accounts.values()
        return [CountPopulated(one.number, one.held) for one in accounts if not (one.hangs or one.ended or one.evicted)]

    def audited(self, now: float, guest: int, held: int, populated_bytes: int) -> list[Action]:
        """Compare what is real in a guest's memfd (st_blocks * 512) with what it held, both as of a CountPopulated.

        An excess is punched and counted; one that stays above a batch ends the lending to the guest.
        """
        account = self._accounts.get(guest)
        if account is None:
            return []
        self._counters.audits += 1
        if account.from_before:  # which slabs it holds is not known yet
            self._reattacher.book(account, populated_bytes)
            return self._decided(now)
        excess = populated_bytes - held * SLAB_SIZE
        if excess > 0:
            self._counters.excess_audits += 1
            self._counters.excess_bytes += excess
            if self._sweeper.sweeps(account):  # what is left of the last one says nothing
                return self._decided(now)
            self._sweeper.start(now, account)
        account.excess_audits = account.excess_audits + 1 if excess > BATCH * SLAB_SIZE else 0
        if account.excess_audits >= EXCESS_AUDITS and not account.barred:
            account.barred = True
            self._counters.barred_guests += 1
            self._reclaimer.seize_all(account)
        return self._decided(now)

    def deadline(self) -> float | None:
        """Give the time at which `wake` is to be called; None when nothing is waited for."""
        deadlines = (self._reclaimer.deadline(), self._reattacher.deadline(), self._sweeper.deadline())
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def wake(self, now: float) -> list[Action]:
        """Act on what is due."""
        self._reclaimer.wake(now)
        self._reattacher.wake(now)
        self._sweeper.wake(now)
        return self._decided(now)
