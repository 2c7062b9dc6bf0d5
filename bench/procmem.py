"""Tell how much memory a process takes: its share of pages, and the slabs behind its memfds."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one process."""

    pss: int  # proportional set size of everything mapped
    memfd: int  # blocks behind its memfds, which it never maps

    @property
    def total(self) -> int:
        """All of it."""
        return self.pss + self.memfd


def of(pid: int) -> Memory:
    """Measure a process of ours."""
    pss = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            pss = int(line.split()[1]) << 10
    return Memory(pss, _memfd_bytes(pid))


def _memfd_bytes(pid: int) -> int:
    """Add up the blocks of each memfd once, however many descriptors it has."""
    blocks: dict[int, int] = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            if os.readlink(entry).startswith("/memfd:"):
                found = entry.stat()
                blocks[found.st_ino] = found.st_blocks * 512
    return sum(blocks.values())


def run_seconds(pid: int) -> float:
    """Return the processor time of a process, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main_thread_seconds(pid: int) -> float:
    """Return the processor time of a process's first thread, to the nanosecond: for those that hardly run."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
