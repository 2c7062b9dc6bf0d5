"""Run a process that works on more memory than it may have, and checks every byte of it.

The process joins a memory cgroup after its imports, so that the limit is for its pages. It reads commands, one a line:

    write [COUNT]    write new content to all pages, or to COUNT, in a new random order
    check [COUNT]    compare all pages, or COUNT, with what was written, in another order

It answers each with a line of JSON: seconds, pages, how many were wrong, major faults. No two pages are alike; all
compress 2:1. It ends at the end of its input.

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
    """The memory, and its expected content."""

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
        """Write new content to `count` pages."""
        self._random.shuffle(self._order)
        memory = self._memory
        for page in self._order[:count]:
            self._rounds[page] += 1
            memory[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = self._content(page)
        return 0

    def check(self, count: int) -> int:
        """Compare `count` pages; return how many are wrong."""
        self._random.shuffle(self._order)
        memory, wrong = self._memory, 0
        for page in self._order[:count]:
            wrong += memory[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] != self._content(page)
        return wrong


@dataclass(frozen=True, slots=True)
class Round:
    """The answer to one command."""

    seconds: float
    pages: int
    wrong: int
    major_faults: int


class Pager:
    """The running process, seen from outside."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def begin(self, verb: str) -> None:
        """Send a command."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(verb.encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise BenchError(f"the pager is gone: {self._end()}") from None

    def has_answered(self, seconds: float) -> bool:
        """Wait up to `seconds` for the answer; return whether it is there."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        return bool(ready)

    def finish(self, seconds: float) -> Round:
        """Return the answer; BenchError when it takes longer than `seconds` or the process is gone."""
        if not self.has_answered(seconds):
            raise BenchError(f"the pager did not answer within {seconds:g} s")
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise BenchError(f"the pager is gone: {self._end()}")
        return Round(**json.loads(line))

    def run(self, verb: str, seconds: float) -> Round:
        """Send a command and return its answer."""
        self.begin(verb)
        return self.finish(seconds)

    def _end(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self.process.wait(_END_SECONDS)
            return f"signal {-code} (out of memory?)" if code < 0 else f"status {code}"
        return "it does not end"


@contextlib.contextmanager
def pager(cgroup: Path, size: int, *, seed: int = 1) -> Iterator[Pager]:
    """Start the process in a cgroup; kill it afterwards."""
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
        process.kill()  # nothing in its memory is needed
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
    """Read commands and answer them."""
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
