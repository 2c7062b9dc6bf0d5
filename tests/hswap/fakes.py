"""An overflow file in memory that fails on demand, and a swap-like file of a few pages over it."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Sequence

import trio

from tmem import PAGE_SIZE, SLAB_SIZE, EmbeddedArena, Tmem
from tmemfs.hswap.hswap import Hswap
from tmemfs.hswap.pagemap import FIRST_SLOT


class MemoryOverflow:
    """Slots in a dict. Calls can fail, and can take some checkpoints."""

    def __init__(self) -> None:
        self.slots: dict[int, bytes] = {}
        self.full = False
        self.broken = False
        self.turns = 0
        self.reserved = 0
        self.limit = 1 << 30
        self._next = FIRST_SLOT

    async def _pass(self) -> None:
        for _ in range(self.turns):
            await trio.lowlevel.checkpoint()
        if self.broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    async def write(self, pages: Sequence[bytes]) -> list[int]:
        await self._pass()
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        slots = list(range(self._next, self._next + len(pages)))
        self._next += len(pages)
        self.slots.update(zip(slots, map(bytes, pages), strict=True))
        return slots

    async def read(self, slots: Sequence[int]) -> list[bytes]:
        await self._pass()
        return [self.slots[slot] for slot in slots]

    def free(self, slots: Sequence[int]) -> None:
        for slot in slots:
            del self.slots[slot]

    async def reserve(self, pages: int) -> None:
        if pages > self.limit:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.reserved = pages

    def clear(self) -> None:
        self.slots.clear()

    def check(self, used: Sequence[int]) -> None:
        assert set(used) == self.slots.keys(), "a slot is lost"


class CappedArena(EmbeddedArena):
    """An arena with a cap on persistent slabs, which can also refuse every slab."""

    def __init__(self, slabs: int) -> None:
        super().__init__(slabs * SLAB_SIZE)
        self.cap = slabs
        self.refuses = False

    @property
    def private(self) -> bool:
        return False  # so that writes can be made to fail

    def acquire(self, persistent: bool) -> int | None:
        if self.refuses or (persistent and self.persistent_slabs >= self.cap):
            return None
        return super().acquire(persistent)

    @property
    def persistent_slabs(self) -> int:
        return sum(self._out.values())


async def no_stock(pages: int) -> None:
    """Return at once: there is no stock to wait for."""


class Area:
    """A swap-like file over a pool of a few slabs."""

    def __init__(self, pages: int, slabs: int) -> None:
        self.source = CappedArena(slabs)
        self.now = 0.0
        self.tmem = Tmem(self.source, clock=lambda: self.now)
        self.overflow = MemoryOverflow()
        self.hswap = Hswap(self.tmem, self.overflow, pages * PAGE_SIZE, lambda: self.now, no_stock)

    def check(self) -> None:
        self.hswap.check()
        self.tmem.check()
        self.source.check()

    def close(self) -> None:
        self.check()
        self.source.close()


def raw_page(seed: int) -> bytes:
    """Return a page that does not compress."""
    return random.Random(seed).randbytes(PAGE_SIZE)
