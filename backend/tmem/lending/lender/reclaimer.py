"""How ephemeral slabs come back: asked for, waited for a little, taken.

A guest that is to give memory up has a debt. It is asked for a step of it at a time, so that it can find its coldest
pages within PATIENCE; the answer brings the next step. Where no answer comes, its socket is read dry first (it may
have answered and the executor been late), then what is outstanding is taken: punched, and told as Taken. A guest
that was silent once is not waited for again until it speaks. A guest without a connection is taken from at once, and so
is one whose claims are not complete: it hears of that once they are.

A slab that was taken is not lent again until the guest confirmed that it knows. So a Return on its way cannot be
mistaken for the return of a later lend, and what a late put made real again is punched when the guest confirms.

Nothing here takes long, however much is to come back: more than CHUNK slabs are taken piece by piece, one at each
`wake`, and a guest hears of its losses at the pace at which it confirms them.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf

from tmem.lending.lender.account import Account, Revocation
from tmem.lending.lender.actions import Action, DrainSocket, GuestFault, Punch, Send
from tmem.lending.lender.ledger import Ledger
from tmem.lending.lender.slabmap import State
from tmem.lending.lender.stats import Counters
from tmem.lending.protocol.kind import Kind
from tmem.lending.protocol.messages import Return, Revoke, Taken
from tmem.lending.protocol.runs import Runs, count, pop_slabs

PATIENCE = 0.020  # seconds that a guest has to answer a Revoke
STEP = 32  # slabs in one Revoke of ephemeral ones, and in one Taken
WINDOW = 16  # Takens that a guest has not confirmed; it is told more as it confirms
CHUNK = 2048  # slabs that are taken in one stretch: a few ms, however scattered they are


class Reclaimer:
    """Debts, revocations and what is taken; `act` takes the actions."""

    def __init__(self, ledger: Ledger, counters: Counters, act: Callable[[Action], None]) -> None:
        self._ledger = ledger
        self._counters = counters
        self._act = act
        self._open: dict[int, Account] = {}  # accounts with a revocation, by number
        self._seized: dict[int, Account] = {}  # accounts whose debt is taken piece by piece

    @property
    def debts(self) -> int:
        """Slabs that are to come back."""
        return sum(account.debt for account in (*self._open.values(), *self._seized.values()))

    def deadline(self) -> float | None:
        """Give when the next guest's time is over: at once while something is left to be taken."""
        if self._seized:
            return -inf
        waiting = [
            account.revocation.deadline
            for account in self._open.values()
            if account.revocation is not None and not account.revocation.draining_socket
        ]
        return min(waiting, default=None)

    def wake(self, now: float) -> None:
        """Read those dry whose time is over, and take the next piece of what is left to be taken."""
        if self._seized:
            _, account = self._seized.popitem()
            self._seize(account)
        for account in self._open.values():
            revocation = account.revocation
            if revocation is not None and revocation.deadline <= now and not revocation.draining_socket:
                revocation.draining_socket = True
                self._act(DrainSocket(account.number))

    def owe(self, now: float, account: Account, slabs: int) -> None:
        """Add to what a guest is to give back, at most what it holds and can be got at."""
        account.debt = min(account.debt + slabs, account.gettable)
        self._go_on(now, account)

    def _go_on(self, now: float, account: Account) -> None:
        """Ask for the next step of a debt, unless one is open; nobody is asked who does not answer."""
        if account.revocation is not None or account.number in self._seized or not account.debt:
            return
        if not account.listens:
            self._seize(account)
            return
        serial, slabs = account.next_serial(), account.debt if account.silent else min(account.debt, STEP)
        account.revocation = Revocation(serial, slabs, now + PATIENCE, draining_socket=account.silent)
        self._open[account.number] = account
        if account.silent:
            self._act(DrainSocket(account.number))
        else:
            self._counters.revokes += 1
            self._act(Send(account.number, Revoke(serial, slabs)))

    def returned(self, now: float, account: Account, message: Return) -> None:
        """Take slabs back that a guest gives; GuestFault when they are not its."""
        state = State.held(message.kind)
        if count(message.runs) > account.map.counts[state] + account.map.counts[State.TAKEN]:
            raise GuestFault("it returned more slabs than it holds")
        found = account.map.split(message.runs)
        late = count(found.get(State.TAKEN, ()))
        if count(found.get(state, ())) + late != count(message.runs):
            raise GuestFault("it returned slabs that it does not hold")
        self._counters.late_returned_slabs += late
        given = self.free(account, found.get(state, ()))
        self._counters.returned_slabs += given
        if message.answer:
            account.revoked += given
            self._counters.revoked_slabs += given
        if message.kind is Kind.PERSISTENT:
            return
        revocation = account.revocation
        answered = revocation is not None and message.answer == revocation.serial and message.last
        self.gone(now, account, given, answered)

    def gone(self, now: float, account: Account, given: int, answered: bool = False) -> None:
        """Reckon ephemeral slabs that are the guest's no more against its debt; `answered` ends the open Revoke."""
        account.debt = min(max(0, account.debt - given), account.map.counts[State.EPHEMERAL])
        if not account.debt:
            self._seized.pop(account.number, None)
        revocation = account.revocation
        if revocation is None:
            return
        revocation.outstanding = min(revocation.outstanding - given, account.debt)
        if answered and revocation.outstanding > 0:
            # Fewer than it was asked for: an honest guest never needs to.
            self._take(account, min(revocation.outstanding, CHUNK))
        if answered or revocation.outstanding <= 0:
            self._settled(now, account)

    def _settled(self, now: float, account: Account) -> None:
        """End the open Revoke, and go on with what is still owed."""
        self._end_revocation(account)
        self._go_on(now, account)

    def _end_revocation(self, account: Account) -> None:
        account.revocation = None
        self._open.pop(account.number, None)

    def dry(self, now: float, account: Account) -> None:
        """Take what a guest owes whose Revoke is overdue: all of its debt, as nobody answers."""
        revocation = account.revocation
        if revocation is None or not revocation.draining_socket:
            return
        account.silent = True
        self._counters.unanswered_revokes += 1
        self._end_revocation(account)
        self._seize(account)

    def seize_all(self, account: Account) -> None:
        """Take all ephemeral slabs of a guest that is not asked any more."""
        self._end_revocation(account)
        account.debt = account.gettable
        self._seize(account)

    def _seize(self, account: Account) -> None:
        """Take the debt of a guest that is not asked, a piece of it now and the next at `wake`."""
        if account.debt:
            self._take(account, min(account.debt, CHUNK))
        if account.debt:
            self._seized[account.number] = account
        else:
            self._seized.pop(account.number, None)

    def _take(self, account: Account, slabs: int) -> None:
        """Take ephemeral slabs, whatever the guest says."""
        runs = account.map.next_ephemeral(slabs)
        taken = count(runs)
        account.debt = max(0, account.debt - taken)
        account.taken += taken
        self._counters.taken_slabs += taken
        if account.revocation is not None:
            account.revocation.outstanding -= taken
        if account.listens:
            self._act(Punch(account.number, runs, self.tell_taken(account, runs)))
        else:
            self.free(account, runs)

    def tell_taken(self, account: Account, runs: Runs) -> int:
        """Tell a connected guest which slabs are not its any more, in steps, for the guest loses one at a time.

        Gives how many stay booked until they are punched.
        """
        freed = self._ledger.release(account, runs, State.TAKEN)
        account.untold.extend(runs)
        self.tell_more(account)
        return freed

    def tell_more(self, account: Account) -> None:
        """Send Takens of what the guest has not been told, as many as it may leave unconfirmed."""
        while account.untold and len(account.unconfirmed) < WINDOW:
            runs, serial = pop_slabs(account.untold, STEP), account.next_serial()
            account.unconfirmed[serial] = runs
            self._act(Send(account.number, Taken(runs, serial)))

    def confirmed(self, account: Account, serial: int) -> None:
        """Make slabs lendable to the guest again, without what a late put may have left there."""
        runs = account.unconfirmed.pop(serial, None)
        if runs is None:
            raise GuestFault("it confirmed what it was not told")
        self.free(account, runs)
        self.tell_more(account)

    def free(self, account: Account, runs: Runs) -> int:
        """Make slabs free, once they are punched; gives how many."""
        if runs:
            self._act(Punch(account.number, runs, self._ledger.release(account, runs, State.FREE)))
        return count(runs)

    def left(self, account: Account) -> None:
        """Note that the connection ended: what is owed is taken, and what was taken is known by the claims."""
        self._end_revocation(account)
        account.silent = False
        taken = (*(run for runs in account.unconfirmed.values() for run in runs), *account.untold)
        account.unconfirmed.clear()
        account.untold.clear()
        if taken:
            self._ledger.replace(account, State.TAKEN, State.FREE)
            self._act(Punch(account.number, taken))
        self._seize(account)

    def closed(self, account: Account) -> None:
        """Forget the debt of a guest that has nothing any more."""
        account.debt = 0
        self._seized.pop(account.number, None)

    def check(self) -> None:
        """Raise AssertionError unless exactly the guests that owe are waited for."""
        for account in self._ledger.accounts.values():
            assert (account.revocation is None) == (account.number not in self._open)
            asked = account.revocation is not None or account.number in self._seized
            assert (account.debt > 0) == asked, "a debt that nobody asks for"
        assert self._seized.keys() <= self._ledger.accounts.keys()
