"""Drive a `bench.subjects.pager` from outside: one line to it, one answer back, in bounded time."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.tools.children import BenchError, end, environment

_END_SECONDS = 20.0


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
        [sys.executable, "-m", "bench.subjects.pager", os.fspath(cgroup), str(size), "--seed", str(seed)],
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
