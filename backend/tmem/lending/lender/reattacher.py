"""Settles what a guest claims to hold after it lost its connection.

* If tmemd ran all the time, the ledger decides. An ephemeral slab that was taken meanwhile is answered with Taken. A
  claim to a slab that was never lent is a fault.
* If tmemd was restarted, the guest decides, because the holdings file has numbers of slabs only. Its persistent slabs
  are booked up to its persistent cap, its ephemeral slabs up to its holdings and free memory. Ephemeral slabs that
  are holes, because the old tmemd had just taken them, are answered with Taken, too.

Slabs that are not claimed are punched, but none before the claims are complete: any may be persistent. Meanwhile,
audits book what is populated, as far as there is room. After CLAIM_SECONDS, the claims of a guest without holdings
are settled as they are; a guest with holdings is disconnected and stays booked.
"""

from __future__ import annotations

from collections.abc import Callable

from tmem.arena import SLAB_SIZE
from tmem.lending.lender.account import Account
from tmem.lending.lender.actions import Action, DrainSocket, FindHoles, GuestFault, Punch
from tmem.lending.lender.ledger import Ledger
from tmem.lending.lender.reclaimer import Reclaimer
from tmem.lending.lender.slabmap import SlabMap, State
from tmem.lending.lender.stats import Counters
from tmem.lending.protocol.kind import Kind
from tmem.lending.protocol.messages import Claim
from tmem.lending.protocol.runs import Runs, count, end

CLAIM_SECONDS = 30.0  # an honest guest's claims come with its Hello

_NOT_LENT = "it claims slabs that it was not lent"

_INVALID = 7  # not a State: the claim is false
# The new state of a slab, by its state in the ledger and its claimed state, for SlabMap.combined. A slab that is not
# claimed is free, unless it is being populated: the guest does not know of it yet.
_OUTCOMES = {
    State.FREE: {State.FREE: State.FREE, State.EPHEMERAL: State.TAKEN},
    State.EPHEMERAL: {State.FREE: State.FREE, State.EPHEMERAL: State.EPHEMERAL},
    State.PERSISTENT: {State.FREE: State.FREE, State.PERSISTENT: State.PERSISTENT},
    State.POPULATING_EPHEMERAL: {State.FREE: State.POPULATING_EPHEMERAL},
    State.POPULATING_PERSISTENT: {State.FREE: State.POPULATING_PERSISTENT},
}
_TABLE = bytearray([_INVALID]) * 256
for _known, _outcomes in _OUTCOMES.items():
    for _claimed, _outcome in _outcomes.items():
        _TABLE[_known + 8 * _claimed] = _outcome
_OUTCOME_TABLE = bytes(_TABLE)


