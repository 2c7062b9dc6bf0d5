"""Protects each user's share of memory against guests of other users.

Ages and hits are reported by the guests, so they decide only between guests of one user. Between users, a guest could
otherwise get all memory by reporting young pages and many hits. Each user with a busy guest has an equal share of the
size:

* What a busy guest holds within its user's share is not reclaimed for another user.
* A guest whose user is below its share gets slabs of users above theirs, whatever their value.
* The rest, and all that idle guests hold, is reclaimed by value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from tmem.lending.lender.account import Account
from tmem.lending.lender.ledger import Ledger

Candidates = Sequence[tuple[Account, int]]


class UserShares:
    """The users' shares at one moment."""

    def __init__(self, ledger: Ledger, now: float) -> None:
        accounts = ledger.accounts.values()
        self._idle = {account.number for account in accounts if account.activity.idle(now)}
        users = {account.uid for account in accounts if account.number not in self._idle}
        self._share = ledger.size // max(1, len(users))
        self._one_user = len({account.uid for account in accounts}) <= 1
        self._held = ledger.held_by + ledger.unpunched.held_by
        for account in accounts:
            self._held[account.uid] -= account.reclaim_target

    def deficit(self, uid: int) -> int:
        """Return how many slabs the user is below its share."""
        return max(0, self._share - self._held[uid])

    def debit(self, uid: int, slabs: int) -> None:
        """Subtract slabs that are reclaimed from a user's guests."""
        self._held[uid] -= slabs

    def unlimited(self, victims: Iterable[Account]) -> Candidates:
        """Return the victims with all their reclaimable slabs."""
        return [(account, account.reclaimable) for account in victims]

    def above_share(self, victims: Iterable[Account], uid: int) -> Candidates:
        """Return what other users hold above their shares, from the first victims first."""
        return self._limit_to_shares((account for account in victims if account.uid != uid), lambda account: False)

    def by_value(self, victims: Iterable[Account], uid: int | None) -> Candidates:
        """Return what may be reclaimed by value for a user: its own, idle guests' slabs, and slabs above the shares."""
        if self._one_user:
            return self.unlimited(victims)
        return self._limit_to_shares(victims, lambda account: account.uid == uid or account.number in self._idle)

    def _limit_to_shares(self, victims: Iterable[Account], is_free: Callable[[Account], bool]) -> Candidates:
        above = {uid: max(0, held - self._share) for uid, held in self._held.items()}
        candidates = []
        for account in victims:
            most = account.reclaimable if is_free(account) else min(account.reclaimable, above[account.uid])
            above[account.uid] = max(0, above[account.uid] - most)
            candidates.append((account, most))
        return candidates
