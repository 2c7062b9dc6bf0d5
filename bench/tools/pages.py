"""Read files page by page with one reader, and time the reads."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.tools.children import BenchError
from bench.tools.content import MIB, PAGE_SIZE
from bench.tools.report import median


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass over some pages."""

    pages: int
    seconds: float
    median_seconds: float  # of one read call

    @property
    def mean_seconds(self) -> float:
        """Seconds a page, with the work behind the replies."""
        return self.seconds / self.pages


def in_order(path: Path, order: Sequence[int], block: int = PAGE_SIZE) -> Pass:
    """Read the blocks with these numbers; a block is a page unless `block` gives other bytes."""
    buffer = bytearray(block)
    target, clock = [memoryview(buffer)], time.perf_counter
    times: list[float] = []
    fd = os.open(path, os.O_RDONLY)
    try:
        began = before = clock()
        for number in order:
            if os.preadv(fd, target, number * block) != block:
                raise BenchError(f"block {number} of {path.name} came back short")
            now = clock()
            times.append(now - before)
            before = now
    finally:
        os.close(fd)
    return Pass(len(order) * (block // PAGE_SIZE), before - began, median(times))


def sequentially(path: Path, block: int = MIB) -> Pass:
    """Read a file from start to end, `block` bytes at a time."""
    began = time.perf_counter()
    pages, times = 0, []
    with open(path, "rb", buffering=0) as file:
        before = began
        while data := file.read(block):
            pages += (len(data) + PAGE_SIZE - 1) // PAGE_SIZE
            now = time.perf_counter()
            times.append(now - before)
            before = now
    return Pass(pages, before - began, median(times))
