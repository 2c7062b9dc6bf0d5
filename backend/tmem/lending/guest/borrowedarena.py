"""The slabs that a guest has on loan, as the source that its pool takes them from.

The pool is synchronous and never waits, so there is a small stock of lent slabs that no page uses yet: `acquire` takes
from it, and where it runs low `on_want` is called, for somebody to ask tmemd for more. A slab is in the stock, out (in
use by the pool), or on its way back; whatever else the arena has is not ours to touch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from tmem.arena import SLAB_SIZE, SlabSource, make_arena
from tmem.lending.protocol.kind import Kind
from tmem.lending.protocol.runs import Run, Runs, end, runs_of, slabs_of


class BorrowedArena(SlabSource):
    """A sealed memfd of `slabs` slabs, and those that are lent; pairs are indexed by Kind."""

    def __init__(self, slabs: int, on_want: Callable[[], None] = lambda: None) -> None:
        """Make the memfd; `on_want` is called when tmemd is to be asked for slabs or given some back."""
        self.total = slabs
        self.cap = 0  # slabs; told by the lender
        self.reserve = [0, 0]  # slabs of stock at which more are wanted
        self.wanted = [False, False]
        self._on_want = on_want
        self._stock: tuple[dict[int, None], dict[int, None]] = ({}, {})
        self._unused = [0, 0]  # slabs that were in stock all the time since the last `idle`
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
        """Bytes that may be lent at most, as far as the lender has said."""
        return max(self.cap, 1) * SLAB_SIZE

    @property
    def stocked(self) -> int:
        """Slabs that no page uses."""
        return sum(len(stock) for stock in self._stock)

    def held(self, kind: Kind) -> int:
        """Give how many slabs of a kind are on loan."""
        return self._held[kind]

    def acquire(self, persistent: bool) -> int | None:
        """Give a slab of the stock, None when it is empty; never waits."""
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
        """Take a slab from the pool, to be returned; ValueError when it is not out, or was given as the other kind."""
        kind = Kind(persistent)
        if self._out.get(slab) is not kind:
            raise ValueError(f"slab {slab} is not out as {kind.name.lower()}")
        del self._out[slab]
        self._held[kind] -= 1
        self._returning[kind][slab] = None
        self._on_want()

    # What the lender does.

    def lend(self, runs: Sequence[Run], kind: Kind) -> int:
        """Add lent slabs to the stock and give how many; ValueError when one is not in the arena or lent already."""
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
        """Strike ephemeral slabs that were taken off the loan; give those that the pool had and must lose.

        ValueError for a persistent one. One that we gave back before we heard is nobody's.
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

    def shed(self, slabs: int, kind: Kind) -> int:
        """Move up to that many slabs from the stock to those on their way back; give how many."""
        stock = self._stock[kind]
        shed = min(slabs, len(stock))
        self._returning[kind].update(dict.fromkeys(stock.popitem()[0] for _ in range(shed)))
        self._held[kind] -= shed
        self._unused[kind] = min(self._unused[kind], len(stock))
        return shed

    def idle(self, kind: Kind) -> int:
        """Give how many slabs were in stock all the time since the last call."""
        unused, self._unused[kind] = self._unused[kind], len(self._stock[kind])
        return unused

    def returned(self, kind: Kind) -> Runs:
        """Give the slabs that are to be returned, and forget them."""
        slabs = self._returning[kind]
        runs = runs_of(slabs)
        slabs.clear()
        return runs

    def claims(self, kind: Kind) -> Runs:
        """Give all slabs of a kind on loan, for a lender that lost count; what is on its way back is forgotten."""
        self._returning[kind].clear()
        out = [slab for slab, other in self._out.items() if other is kind]
        return runs_of([*out, *self._stock[kind]])

    def close(self) -> None:
        """Close the memfd; harmless when closed already."""
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
