"""How much a user may have tmemd do, whatever the number of its connections.

A frame costs tmemd some 30 us. A connection may send 2,000 a second, and a user has many connections: 200 that sent all
that they may kept others waiting for 20 seconds. So all of a user's share one budget, and the users whom tmemd does
not trust share another. Who has used it up is not cut off: what it sends waits in its sockets. Root and the user that
runs tmemd have no budget, so their verbs wait for little more than one turn of the others.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

FRAMES_A_SECOND = 2000.0
FRAMES_AT_ONCE = 4000.0
ALL_FRAMES_A_SECOND = 8000.0
ALL_FRAMES_AT_ONCE = 8000.0
CONNECT_FRAMES = 20  # what a new connection counts as


class Budget:
    """Frames that may be taken in: so many at once, and so many more a second. `now` is seconds of one clock."""

    def __init__(self, a_second: float, at_once: float, now: float) -> None:
        self._a_second, self._at_once = a_second, at_once
        self._left, self._since = at_once, now

    def _refill(self, now: float) -> None:
        self._left = min(self._at_once, self._left + (now - self._since) * self._a_second)
        self._since = now

    def spend(self, now: float, frames: int) -> None:
        """Count frames that were taken in, also more than there are left."""
        self._refill(now)
        self._left -= frames

    def delay(self, now: float) -> float:
        """Give the seconds until more may be taken in, 0 for at once."""
        self._refill(now)
        return max(0.0, -self._left / self._a_second)

    def is_full(self, now: float) -> bool:
        """Tell whether nothing was spent lately."""
        self._refill(now)
        return self._left >= self._at_once


class Budgets:
    """The budgets of all users that are connected, or were a moment ago."""

    def __init__(self, trusted: frozenset[int], now: float) -> None:
        self._trusted = trusted
        self._all = Budget(ALL_FRAMES_A_SECOND, ALL_FRAMES_AT_ONCE, now)
        self._of_user: dict[int, Budget] = {}

    def of(self, uid: int, connected: Container[int], now: float) -> Sequence[Budget]:
        """Give the budgets that a new connection of a user spends of, with what connecting costs spent.

        `connected` are the users that have others. Hanging up makes no budget full again.
        """
        if uid in self._trusted:
            return ()
        if uid not in self._of_user:
            kept = (user for user, budget in self._of_user.items() if user in connected or not budget.is_full(now))
            self._of_user = {user: self._of_user[user] for user in kept}
        budgets = (self._of_user.setdefault(uid, Budget(FRAMES_A_SECOND, FRAMES_AT_ONCE, now)), self._all)
        for budget in budgets:
            budget.spend(now, CONNECT_FRAMES)
        return budgets
