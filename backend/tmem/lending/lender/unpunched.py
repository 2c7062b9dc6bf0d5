"""Counts slabs that guests gave up and that are not punched yet: they stay booked until then."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from tmem.lending.lender.account import Account
from tmem.lending.lender.pinned import Pinned


class Unpunched:
    """The sums of what accounts gave up. Of a guest whose arena hangs nobody knows when that is free."""

    def __init__(self) -> None:
        self._of: Counter[int] = Counter()  # by uid
        self._hanging_of: Counter[int] = Counter()  # those of hanging guests, by uid
        self.pinned = Pinned()

    @property
    def total(self) -> int:
        """Slabs that are booked for nobody's use."""
        return self._of.total() + self.pinned.of.total()

    @property
    def held_by(self) -> Counter[int]:
        """Those that count for a user as if its guests held them, by uid."""
        return self._hanging_of + self.pinned.of

    @property
    def incoming(self) -> int:
        """Slabs that are free in a moment."""
        return self._of.total() - self._hanging_of.total()

    def add(self, account: Account, slabs: int) -> None:
        """Keep slabs booked that a guest gave up (a negative number: no longer)."""
        assert account.unpunched + slabs >= 0, "more was punched than given up"
        account.unpunched += slabs
        self._of[account.uid] += slabs
        if account.hanging:
            self._hanging_of[account.uid] += slabs
        if slabs < 0:
            self.pinned.punched(account.uid, -slabs)

    def update_pinned(self, found: int, accounts: Iterable[Account]) -> None:
        """Take in how many slabs were punched and live on; arenas that are being closed are punched bit by bit."""
        closing: Counter[int] = Counter()
        for account in accounts:
            if account.ended or account.settings.evicted:
                closing[account.uid] += account.held
        self.pinned.update(found, self._of + closing)

    def closed(self, account: Account) -> None:
        """Book nothing any more of what a guest gave up, as its whole arena was punched."""
        self.pinned.punched(account.uid, account.held)
        self.add(account, -account.unpunched)

    def set_hanging(self, account: Account, hangs: bool) -> None:
        """Note whether calls on a guest's arena return."""
        if hangs != account.hanging:
            account.hanging = hangs
            self._hanging_of[account.uid] += account.unpunched if hangs else -account.unpunched

    def check(self, accounts: Collection[Account]) -> None:
        """Raise AssertionError unless the sums are those of the accounts."""
        assert self._of.total() == sum(account.unpunched for account in accounts), "sum of what is not punched"
        for uid, slabs in self._hanging_of.items():
            assert slabs == sum(account.unpunched for account in accounts if account.hanging and account.uid == uid)
