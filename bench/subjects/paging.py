"""A process that works on more memory than it may have, and knows every byte of it.

It joins a memory cgroup after its imports, so that the limit is for its pages, and obeys one line at a time:

    write [COUNT]    give all pages, or so many, a new content, in a new random order
    check [COUNT]    compare all pages, or so many, with what they should be, in another order

Each answer is a line of JSON: seconds, pages, how many were wrong, and the major faults. No two pages are alike, all
compress 2:1. An end of the input ends it.

    python -m bench.subjects.paging DIRECTORY BYTES [--seed N]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import random
import resource
import select
import struct
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.tools import memcg
from bench.tools.children import BenchError, end, environment
from bench.tools.content import PAGE_SIZE

_END_SECONDS = 20.0
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


@dataclass(frozen=True, slots=True)
class Round:
    """What one pass over all pages was like."""

    seconds: float
    pages: int
    wrong: int
    major_faults: int


class Pager:
    """A running pager."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def begin(self, verb: str) -> None:
        """Have it start `write` or `check`, or `write 100`."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(verb.encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise BenchError(f"the pager is gone: {self._end()}") from None

    def has_answered(self, seconds: float) -> bool:
        """Wait for the answer, and tell whether it is there."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        return bool(ready)

    def finish(self, seconds: float) -> Round:
        """Wait for the answer; BenchError when it takes longer, or when the process is gone."""
        if not self.has_answered(seconds):
            raise BenchError(f"the pager did not answer within {seconds:g} s")
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise BenchError(f"the pager is gone: {self._end()}")
        return Round(**json.loads(line))

    def run(self, verb: str, seconds: float) -> Round:
        """Do one pass."""
        self.begin(verb)
        return self.finish(seconds)

    def _end(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self.process.wait(_END_SECONDS)
            return f"signal {-code} (out of memory?)" if code < 0 else f"status {code}"
        return "it does not end"


@contextlib.contextmanager
def pager(cgroup: Path, size: int, *, seed: int = 1) -> Iterator[Pager]:
    """Start a pager; it is ended afterwards, killed if need be."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.subjects.paging", os.fspath(cgroup), str(size), "--seed", str(seed)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        env=environment(),
        start_new_session=True,
    )
    try:
        yield Pager(process)
    finally:
        process.kill()  # what it holds in swap is of no use to anybody
        end(process, patience=_END_SECONDS)
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


def vmstat() -> dict[str, int]:
    """Return the machine's counters of pages swapped in and out."""
    values = {}
    for line in Path("/proc/vmstat").read_text().splitlines():
        name, _, value = line.partition(" ")
        if name in ("pswpin", "pswpout"):
            values[name] = int(value)
    return values


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
