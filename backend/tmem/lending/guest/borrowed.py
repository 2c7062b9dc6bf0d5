"""The slabs that a guest has on loan, as the source that its pool takes them from.

The pool is synchronous and never waits, so there is a small stock of lent slabs that no page uses yet: `acquire` takes
from it, and where it runs low `on_want` is called, for somebody to ask tmemd for more. A slab is in the stock, out (in
use by the pool), or on its way back; whatever else the arena has is not ours to touch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence

from tmem.arena import SLAB_SIZE, SlabSource, make_arena
from tmem.lending.protocol.messages import Runs


def runs_of(slabs: Iterable[int]) -> Runs:
    """Give numbers as runs, ascending."""
    runs: list[tuple[int, int]] = []
    for slab in sorted(slabs):
        if runs and sum(runs[-1]) == slab:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((slab, 1))
    return tuple(runs)


class Borrowed(SlabSource):
    """A sealed memfd of `slabs` slabs, and those that are lent. Kinds are indices: False ephemeral, True persistent."""

    def __init__(self, slabs: int) -> None:
        self.total = slabs
        self.cap = 0  # slabs; told by the lender
        self.reserve = [0, 0]  # slabs of stock at which more are wanted
        self.wanted = [False, False]
        self.on_want: Callable[[], None] = lambda: None
        self._stock: tuple[dict[int, None], dict[int, None]] = ({}, {})
        self._unused = [0, 0]  # slabs that were in stock all the time since the last `idle`
        self._out: dict[int, bool] = {}
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
        return len(self._stock[False]) + len(self._stock[True])

    def held(self, persistent: bool) -> int:
        """Give how many slabs of a kind are on loan."""
        return self._held[persistent]

    def acquire(self, persistent: bool) -> int | None:
        """Give a slab of the stock, None when it is empty; never waits."""
        stock = self._stock[persistent]
        if len(stock) <= self.reserve[persistent] and not self.wanted[persistent]:
            self.wanted[persistent] = True
            self.on_want()
        if not stock:
            return None
        slab, _ = stock.popitem()
        self._unused[persistent] = min(self._unused[persistent], len(stock))
        self._out[slab] = persistent
        return slab

    def release(self, slab: int, persistent: bool) -> None:
        """Take a slab from the pool, to be returned; ValueError when it is not out, or was given as the other kind."""
        if self._out.get(slab) is not persistent:
            raise ValueError(f"slab {slab} is not out as {'persistent' if persistent else 'ephemeral'}")
        del self._out[slab]
        self._held[persistent] -= 1
        self._returning[persistent][slab] = None
        self.on_want()

    # What the lender does.

    def lend(self, runs: Sequence[tuple[int, int]], persistent: bool) -> int:
        """Add lent slabs to the stock and give how many; ValueError when one is not in the arena or lent already."""
        slabs = self._within(runs)
        for slab in slabs:
            if slab in self._out or slab in self._stock[False] or slab in self._stock[True]:
                raise ValueError(f"slab {slab} is lent twice")
            self._returning[False].pop(slab, None)
            self._returning[True].pop(slab, None)
        self._stock[persistent].update(dict.fromkeys(slabs))
        self._held[persistent] += len(slabs)
        return len(slabs)

    def _within(self, runs: Sequence[tuple[int, int]]) -> list[int]:
        if runs and sum(runs[-1]) > self.total:
            raise ValueError(f"slab {sum(runs[-1]) - 1} is not in the arena")
        return [slab for first, count in runs for slab in range(first, first + count)]

    def take(self, runs: Sequence[tuple[int, int]]) -> list[int]:
        """Strike ephemeral slabs that were taken off the loan; give those that the pool had and must lose.

        ValueError for a persistent one. One that we gave back before we heard is nobody's.
        """
        slabs, lost = self._within(runs), []
        stock = self._stock[False]
        for slab in slabs:
            if self._out.get(slab) is True or slab in self._stock[True]:
                raise ValueError(f"persistent slab {slab} was taken")
            self._returning[False].pop(slab, None)
            if slab in self._out:
                del self._out[slab]
                self._held[False] -= 1
                lost.append(slab)
            elif slab in stock:
                del stock[slab]
                self._held[False] -= 1
        self._unused[False] = min(self._unused[False], len(stock))
        return lost

    def shed(self, slabs: int, persistent: bool) -> int:
        """Move up to that many slabs from the stock to those on their way back; give how many."""
        stock = self._stock[persistent]
        count = min(slabs, len(stock))
        self._returning[persistent].update(dict.fromkeys(stock.popitem()[0] for _ in range(count)))
        self._held[persistent] -= count
        self._unused[persistent] = min(self._unused[persistent], len(stock))
        return count

    def idle(self, persistent: bool) -> int:
        """Give how many slabs were in stock all the time since the last call."""
        unused, self._unused[persistent] = self._unused[persistent], len(self._stock[persistent])
        return unused

    def returned(self, persistent: bool) -> Runs:
        """Give the slabs that are to be returned, and forget them."""
        slabs = self._returning[persistent]
        runs = runs_of(slabs)
        slabs.clear()
        return runs

    def claims(self, persistent: bool) -> Runs:
        """Give all slabs of a kind on loan, for a lender that lost count; what is on its way back is forgotten."""
        self._returning[persistent].clear()
        out = [slab for slab, kind in self._out.items() if kind is persistent]
        return runs_of([*out, *self._stock[persistent]])

    def close(self) -> None:
        """Close the memfd; harmless when closed already."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def check(self) -> None:
        """Raise AssertionError unless every slab is in one place and in the arena."""
        places = [*self._out, *self._stock[False], *self._stock[True], *self._returning[False], *self._returning[True]]
        assert len(set(places)) == len(places), "a slab is in two places"
        assert all(0 <= slab < self.total for slab in places), "a slab is beyond the arena"
        for kind in (False, True):
            assert 0 <= self._unused[kind] <= len(self._stock[kind])
            out = sum(other is kind for other in self._out.values())
            assert self._held[kind] == out + len(self._stock[kind])
