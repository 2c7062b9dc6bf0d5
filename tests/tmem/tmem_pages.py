"""Pages of known compressibility, and a slab source that fails on demand."""

from __future__ import annotations

import errno
import random

from tmem import PAGE_SIZE, EmbeddedArena


def page_of(seed: int, stored: int) -> bytes:
    """Make a page that lz4 compresses to about `stored` bytes; different for each seed."""
    noise = random.Random(seed).randbytes(max(8, min(stored - 30, PAGE_SIZE)))
    return (noise + b"\xa5\x5a" * (PAGE_SIZE // 2))[:PAGE_SIZE]


def filled(word: int) -> bytes:
    """Make a same-filled page."""
    return word.to_bytes(8, "little") * (PAGE_SIZE // 8)


class FaultySource(EmbeddedArena):
    """An arena that can refuse, raise, cap its persistent slabs and take slabs away."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.refuses = False
        self.raises = False
        self.persistent_cap: int | None = None

    def acquire(self, persistent: bool) -> int | None:
        if self.raises:
            raise ConnectionResetError(errno.ECONNRESET, "the lender is gone")
        held = sum(self._out.values())
        if self.refuses or (persistent and self.persistent_cap is not None and held >= self.persistent_cap):
            return None
        return super().acquire(persistent)

    def release(self, slab: int, persistent: bool) -> None:
        if self.raises:
            raise ConnectionResetError(errno.ECONNRESET, "the lender is gone")
        super().release(slab, persistent)

    def ephemeral_slabs(self) -> list[int]:
        """Slabs out as ephemeral ones, the ones that may be revoked."""
        return [slab for slab, persistent in self._out.items() if not persistent]

    def revoke(self, slab: int) -> None:
        """Punch a slab behind its holder's back."""
        super().release(slab, False)
