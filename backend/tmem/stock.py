"""Allocate slabs ahead of the pool, so that a put never waits for memory.

Allocating a slab can take long when memory is short: the kernel may first write out pages of other files, or swap. So
`fill` allocates in a thread, and `acquire` only takes slabs from the stock. When the stock is empty, the pool behaves
as if it were full: it evicts, or refuses persistent pages. A caller that is about to put many pages can check
`is_short` first and wait a moment. MAX_SLABS is more than any run of puts uses: a drain of 1,024 incompressible pages
takes 64.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from tmem.arena import PAGE_SIZE, SLAB_SIZE, SlabSource, SlabSourceWrapper

MAX_SLABS = 128  # 8 MiB; at most a quarter of the arena
MIN_SLABS = 17  # enough for a request of 1 MiB; a small arena may be in stock as a whole
_DENIED_SECONDS = 0.1  # no `fill` is requested for so long after the source gave nothing


class Stock(SlabSourceWrapper):
    """A source with allocated slabs in reserve. `fill` may run in another thread than the rest, one at a time."""

    def __init__(self, source: SlabSource, on_want: Callable[[], None] = lambda: None) -> None:
        """Keep slabs of `source` in stock; `on_want` is called to request a `fill`."""
        super().__init__(source)
        self._on_want = on_want
        slabs = source.capacity // SLAB_SIZE
        self._target = min(slabs, max(MIN_SLABS, min(MAX_SLABS, slabs // 4)))
        self._slabs: deque[int] = deque()
        self._out: dict[int, bool] = {}  # slab: persistent
        self._denied_until = float("-inf")

    @property
    def stocked(self) -> int:
        """The number of allocated slabs in reserve."""
        return len(self._slabs)

    def acquire(self, persistent: bool) -> int | None:
        """Return a slab of the stock, None when it is empty; never waits."""
        slab = self._slabs.popleft() if self._slabs else None
        if slab is not None:
            self._out[slab] = persistent
        if len(self._slabs) <= self._target // 2 and self._may_get_more():
            self._on_want()
        return slab

    def is_short(self, pages: int) -> bool:
        """Return whether so many pages may lack slabs that a `fill` would bring; if so, request it."""
        needed = min(self._target, pages * PAGE_SIZE // SLAB_SIZE + 1)
        if len(self._slabs) >= needed or not self._may_get_more():
            return False
        self._on_want()
        return True

    def _may_get_more(self) -> bool:
        held = len(self._out) + len(self._slabs)
        return held < self.capacity // SLAB_SIZE and time.monotonic() >= self._denied_until

    def fill(self) -> None:
        """Allocate slabs until the stock is full or the source gives none; may wait."""
        while len(self._slabs) < self._target:
            try:
                slab = self._source.acquire(False)  # the kind matters only to the stock
            except OSError:
                slab = None
            if slab is None:
                self._denied_until = time.monotonic() + _DENIED_SECONDS
                return
            self._slabs.append(slab)

    def release(self, slab: int, persistent: bool) -> None:
        """Take a slab back. ValueError if it is not out, or is out as the other kind."""
        if self._out.get(slab) is not persistent:
            raise ValueError(f"slab {slab} is not out as {'persistent' if persistent else 'ephemeral'}")
        if len(self._slabs) < self._target:
            self._slabs.append(slab)
        else:
            self._source.release(slab, False)
        del self._out[slab]

    def check(self) -> None:
        """Raise AssertionError unless every slab is in one place."""
        assert len(set(self._slabs)) == len(self._slabs), "a slab is in stock twice"
        assert not self._out.keys() & set(self._slabs), "a slab is out and in stock"
