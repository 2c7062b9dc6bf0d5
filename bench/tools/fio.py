"""Run fio and parse its output."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.tools.children import BenchError, run


@dataclass(frozen=True, slots=True)
class Reads:
    """The result of one run of fio."""

    iops: float
    bytes_per_second: float
    latency_p50: float  # seconds, of a whole read call
    latency_p99: float
    reads: int
    seconds: float  # of the reads alone


# JSON output, and nothing that makes start and end longer (0.7 s otherwise).
COMMAND = (
    "fio",
    "--output-format=json",
    "--disk_util=0",
    "--clocksource=clock_gettime",
    "--eta=never",
    "--readonly",
    "--ioengine=psync",
    "--norandommap",  # a map of blocks costs processor time
    "--invalidate=0",
    "--group_reporting",
)


def read(path: Path, *, pattern: str, block: int, jobs: int = 1, seconds: float, seed: int = 1) -> Reads:
    """Read a file for `seconds` by synchronous readers; `pattern` is read or randread, `block` is bytes."""
    output = run(
        [
            *COMMAND,
            "--name=bench",
            f"--filename={path}",
            f"--rw={pattern}",
            f"--bs={block}",
            f"--numjobs={jobs}",
            f"--size={path.stat().st_size}",
            "--time_based",
            f"--runtime={seconds}",
            f"--randseed={seed}",
        ],
        seconds=seconds + 60,
    )
    return parse(output)


def parse(output: bytes) -> Reads:
    """Parse fio's JSON; warnings may precede it."""
    report: dict[str, Any] = json.loads(output[output.index(b"{") :])
    job = report["jobs"][0]
    if job["error"]:
        raise BenchError(f"fio reports error {job['error']}")
    side = job["read"]
    p50, p99 = (side["clat_ns"]["percentile"][place] / 1e9 for place in ("50.000000", "99.000000"))
    return Reads(side["iops"], side["bw_bytes"], p50, p99, side["total_ios"], side["runtime"] / 1e3)
