"""How what is real beyond the ledger is freed: all that a guest does not hold is punched, piece by piece.

An audit tells that there is too much, not where. A large and scattered arena has a hundred thousand pieces that are
not held, and one byte that is written to any of them has all looked at again, each second. So a piece of PIECE runs is
punched at a time, and the workers serve others between two. Each piece goes by what is held when it is its turn.
"""

from __future__ import annotations

from collections.abc import Callable

from tmem.lending.lender.account import Account
from tmem.lending.lender.actions import Action, Punch
from tmem.lending.lender.ledger import Ledger

PIECE = 2048  # runs
PAUSE = 0.01  # seconds between two pieces


class Sweeper:
    """The arenas that are swept, and how far; `act` takes the actions."""

    def __init__(self, ledger: Ledger, act: Callable[[Action], None]) -> None:
        self._ledger = ledger
        self._act = act
        self._next: dict[int, int] = {}  # the first slab that was not looked at, by guest
        self._due = 0.0

    def sweeps(self, account: Account) -> bool:
        """Tell whether a guest's arena is not swept to its end."""
        return account.number in self._next

    def start(self, now: float, account: Account) -> None:
        """Have all punched that a guest does not hold, the first piece now."""
        self._go_on(now, account, 0)

    def _go_on(self, now: float, account: Account, first: int) -> None:
        runs, end = account.map.not_lent(first, PIECE)
        self._act(Punch(account.number, runs))
        if end < account.map.total:
            self._next[account.number] = end
            self._due = now + PAUSE

    def deadline(self) -> float | None:
        """Give when the next piece is due."""
        return self._due if self._next else None

    def wake(self, now: float) -> None:
        """Punch the next piece of one arena, once it is due; arenas take turns."""
        if self._next and self._due <= now:
            number = next(iter(self._next))
            self._go_on(now, self._ledger.accounts[number], self._next.pop(number))
            self._due = now + PAUSE

    def closed(self, account: Account) -> None:
        """Forget an arena that is punched as a whole."""
        self._next.pop(account.number, None)
