"""How a guest that lost its connection comes back with what it holds.

It says all that it holds; what it does not name is punched. As long as tmemd ran all the time, the ledger knows
better: an ephemeral slab that was taken meanwhile is answered with Taken, and a claim to what was never lent is a
fault. After a restart the guest knows better than the old holdings, which say how many slabs it has and not which: what
it claims is booked, persistent slabs up to its persistent cap, ephemeral ones as many as the holdings and free memory
have room for. Ephemeral slabs that turn out to be holes, because the old tmemd had just taken them, are answered with
Taken too. Until then none of its slabs is touched: any might be a persistent one.
"""

from __future__ import annotations

from collections.abc import Callable

from tmem.lending.lender.account import Account
from tmem.lending.lender.actions import Action, FindHoles, GuestFault, Punch
from tmem.lending.lender.ledger import Ledger
from tmem.lending.lender.slabmap import SlabMap, State, clip, count
from tmem.lending.lender.stats import Counters
from tmem.lending.lender.taking import Taking
from tmem.lending.protocol.messages import Claim, Runs

_MAKING = (State.MAKING_EPHEMERAL, State.MAKING_PERSISTENT)


class Claiming:
    """Gathers claims and settles them; `act` takes the actions."""

    def __init__(self, ledger: Ledger, taking: Taking, counters: Counters, act: Callable[[Action], None]) -> None:
        self._ledger = ledger
        self._taking = taking
        self._counters = counters
        self._act = act

    def claim(self, account: Account, message: Claim) -> bool:
        """Take a part of the claims in; True once all are there and settled."""
        claims = account.claims
        if claims is None:
            raise GuestFault("it claims what it was not asked to")
        if count(claims.split(message.runs).get(State.FREE, ())) != count(message.runs):
            raise GuestFault("it claims a slab twice, or one beyond its arena")
        claims.set(message.runs, State.PERSISTENT if message.persistent else State.EPHEMERAL)
        if message.last:
            self._settle(account, claims)
            account.claims = None
        return message.last

    def _settle(self, account: Account, claimed: SlabMap) -> None:
        kept, lost = self._believe(account, claimed) if account.from_before else self._compare(account, claimed)
        named = SlabMap(account.map.total)
        for runs in (*kept.values(), lost, *(account.map.runs(state) for state in _MAKING)):
            named.set(runs, State.TAKEN)
        # The rest is nobody's: what a Lend that was not read would have given, what a late put made real.
        rest = named.runs(State.FREE)
        for state, runs in ((State.FREE, rest), *kept.items()):
            self._ledger.move(account, runs, state)
        self._act(Punch(account.number, rest))
        if lost:
            self._counters.lost_slabs += count(lost)
            self._taking.tell_taken(account, lost)
            self._act(Punch(account.number, lost))
        if account.from_before and kept[State.EPHEMERAL]:
            self._act(FindHoles(account.number, kept[State.EPHEMERAL]))
        account.from_before = False

    def _compare(self, account: Account, claimed: SlabMap) -> tuple[dict[State, Runs], Runs]:
        """Hold claims against what the ledger knows: what is kept, and what was taken meanwhile."""
        ephemeral = account.map.split(claimed.runs(State.EPHEMERAL))
        persistent = account.map.split(claimed.runs(State.PERSISTENT))
        if persistent.keys() - {State.PERSISTENT} or ephemeral.keys() - {State.EPHEMERAL, State.FREE}:
            raise GuestFault("it claims slabs that it was not lent")
        kept = {
            State.EPHEMERAL: ephemeral.get(State.EPHEMERAL, ()),
            State.PERSISTENT: persistent.get(State.PERSISTENT, ()),
        }
        return kept, ephemeral.get(State.FREE, ())

    def _believe(self, account: Account, claimed: SlabMap) -> tuple[dict[State, Runs], Runs]:
        """Take claims for the truth, within the limits: what is kept, and what there is no room for."""
        persistent = claimed.runs(State.PERSISTENT)
        if count(persistent) > max(account.persistent_cap, account.persistent):
            raise GuestFault("it claims more persistent slabs than its persistent cap")
        room = account.held + min(self._ledger.free, self._ledger.room(account, False)) - count(persistent)
        fits = clip(claimed.runs(State.EPHEMERAL), room)
        claimed.set(fits, State.FREE)
        refused = claimed.runs(State.EPHEMERAL)
        self._counters.refused_claims += count(refused)
        return {State.EPHEMERAL: fits, State.PERSISTENT: persistent}, refused

    def holes(self, now: float, account: Account, runs: Runs) -> None:
        """Tell of booked ephemeral slabs that have no memory; whatever else they are meanwhile is left alone."""
        holes = account.map.split(runs).get(State.EPHEMERAL, ())
        if not holes:
            return
        self._counters.lost_slabs += count(holes)
        if account.listens:  # else the claims that are on their way tell of them
            self._taking.tell_taken(account, holes)
        else:
            self._taking.free(account, holes)
        self._taking.gone(now, account, count(holes))
