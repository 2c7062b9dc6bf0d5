"""The slabs that a guest has on loan, as the slab source of its pool.

The pool is synchronous and never waits, so there is a small stock of lent slabs that no page uses yet. `acquire` takes
from it and calls `on_want` when it runs low, so that the client asks tmemd for more. A slab on loan is in the stock,
out (used by the pool), or on its way back. The other slabs of the arena must not be touched.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from tmem.arena import SLAB_SIZE, SlabSource, make_arena
from tmem.lending.protocol.kind import Kind
from tmem.lending.protocol.runs import Run, Runs, end, runs_of, slabs_of


class BorrowedArena(SlabSource):
    """A sealed memfd, and the state of its slabs on loan. Pairs are indexed by Kind."""

    def __init__(self, slabs: int, on_want: Callable[[], None] = lambda: None) -> None:
        """Make a memfd of `slabs` slabs. `on_want` is called when slabs are wanted or to be returned."""
        self.total = slabs
        self.cap = 0  # slabs, set by tmemd
        self.reserve = [0, 0]  # ask for more when the stock falls to this many slabs
        self.wanted = [False, False]
        self._on_want = on_want
        self._stock: tuple[dict[int, None], dict[int, None]] = ({}, {})
        self._unused = [0, 0]  # slabs that stayed in stock since the last `count_unused`
        self._out: dict[int, Kind] = {}
        self._held = [0, 0]  # slabs out and in stock
        self._returning: tuple[dict[int, None], dict[int, None]] = ({}, {})
        self._fd = make_arena(slabs)

    @property
    def fd(self) -> int:
        """The memfd; -1 once closed."""
        return self._fd

    @property
    def capacity(self) -> int:
        """Bytes on loan, at least one slab: the pool sizes its classes and its same-filled pages by it."""
        return (sum(self._held) or 1) * SLAB_SIZE

    @property
    def ceiling(self) -> int:
        """The most bytes that may be lent: the cap, at least one slab."""
        return max(self.cap, 1) * SLAB_SIZE

    @property
    def private(self) -> bool:
        """False: tmemd punches slabs that it takes."""
        return False

    @property
    def stocked(self) -> int:
        """The number of slabs in stock."""
        return sum(len(stock) for stock in self._stock)

    def held(self, kind: Kind) -> int:
        """Return how many slabs of a kind are on loan."""
        return self._held[kind]

    def acquire(self, persistent: bool) -> int | None:
        """Return a slab from the stock; None if it is empty."""
        kind = Kind(persistent)
        stock = self._stock[kind]
        if len(stock) <= self.reserve[kind] and not self.wanted[kind]:
            self.wanted[kind] = True
            self._on_want()
        if not stock:
            return None
        slab, _ = stock.popitem()
        self._unused[kind] = min(self._unused[kind], len(stock))
        self._out[slab] = kind
        return slab

    def release(self, slab: int, persistent: bool) -> None:
        """Return a slab to tmemd. Raise ValueError unless it is out as this kind."""
        kind = Kind(persistent)
        if self._out.get(slab) is not kind:
            raise ValueError(f"slab {slab} is not out as {kind.name.lower()}")
        del self._out[slab]
        self._held[kind] -= 1
        self._returning[kind][slab] = None
        self._on_want()

    # Messages and returns.

    def lend(self, runs: Sequence[Run], kind: Kind) -> int:
        """Add slabs to the stock; return how many. Raise ValueError if one is not in the arena or already lent."""
        slabs = self._within(runs)
        for slab in slabs:
            if slab in self._out or any(slab in stock for stock in self._stock):
                raise ValueError(f"slab {slab} is lent twice")
            for returning in self._returning:
                returning.pop(slab, None)
        self._stock[kind].update(dict.fromkeys(slabs))
        self._held[kind] += len(slabs)
        return len(slabs)

    def _within(self, runs: Sequence[Run]) -> list[int]:
        if end(runs) > self.total:
            raise ValueError(f"slab {end(runs) - 1} is not in the arena")
        return slabs_of(runs)

    def take(self, runs: Sequence[Run]) -> list[int]:
        """Remove ephemeral slabs that tmemd took; return those that were out, whose pages the pool must drop.

        Slabs that were returned before the Taken arrived are ignored. Raise ValueError for a persistent slab.
        """
        slabs, lost = self._within(runs), []
        stock = self._stock[Kind.EPHEMERAL]
        for slab in slabs:
            if self._out.get(slab) is Kind.PERSISTENT or slab in self._stock[Kind.PERSISTENT]:
                raise ValueError(f"persistent slab {slab} was taken")
            self._returning[Kind.EPHEMERAL].pop(slab, None)
            if slab in self._out:
                del self._out[slab]
                self._held[Kind.EPHEMERAL] -= 1
                lost.append(slab)
            elif slab in stock:
                del stock[slab]
                self._held[Kind.EPHEMERAL] -= 1
        self._unused[Kind.EPHEMERAL] = min(self._unused[Kind.EPHEMERAL], len(stock))
        return lost

    def return_stock(self, slabs: int, kind: Kind) -> int:
        """Return up to `slabs` slabs from the stock to tmemd; return how many."""
        stock = self._stock[kind]
        moved = min(slabs, len(stock))
        self._returning[kind].update(dict.fromkeys(stock.popitem()[0] for _ in range(moved)))
        self._held[kind] -= moved
        self._unused[kind] = min(self._unused[kind], len(stock))
        return moved

    def count_unused(self, kind: Kind) -> int:
        """Return how many slabs stayed in stock since the last call."""
        unused, self._unused[kind] = self._unused[kind], len(self._stock[kind])
        return unused

    def pop_returning(self, kind: Kind) -> Runs:
        """Return and clear the slabs on their way back."""
        slabs = self._returning[kind]
        runs = runs_of(slabs)
        slabs.clear()
        return runs

    def claims(self, kind: Kind) -> Runs:
        """Return all slabs of a kind on loan, for a Claim, and clear those on their way back."""
        self._returning[kind].clear()
        out = [slab for slab, other in self._out.items() if other is kind]
        return runs_of([*out, *self._stock[kind]])

    def close(self) -> None:
        """Close the memfd; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def check(self) -> None:
        """Raise AssertionError unless every slab is in one place and in the arena."""
        places = [*self._out, *(slab for slabs in (*self._stock, *self._returning) for slab in slabs)]
        assert len(set(places)) == len(places), "a slab is in two places"
        assert all(0 <= slab < self.total for slab in places), "a slab is beyond the arena"
        for kind in Kind:
            assert 0 <= self._unused[kind] <= len(self._stock[kind])
            out = sum(other is kind for other in self._out.values())
            assert self._held[kind] == out + len(self._stock[kind])
