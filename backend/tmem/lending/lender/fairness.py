"""What the guests of each user keep against those of other users, whatever anybody's guests say.

A guest's age and hits are its own words. Between guests of one user they decide; between users a guest could have
everything by saying that its pages are young and hit all the time. So each user has a part: an equal one of the size
for every user with a guest that is busy. Memory that a busy guest holds within its user's part goes to no other user,
and a guest whose user is below its part gets memory from those above theirs, whatever it is said to be worth. The rest,
and all that idle guests hold, goes by worth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from tmem.lending.lender.account import Account
from tmem.lending.lender.ledger import Ledger

Offers = Sequence[tuple[Account, int]]


class Parts:
    """The users' parts at one moment."""

    def __init__(self, ledger: Ledger, now: float) -> None:
        accounts = ledger.accounts.values()
        self._idle = {account.number for account in accounts if account.activity.idle(now)}
        users = {account.uid for account in accounts if account.number not in self._idle}
        self._part = ledger.size // max(1, len(users))
        self._one_user = len({account.uid for account in accounts}) <= 1
        self._held = ledger.held_by + ledger.unpunched.kept_by
        for account in accounts:
            self._held[account.uid] -= account.debt

    def lacking(self, uid: int) -> int:
        """Give how many slabs the user is below its part."""
        return max(0, self._part - self._held[uid])

    def give(self, uid: int, slabs: int) -> None:
        """Note that guests of a user are to give up so many slabs."""
        self._held[uid] -= slabs

    def all(self, victims: Iterable[Account]) -> Offers:
        """Offer everything."""
        return [(account, account.takeable) for account in victims]

    def above(self, victims: Iterable[Account], uid: int) -> Offers:
        """Offer what users other than that one hold above their parts, of the first victims first."""
        return self._within_parts((account for account in victims if account.uid != uid), lambda account: False)

    def open(self, victims: Iterable[Account], uid: int | None) -> Offers:
        """Offer what may go by worth to a guest of a user: its user's own, what is idle, what is above the parts."""
        if self._one_user:
            return self.all(victims)
        return self._within_parts(victims, lambda account: account.uid == uid or account.number in self._idle)

    def _within_parts(self, victims: Iterable[Account], is_free: Callable[[Account], bool]) -> Offers:
        above = {uid: max(0, held - self._part) for uid, held in self._held.items()}
        offers = []
        for account in victims:
            most = account.takeable if is_free(account) else min(account.takeable, above[account.uid])
            above[account.uid] = max(0, above[account.uid] - most)
            offers.append((account, most))
        return offers
