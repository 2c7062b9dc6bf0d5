"""Slabs that stay resident while they are out."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

from tests.tmem.faultysource import page_of
from tmem import SLAB_SIZE, EmbeddedArena, Tmem
from tmem.resident import ResidentSlabs


def mapped_bytes(fd: int) -> int:
    """Return how many bytes of a memfd this process has mapped; a page that is mapped twice counts once."""
    inode = os.fstat(fd).st_ino
    total, within = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            within = line.split()[4] == str(inode) and "/memfd:" in line
        elif within and line.startswith("Pss:"):
            total += int(line.split()[1]) << 10
    return total


def test_each_slab_that_is_out_is_faulted_in_and_a_released_one_is_gone() -> None:
    arena = EmbeddedArena(4 * SLAB_SIZE)
    slabs = ResidentSlabs(arena)
    assert mapped_bytes(arena.fd) == 0
    first, second = slabs.acquire(True), slabs.acquire(False)
    assert first is not None
    assert second is not None
    assert mapped_bytes(arena.fd) == 2 * SLAB_SIZE
    slabs.release(first, True)
    assert mapped_bytes(arena.fd) == SLAB_SIZE
    arena.check()
    assert slabs.capacity == arena.capacity


def test_an_exhausted_source_gives_no_slab() -> None:
    slabs = ResidentSlabs(EmbeddedArena(SLAB_SIZE))
    assert slabs.acquire(True) == 0
    assert slabs.acquire(True) is None


def test_no_slab_is_acquired_that_may_not_be_populated() -> None:
    arena = EmbeddedArena(4 * SLAB_SIZE)
    room = [2 * SLAB_SIZE]

    def may(size: int) -> bool:
        return arena.slabs_out * SLAB_SIZE + size <= room[0]

    slabs = ResidentSlabs(arena, may)
    assert [slabs.acquire(True) for _ in range(4)] == [0, 1, None, None]
    assert mapped_bytes(arena.fd) == room[0]
    room[0] = 3 * SLAB_SIZE
    deadline = time.monotonic() + 30
    while slabs.acquire(True) is None:
        assert time.monotonic() < deadline, "the limit is checked again after a moment"
    assert arena.slabs_out == 3


def test_a_pool_works_on_resident_slabs() -> None:
    arena = EmbeddedArena(4 * SLAB_SIZE)
    tmem = Tmem(ResidentSlabs(arena))
    pool = tmem.new_pool(persistent=True)
    kept = {index: page_of(index, 2000) for index in range(200) if pool.put(1, index, page_of(index, 2000))}
    assert len(kept) > 50
    assert mapped_bytes(arena.fd) == tmem.stats().lent_bytes > SLAB_SIZE
    assert all(pool.get(1, index) == page for index, page in kept.items())
    pool.destroy()
    tmem.give_up(4)
    assert mapped_bytes(arena.fd) == 0
    tmem.check()
    arena.check()
