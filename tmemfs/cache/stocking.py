"""Keep the stock of slabs filled from a thread, and let those who put many pages wait for it a moment.

The thread is there from the start: a guest that is swapped to may need slabs when the machine has no memory left to
start one. Nobody waits for longer than MAX_WAIT, since the memory that the thread waits for may be what a page that is
being swapped out here is to free; the page then goes where it goes when the pool is full.
"""

from __future__ import annotations

import trio

from tmem.arena import SLAB_SIZE, SlabSource
from tmem.stock import Stock
from tmemcommon.wakeup import Wakeup
from tmemfs.iothreads import IoThreads

MAX_WAIT = 0.05  # seconds; 128 slabs are made real in 3 ms while there is memory


class Stocking:
    """The stock of one guest. Without a source it is always ready: a lender keeps a stock of its own."""

    def __init__(self, source: SlabSource | None) -> None:
        self._wanted = Wakeup()
        self._filled = trio.Event()
        self._stock = Stock(source, self._wanted.set) if source is not None else None

    @property
    def stock(self) -> Stock | None:
        """Where the pool gets its slabs from."""
        return self._stock

    @property
    def stocked_bytes(self) -> int:
        """Memory that is ready for the pool."""
        return self._stock.stocked * SLAB_SIZE if self._stock is not None else 0

    async def wait_for_stock(self, pages: int) -> None:
        """Wait, but not for long, until the pool could take so many pages, or has all the slabs that it may have."""
        if self._stock is not None and self._stock.is_short(pages):
            with trio.move_on_after(MAX_WAIT):
                await self._filled.wait()

    async def run(self) -> None:
        """Fill the stock whenever it is low, until cancelled."""
        if self._stock is None:
            return
        stock, threads = self._stock, IoThreads("tmem-stock", 1)
        try:
            while True:
                await threads.run(lambda _: stock.fill())
                self._filled.set()
                self._filled = trio.Event()
                await self._wanted.wait()
        finally:
            threads.stop()

    def check(self) -> None:
        """Raise AssertionError unless every slab is in one place."""
        if self._stock is not None:
            self._stock.check()
