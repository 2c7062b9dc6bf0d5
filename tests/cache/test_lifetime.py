"""Files that outlive their engine."""

from __future__ import annotations

import gc

from tmem import CacheFrames, Tmem
from tmemfs.cache.memory import Memory


class _Node:
    """Part of a cycle of references."""

    def __init__(self, memory: Memory) -> None:
        self.me = self
        self.memory = memory
        self.file = memory.new_file()


def test_files_in_a_cycle_are_collected_with_their_engine() -> None:
    for _ in range(20):
        _Node(Memory(Tmem(None, cache=CacheFrames(16, 16))))
        gc.collect()


def test_a_file_may_be_dropped_after_its_engine_ended() -> None:
    memory = Memory(Tmem(None, cache=CacheFrames(16, 16)))
    file = memory.new_file()
    memory.close()
    del file