class Reattacher:
    """Collects claims and settles them. `act` appends an action."""

    def __init__(self, ledger: Ledger, reclaimer: Reclaimer, counters: Counters, act: Callable[[Action], None]) -> None:
        self._ledger = ledger
        self._reclaimer = reclaimer
        self._counters = counters
        self._act = act
        self._deadlines: dict[int, float] = {}  # of guests that are claiming, by number
        self._overdue: set[int] = set()

    def start(self, now: float, account: Account) -> None:
        """Wait for a guest's claims. An unknown guest that reconnects gets no new deadline."""
        account.claims = SlabMap(account.map.total)
        if account.known_at_start or not account.slabs_unknown:
            self._deadlines[account.number] = now + CLAIM_SECONDS
        else:
            self._deadlines.setdefault(account.number, now + CLAIM_SECONDS)

    def deadline(self) -> float | None:
        """Return when the next guest's time for claims ends."""
        return min(self._deadlines.values(), default=None)

    def wake(self, now: float) -> None:
        """Drain the sockets of guests whose time for claims is over."""
        for number in [number for number, deadline in self._deadlines.items() if deadline <= now]:
            del self._deadlines[number]
            self._overdue.add(number)
            self._act(DrainSocket(number))

    def on_socket_drained(self, now: float, account: Account) -> bool:
        """Settle the claims of an unknown guest as they are; return True when a known one is to be disconnected."""
        if account.number not in self._overdue:
            return False
        self._overdue.discard(account.number)
        if not account.slabs_unknown or account.known_at_start:
            return account.claims is not None
        nothing = SlabMap(account.map.total)
        try:
            self._settle(now, account, account.claims or nothing)
        except GuestFault:
            self._settle(now, account, nothing)
        account.claims = None
        return False

    def on_closed(self, account: Account) -> None:
        """Drop the deadline of a guest whose memfd is closed."""
        self._deadlines.pop(account.number, None)
        self._overdue.discard(account.number)

    def book_populated(self, account: Account, populated_bytes: int) -> None:
        """Book any free slabs for what an unknown guest has populated, as far as there is room."""
        excess = -(-populated_bytes // SLAB_SIZE) - account.held
        slabs = min(excess, self._ledger.free, self._ledger.room(account, Kind.EPHEMERAL))
        if slabs > 0:
            self._ledger.move(account, account.map.lowest_free(slabs), State.EPHEMERAL)

    def on_claim(self, now: float, account: Account, message: Claim) -> bool:
        """Add a message of claims; return True once they are complete and settled."""
        claims, slabs = account.claims, count(message.runs)
        if claims is None:
            raise GuestFault("it claims what it was not asked to")
        if count(claims.by_state(message.runs).get(State.FREE, ())) != slabs:
            raise GuestFault("it claims a slab twice, or one beyond its arena")
        if not account.slabs_unknown and end(message.runs) > account.map.size:
            raise GuestFault(_NOT_LENT)
        if account.slabs_unknown:
            self._check_bounds(account, message.kind, slabs + claims.counts[State.held(message.kind)])
        claims.set(message.runs, State.held(message.kind))
        if message.last:
            self._settle(now, account, claims)
            account.claims = None
        return message.last

    def _check_bounds(self, account: Account, kind: Kind, slabs: int) -> None:
        """Raise GuestFault for more claims than the guest can have been lent, whatever else is lent.

        Slabs beyond its booking were taken before it heard of it; these are at most the size.
        """
        if kind is Kind.PERSISTENT and slabs > max(account.persistent_cap, account.persistent):
            raise GuestFault("it claims more persistent slabs than its persistent cap")
        if slabs > account.held + self._ledger.size:
            raise GuestFault("it claims more slabs than it can have been lent")

    def _settle(self, now: float, account: Account, claimed: SlabMap) -> None:
        settle = self._accept_claims if account.slabs_unknown else self._compare_claims
        states = settle(account, claimed)
        before = account.held
        self._ledger.load(account, states)
        freed = max(0, before - account.held)
        self._ledger.unpunched.add(account, freed)
        lost = account.map.runs(State.TAKEN)
        if lost:
            self._counters.lost_slabs += count(lost)
            account.unsent_taken.extend(lost)
            self._reclaimer.send_taken(account)
            self._act(Punch(account.number, lost))
        # Free slabs may be populated: by a Lend that the guest did not read, or by a late put.
        self._act(Punch(account.number, account.map.runs(State.FREE), freed))
        if account.slabs_unknown and account.map.counts[State.EPHEMERAL]:
            self._act(FindHoles(account.number, account.map.runs(State.EPHEMERAL)))
        account.slabs_unknown = False
        self._deadlines.pop(account.number, None)
        self._reclaimer.credit(now, account, 0)

    def _compare_claims(self, account: Account, claimed: SlabMap) -> bytearray:
        """Compare claims with the ledger; slabs taken meanwhile become TAKEN."""
        states = account.map.combined(claimed, _OUTCOME_TABLE)
        if _INVALID in states:
            raise GuestFault(_NOT_LENT)
        return states

    def _accept_claims(self, account: Account, claimed: SlabMap) -> bytearray:
        """Accept claims within the limits; the guest loses slabs for which there is no room."""
        persistent = claimed.counts[State.PERSISTENT]
        self._check_bounds(account, Kind.PERSISTENT, persistent)
        room = account.held + min(self._ledger.free, self._ledger.room(account, Kind.EPHEMERAL)) - persistent
        kept = max(0, min(room, claimed.counts[State.EPHEMERAL]))
        self._counters.refused_claim_slabs += claimed.counts[State.EPHEMERAL] - kept
        return claimed.with_the_first(kept, State.EPHEMERAL, State.TAKEN)

    def on_holes_found(self, now: float, account: Account, runs: Runs) -> None:
        """Take booked ephemeral slabs that are holes; slabs in another state by now are ignored."""
        holes = account.map.by_state(runs).get(State.EPHEMERAL, ())
        if not holes:
            return
        self._counters.lost_slabs += count(holes)
        if account.is_attached:  # else its claims will show them
            self._act(Punch(account.number, holes, self._reclaimer.notify_taken(account, holes)))
        else:
            self._reclaimer.free(account, holes)
        self._reclaimer.credit(now, account, count(holes))
