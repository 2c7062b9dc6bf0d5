"""Have slabs made real ahead of the pool, so that a put never waits for memory.

To make a slab real can take long where memory is short: the kernel may write other files' pages to their disks first,
or swap. So `fill` does it, in a thread, and `acquire` only takes a slab that is there; where the stock has run out the
pool does what it does when it is full. Who is about to put many pages can ask `is_short` first, and wait for a moment:
a pool that is not full yet would evict, or refuse persistent pages. SLABS are more than any stretch of puts uses; a
drain of 1,024 pages that do not compress takes 64.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from tmem.arena import PAGE_SIZE, SLAB_SIZE, SlabSource

SLABS = 128  # 8 MiB, but at most a quarter of the arena
LEAST_SLABS = 17  # enough for a request of 1 MiB: a small arena may be in stock as a whole
_DENIED_SECONDS = 0.1  # after the source gave nothing, nobody is woken for so long


class Stock(SlabSource):
    """A source with some slabs in reserve. `fill` may run in another thread than the rest, one at a time."""

    def __init__(self, source: SlabSource) -> None:
        self._source = source
        slabs = source.capacity // SLAB_SIZE
        self._most = min(slabs, max(LEAST_SLABS, min(SLABS, slabs // 4)))
        self._slabs: deque[int] = deque()
        self._out: dict[int, bool] = {}  # slab: persistent
        self._denied_until = float("-inf")
        self.on_want: Callable[[], None] = lambda: None  # `fill` is to be called

    @property
    def fd(self) -> int:
        """The memfd of the source."""
        return self._source.fd

    @property
    def capacity(self) -> int:
        """Most bytes that the source gives."""
        return self._source.capacity

    @property
    def ceiling(self) -> int:
        """Most bytes that the source may ever give."""
        return self._source.ceiling

    @property
    def stocked(self) -> int:
        """Slabs that are real and that no page uses."""
        return len(self._slabs)

    def acquire(self, persistent: bool) -> int | None:
        """Give a slab of the stock, None when it is empty; never waits."""
        slab = self._slabs.popleft() if self._slabs else None
        if slab is not None:
            self._out[slab] = persistent
        if len(self._slabs) <= self._most // 2 and self._may_get_more():
            self.on_want()
        return slab

    def is_short(self, pages: int) -> bool:
        """Tell whether so many pages may find no slab now and do after a `fill`, which is asked for then."""
        needed = min(self._most, pages * PAGE_SIZE // SLAB_SIZE + 1)
        if len(self._slabs) >= needed or not self._may_get_more():
            return False
        self.on_want()
        return True

    def _may_get_more(self) -> bool:
        held = len(self._out) + len(self._slabs)
        return held < self.capacity // SLAB_SIZE and time.monotonic() >= self._denied_until

    def fill(self) -> None:
        """Make slabs real until the stock is full or the source gives none; may wait."""
        while len(self._slabs) < self._most:
            try:
                slab = self._source.acquire(False)  # it need not know what for
            except OSError:
                slab = None
            if slab is None:
                self._denied_until = time.monotonic() + _DENIED_SECONDS
                return
            self._slabs.append(slab)

    def release(self, slab: int, persistent: bool) -> None:
        """Take a slab back; ValueError when it is not out, or was given as the other kind."""
        if self._out.get(slab) is not persistent:
            raise ValueError(f"slab {slab} is not out as {'persistent' if persistent else 'ephemeral'}")
        if len(self._slabs) < self._most:
            self._slabs.append(slab)
        else:
            self._source.release(slab, False)
        del self._out[slab]

    def check(self) -> None:
        """Raise AssertionError unless every slab is in one place."""
        assert len(set(self._slabs)) == len(self._slabs), "a slab is in stock twice"
        assert not self._out.keys() & set(self._slabs), "a slab is out and in stock"
