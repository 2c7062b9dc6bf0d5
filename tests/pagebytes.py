"""Page contents for tests, and the arithmetic of pages."""

from __future__ import annotations

import random

from tmem.arena import PAGE_SHIFT, PAGE_SIZE

MIB = 1 << 20


def page_of(seed: int, size: int = PAGE_SIZE) -> bytes:
    """Return bytes that differ for every seed and compress to about half."""
    half = random.Random(seed).randbytes(size // 2)
    return half + bytes([seed & 255]) * (size - len(half))


def pages_of(seed: int, count: int) -> bytes:
    """Return `count` different pages."""
    return b"".join(page_of(seed * 100_003 + index) for index in range(count))


def pages_touched(offset: int, size: int) -> int:
    """Return the number of pages that a request touches."""
    return ((offset + size - 1) >> PAGE_SHIFT) - (offset >> PAGE_SHIFT) + 1 if size else 0
