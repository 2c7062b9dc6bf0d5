"""Write the files that the measures read: seeded, with a known compressibility."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

PAGE_SIZE = 4096
MIB = 1 << 20


def half_compressible(pages: int, *, seed: int = 1) -> Iterator[bytes]:
    """Yield pages that lz4 compresses 2:1: the first half of each is random, the rest repeats 64 bytes of it.

    No two pages are alike and none is same-filled, so that every page costs the pool a slot.
    """
    source = random.Random(seed)
    for _ in range(pages):
        noise = source.randbytes(PAGE_SIZE // 2 - _OVERHEAD)
        yield (noise + noise[:64] * (PAGE_SIZE // 64))[:PAGE_SIZE]


def write_half_compressible(path: Path, pages: int, *, seed: int = 1) -> None:
    """Write 2:1 compressible pages into a file."""
    with open(path, "wb") as file:
        file.writelines(half_compressible(pages, seed=seed))


def write_random(path: Path, size: int, *, seed: int = 1) -> None:
    """Write incompressible bytes."""
    source = random.Random(seed)
    with open(path, "wb") as file:
        for start in range(0, size, MIB):
            file.write(source.randbytes(min(MIB, size - start)))


def shuffled(count: int, *, seed: int) -> list[int]:
    """Return the numbers below `count` in a seeded random order."""
    numbers = list(range(count))
    random.Random(seed).shuffle(numbers)
    return numbers


_OVERHEAD = 48  # bytes in which lz4 describes the repeating half: a compressed page is just under 2 KiB
