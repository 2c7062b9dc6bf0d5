"""Takes ephemeral slabs back from guests: Revoke, wait, then take.

1. A guest's `reclaim_target` is the number of slabs that it has to give back.
2. Revoke asks for at most STEP_SLABS of them, so that the guest can find its coldest pages within REVOKE_TIMEOUT. Its
   Return brings the next Revoke.
3. On time-out, drain its socket once: the Return may have arrived while the executor was busy. Without a Return in
   it, take the whole target: punch the slabs and send Taken. The guest is then unresponsive: it is sent no Revoke
   until it sends a message.
4. Slabs of a guest without a connection, or whose claims are not complete, are taken at once. It learns of that when
   its claims are settled.
5. A taken slab is not lent to the guest again before its Confirm. So a Return that crosses the Taken cannot mean a
   later lend. What a late put populated is punched at the Confirm.

One call takes at most CHUNK_SLABS; `wake` takes the rest. A guest has at most MAX_UNCONFIRMED unconfirmed Takens.
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

REVOKE_TIMEOUT = 0.020  # seconds that a guest has to answer a Revoke
STEP_SLABS = 32  # slabs in one Revoke of ephemeral ones, and in one Taken
MAX_UNCONFIRMED = 16  # Takens to one guest; each Confirm sends the next
CHUNK_SLABS = 2048  # slabs taken by one call: a few ms, however fragmented


class Reclaimer:
    """Reclaim targets, open Revokes and taken slabs. `act` appends an action."""

    def __init__(self, ledger: Ledger, counters: Counters, act: Callable[[Action], None]) -> None:
        self._ledger = ledger
        self._counters = counters
        self._act = act
        self._open: dict[int, Account] = {}  # accounts with a revocation, by number
        self._taking: dict[int, Account] = {}  # accounts whose target is being taken in chunks

    @property
    def outstanding(self) -> int:
        """Slabs to be reclaimed, of all guests."""
        return sum(account.reclaim_target for account in (*self._open.values(), *self._taking.values()))

    def deadline(self) -> float | None:
        """Return when the next Revoke times out; -inf while a target is being taken."""
        if self._taking:
            return -inf
        waiting = [
            account.revocation.deadline
            for account in self._open.values()
            if account.revocation is not None and not account.revocation.draining_socket
        ]
        return min(waiting, default=None)

    def wake(self, now: float) -> None:
        """Take the next chunk of one target; drain the sockets of guests whose Revoke timed out."""
        if self._taking:
            _, account = self._taking.popitem()
            self._take_target(account)
        for account in self._open.values():
            revocation = account.revocation
            if revocation is not None and revocation.deadline <= now and not revocation.draining_socket:
                revocation.draining_socket = True
                self._act(DrainSocket(account.number))

    def reclaim(self, now: float, account: Account, slabs: int) -> None:
        """Raise a guest's target, to its revocable slabs at most."""
        account.reclaim_target = min(account.reclaim_target + slabs, account.revocable)
        self._send_revoke(now, account)

    def _send_revoke(self, now: float, account: Account) -> None:
        """Revoke the next step of a target unless a Revoke is open; take from a guest that would not answer."""
        if account.revocation is not None or account.number in self._taking or not account.reclaim_target:
            return
        if not account.is_attached:
            self._take_target(account)
            return
        serial = account.next_serial()
        slabs = account.reclaim_target if account.unresponsive else min(account.reclaim_target, STEP_SLABS)
        account.revocation = Revocation(serial, slabs, now + REVOKE_TIMEOUT, draining_socket=account.unresponsive)
        self._open[account.number] = account
        if account.unresponsive:
            self._act(DrainSocket(account.number))
        else:
            self._counters.revokes += 1
            self._act(Send(account.number, Revoke(serial, slabs)))

    def on_return(self, now: float, account: Account, message: Return) -> None:
        """Free returned slabs; GuestFault when the guest does not hold them."""
        state = State.held(message.kind)
        if count(message.runs) > account.map.counts[state] + account.map.counts[State.TAKEN]:
            raise GuestFault("it returned more slabs than it holds")
        found = account.map.by_state(message.runs)
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
        self.credit(now, account, given, answered)

    def credit(self, now: float, account: Account, given: int, answered: bool = False) -> None:
        """Subtract ephemeral slabs that the guest lost from its target; `answered` ends the open Revoke."""
        account.reclaim_target = min(max(0, account.reclaim_target - given), account.map.counts[State.EPHEMERAL])
        if not account.reclaim_target:
            self._taking.pop(account.number, None)
        revocation = account.revocation
        if revocation is None:
            return
        revocation.outstanding = min(revocation.outstanding - given, account.reclaim_target)
        if answered and revocation.outstanding > 0:
            # Fewer than revoked: an honest guest always has enough.
            self._take(account, min(revocation.outstanding, CHUNK_SLABS))
        if answered or revocation.outstanding <= 0:
            self._finish_revocation(now, account)

    def _finish_revocation(self, now: float, account: Account) -> None:
        """End the open Revoke and send the next one."""
        self._end_revocation(account)
        self._send_revoke(now, account)

    def _end_revocation(self, account: Account) -> None:
        account.revocation = None
        self._open.pop(account.number, None)

    def on_socket_drained(self, now: float, account: Account) -> None:
        """Take the whole target of a guest that did not answer in time."""
        revocation = account.revocation
        if revocation is None or not revocation.draining_socket:
            return
        account.unresponsive = True
        self._counters.unanswered_revokes += 1
        self._end_revocation(account)
        self._take_target(account)

    def take_all(self, account: Account) -> None:
        """Take all ephemeral slabs of a guest without a Revoke."""
        self._end_revocation(account)
        account.reclaim_target = account.revocable
        self._take_target(account)

    def _take_target(self, account: Account) -> None:
        """Take one chunk of a target now, the others at `wake`."""
        if account.reclaim_target:
            self._take(account, min(account.reclaim_target, CHUNK_SLABS))
        if account.reclaim_target:
            self._taking[account.number] = account
        else:
            self._taking.pop(account.number, None)

    def _take(self, account: Account, slabs: int) -> None:
        """Take ephemeral slabs: punch them and tell the guest."""
        runs = account.map.next_ephemeral(slabs)
        taken = count(runs)
        account.reclaim_target = max(0, account.reclaim_target - taken)
        account.taken += taken
        self._counters.taken_slabs += taken
        if account.revocation is not None:
            account.revocation.outstanding -= taken
        if account.is_attached:
            self._act(Punch(account.number, runs, self.notify_taken(account, runs)))
        else:
            self.free(account, runs)

    def notify_taken(self, account: Account, runs: Runs) -> int:
        """Send Takens to an attached guest, in steps, because it drops one slab at a time.

        Returns how many slabs stay booked until they are punched.
        """
        freed = self._ledger.release(account, runs, State.TAKEN)
        account.unsent_taken.extend(runs)
        self.send_taken(account)
        return freed

    def send_taken(self, account: Account) -> None:
        """Send Takens of unsent slabs, up to MAX_UNCONFIRMED."""
        while account.unsent_taken and len(account.unconfirmed) < MAX_UNCONFIRMED:
            runs, serial = pop_slabs(account.unsent_taken, STEP_SLABS), account.next_serial()
            account.unconfirmed[serial] = runs
            self._act(Send(account.number, Taken(runs, serial)))

    def on_confirm(self, account: Account, serial: int) -> None:
        """Free confirmed slabs; the punch removes what a late put populated."""
        runs = account.unconfirmed.pop(serial, None)
        if runs is None:
            raise GuestFault("it confirmed what it was not told")
        self.free(account, runs)
        self.send_taken(account)

    def free(self, account: Account, runs: Runs) -> int:
        """Punch slabs, which are free after that; return how many."""
        if runs:
            self._act(Punch(account.number, runs, self._ledger.release(account, runs, State.FREE)))
        return count(runs)

    def on_disconnected(self, account: Account) -> None:
        """Take the target. Taken slabs are free: the guest's claims will show which it lost."""
        self._end_revocation(account)
        account.unresponsive = False
        taken = (*(run for runs in account.unconfirmed.values() for run in runs), *account.unsent_taken)
        account.unconfirmed.clear()
        account.unsent_taken.clear()
        if taken:
            self._ledger.replace(account, State.TAKEN, State.FREE)
            self._act(Punch(account.number, taken))
        self._take_target(account)

    def on_closed(self, account: Account) -> None:
        """Drop the target of a guest that holds nothing."""
        account.reclaim_target = 0
        self._taking.pop(account.number, None)

    def check(self) -> None:
        """Raise AssertionError unless exactly the guests with a target are revoked or taken from."""
        for account in self._ledger.accounts.values():
            assert (account.revocation is None) == (account.number not in self._open)
            asked = account.revocation is not None or account.number in self._taking
            assert (account.reclaim_target > 0) == asked, "a target that nobody reclaims"
        assert self._taking.keys() <= self._ledger.accounts.keys()
