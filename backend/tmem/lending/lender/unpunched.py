"""Slabs that guests gave up and that may still be real: they stay booked until somebody says that they are punched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from tmem.lending.lender.account import Account


class Unpunched:
    """The sums of what accounts gave up. Of a guest whose arena hangs nobody knows when that is free."""

    def __init__(self) -> None:
        self.total = 0
        self.hanging_of: Counter[int] = Counter()  # those of hanging guests, by uid

    @property
    def coming(self) -> int:
        """Slabs that are free in a moment."""
        return self.total - self.hanging_of.total()

    def add(self, account: Account, slabs: int) -> None:
        """Keep slabs booked that a guest gave up (a negative number: no longer)."""
        assert account.unpunched + slabs >= 0, "more was punched than given up"
        account.unpunched += slabs
        self.total += slabs
        if account.hangs:
            self.hanging_of[account.uid] += slabs

    def forget(self, account: Account) -> None:
        """Book nothing any more of what a guest gave up."""
        self.add(account, -account.unpunched)

    def set_hanging(self, account: Account, hangs: bool) -> None:
        """Note whether calls on a guest's arena return."""
        if hangs != account.hangs:
            account.hangs = hangs
            self.hanging_of[account.uid] += account.unpunched if hangs else -account.unpunched

    def check(self, accounts: Collection[Account]) -> None:
        """Raise AssertionError unless the sums are those of the accounts."""
        assert self.total == sum(account.unpunched for account in accounts), "sum of what is not punched"
        for uid, slabs in self.hanging_of.items():
            assert slabs == sum(account.unpunched for account in accounts if account.hangs and account.uid == uid)
