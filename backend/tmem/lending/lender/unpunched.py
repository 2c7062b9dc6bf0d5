"""Counts slabs that guests gave up and that are not punched yet: they stay booked until then."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from tmem.lending.lender.account import Account
from tmem.lending.lender.pinned import Pinned


class Unpunched:
    """Sums by user. Slabs of a guest whose arena hangs are counted apart: they may never be punched."""

    def __init__(self) -> None:
        self._of: Counter[int] = Counter()  # by uid
        self._hanging_of: Counter[int] = Counter()  # those of hanging guests, by uid
        self.pinned = Pinned()

    @property
    def total(self) -> int:
        """Unpunched and pinned slabs."""
        return self._of.total() + self.pinned.of.total()

    @property
    def held_by(self) -> Counter[int]:
        """Slabs that count as held by a user, by uid: of hanging guests, and pinned."""
        return self._hanging_of + self.pinned.of

    @property
    def incoming(self) -> int:
        """Slabs that will be punched soon."""
        return self._of.total() - self._hanging_of.total()

    def add(self, account: Account, slabs: int) -> None:
        """Add slabs that a guest gave up; a negative number were punched."""
        assert account.unpunched + slabs >= 0, "more was punched than given up"
        account.unpunched += slabs
        self._of[account.uid] += slabs
        if account.hanging:
            self._hanging_of[account.uid] += slabs
        if slabs < 0:
            self.pinned.punched(account.uid, -slabs)

    def update_pinned(self, found: int, accounts: Iterable[Account]) -> None:
        """Update the pinned slabs. Arenas that are being closed are punched in parts, without a report."""
        closing: Counter[int] = Counter()
        for account in accounts:
            if account.ended or account.settings.evicted:
                closing[account.uid] += account.held
        self.pinned.update(found, self._of + closing)

    def closed(self, account: Account) -> None:
        """Remove a guest's slabs: its whole arena was punched."""
        self.pinned.punched(account.uid, account.held)
        self.add(account, -account.unpunched)

    def set_hanging(self, account: Account, hangs: bool) -> None:
        """Record whether a call on a guest's arena hangs."""
        if hangs != account.hanging:
            account.hanging = hangs
            self._hanging_of[account.uid] += account.unpunched if hangs else -account.unpunched

    def check(self, accounts: Collection[Account]) -> None:
        """Raise AssertionError unless the sums are those of the accounts."""
        assert self._of.total() == sum(account.unpunched for account in accounts), "sum of what is not punched"
        for uid, slabs in self._hanging_of.items():
            assert slabs == sum(account.unpunched for account in accounts if account.hanging and account.uid == uid)
