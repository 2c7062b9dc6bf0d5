"""Punches all slabs of an arena that its guest does not hold, in chunks.

An audit says that too much is populated, not where. A large fragmented arena has a hundred thousand runs that are not
held, and a write to any of them starts a sweep each second. So CHUNK_RUNS runs are punched at a time, and workers serve
other guests in between. Each chunk is computed when it is due.
"""

from __future__ import annotations

from collections.abc import Callable

from tmem.lending.lender.account import Account
from tmem.lending.lender.actions import Action, Punch
from tmem.lending.lender.ledger import Ledger

CHUNK_RUNS = 2048  # runs
PAUSE = 0.01  # seconds between two chunks


class Sweeper:
    """The arenas that are being swept, and how far. `act` appends an action."""

    def __init__(self, ledger: Ledger, act: Callable[[Action], None]) -> None:
        self._ledger = ledger
        self._act = act
        self._next: dict[int, int] = {}  # the first slab of the next chunk, by guest
        self._due = 0.0

    def is_sweeping(self, account: Account) -> bool:
        """Return whether a guest's arena is being swept."""
        return account.number in self._next

    def start(self, now: float, account: Account) -> None:
        """Start to sweep an arena, with the first chunk now."""
        self._punch_chunk(now, account, 0)

    def _punch_chunk(self, now: float, account: Account, first: int) -> None:
        runs, end = account.map.not_lent(first, CHUNK_RUNS)
        self._act(Punch(account.number, runs))
        if end < account.map.total:
            self._next[account.number] = end
            self._due = now + PAUSE

    def deadline(self) -> float | None:
        """Return when the next chunk is due."""
        return self._due if self._next else None

    def wake(self, now: float) -> None:
        """Punch the next chunk of one arena, if it is due; arenas take turns."""
        if self._next and self._due <= now:
            number = next(iter(self._next))
            self._punch_chunk(now, self._ledger.accounts[number], self._next.pop(number))
            self._due = now + PAUSE

    def on_closed(self, account: Account) -> None:
        """Stop the sweep of an arena that is punched as a whole."""
        self._next.pop(account.number, None)
