"""A process that works on more memory than it may have, and knows every byte of it.

It joins a memory cgroup after its imports, so that the limit is for its pages, and obeys one line at a time:

    write [COUNT]    give all pages, or so many, a new content, in a new random order
    check [COUNT]    compare all pages, or so many, with what they should be, in another order

Each answer is a line of JSON: seconds, pages, how many were wrong, and the major faults. No two pages are alike, all
compress 2:1. An end of the input ends it.

    python -m bench.subjects.pager DIRECTORY BYTES [--seed N]
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import resource
import struct
import sys
import time
from array import array
from pathlib import Path

from bench.tools import memcg

PAGE_SIZE = 4096
_HEADER = struct.Struct("<QQQ")
_BLOCKS = 64
_NOISE = 2000


class Pages:
    """The memory, and what should be in it."""

    def __init__(self, size: int, seed: int) -> None:
        self._random = random.Random(seed)
        self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory.madvise(mmap.MADV_NOHUGEPAGE)
        self._order = list(range(size // PAGE_SIZE))
        self._blocks = []
        for _ in range(_BLOCKS):
            noise = self._random.randbytes(_NOISE)
            self._blocks.append((noise + noise[:64] * PAGE_SIZE)[: PAGE_SIZE - _HEADER.size])
        self._seed = seed
        self._rounds = array("I", bytes(4 * len(self._order)))

    def __len__(self) -> int:
        """Return the number of pages."""
        return len(self._order)

    def _content(self, page: int) -> bytes:
        number = self._rounds[page]
        if not number:
            return bytes(PAGE_SIZE)
        return _HEADER.pack(self._seed, number, page) + self._blocks[(page + number) % _BLOCKS]

    def write(self, count: int) -> int:
        """Write so many pages anew."""
        self._random.shuffle(self._order)
        memory = self._memory
        for page in self._order[:count]:
            self._rounds[page] += 1
            memory[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = self._content(page)
        return 0

    def check(self, count: int) -> int:
        """Compare so many pages; return how many are wrong."""
        self._random.shuffle(self._order)
        memory, wrong = self._memory, 0
        for page in self._order[:count]:
            wrong += memory[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] != self._content(page)
        return wrong


def main() -> None:
    """Obey."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cgroup", type=Path)
    parser.add_argument("size", type=int)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    pages = Pages(asked.size, asked.seed)
    memcg.join(asked.cgroup, os.getpid())
    verbs = {"write": pages.write, "check": pages.check}
    for line in sys.stdin:
        verb, _, count = line.strip().partition(" ")
        faults, began = _faults(), time.perf_counter()
        wrong = verbs[verb](int(count or len(pages)))
        seconds = time.perf_counter() - began
        answer = {
            "seconds": seconds,
            "pages": int(count or len(pages)),
            "wrong": wrong,
            "major_faults": _faults() - faults,
        }
        print(json.dumps(answer), flush=True)


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


if __name__ == "__main__":
    main()
