"""Fill the pool's stock of slabs in a thread, so that puts need not wait for the kernel to allocate memory.

The thread starts with the guest: a guest that the kernel swaps to may need slabs when the machine has no memory left to
start a thread. A put waits for the stock for at most MAX_WAIT. A longer wait could deadlock: the thread may wait for
memory that only this put, of a page being swapped out, will free. After MAX_WAIT the put continues as with a full pool.
"""

from __future__ import annotations

import trio

from tmem.arena import SLAB_SIZE, SlabSource
from tmem.stock import Stock
from tmemcommon.wakeup import Wakeup
from tmemfs.iothreads import IoThreads

MAX_WAIT = 0.05  # seconds; 128 slabs are populated in 3 ms while memory is free


class Stocking:
    """The stock of one guest. Without a source there is no stock: a lender keeps its own."""

    def __init__(self, source: SlabSource | None) -> None:
        self._wanted = Wakeup()
        self._filled = trio.Event()
        self._stock = Stock(source, self._wanted.set) if source is not None else None

    @property
    def stock(self) -> Stock | None:
        """The pool's slab source; None without a stock."""
        return self._stock

    @property
    def stocked_bytes(self) -> int:
        """The bytes of populated slabs that the pool does not use yet."""
        return self._stock.stocked * SLAB_SIZE if self._stock is not None else 0

    async def wait_for_stock(self, pages: int) -> None:
        """Wait, at most MAX_WAIT, until the pool has slabs for so many pages or has all that it may have."""
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
