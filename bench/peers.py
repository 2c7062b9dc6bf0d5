"""tmemfs beside its peers, over one and the same slow directory, in turn in one run.

Measured through the slow directory itself; bindfs and rclone mount (with its vfs cache) from the distribution;
libfuse's passthrough_hp where it is on the PATH; a null pyfuse3 filesystem, which reads nothing and is the floor; and
tmemfs: 4-KiB random reads with 1 and 4 readers (fio, reads a second), 128-KiB and 1-MiB sequential reads (MiB a second)
and stat of names (calls a second). *Cold* is the first time that a file is read, *warm* the time after it was read
whole. The slow directory is a tmemfs mount with a throttle, the smallest cache, no pool and nothing believed for longer
than a moment, so that all the others meet the same delays.

bindfs, rclone and passthrough_hp have the kernel's page cache, as large as the machine's free memory, and rclone a
directory on disk; tmemfs keeps to its `--cache` and `--pool`, and its warm pages come from both. rclone believes
names for five minutes by default, tmemfs is told to believe them for one.

    python -m bench.peers [--seconds 1] [--latency 2ms] [--size 24] [--out FILE]
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.tools import draw, fio, pages
from bench.tools.children import BenchError
from bench.tools.content import MIB, PAGE_SIZE, shuffled, write_half_compressible
from bench.tools.harness import fast_workspace, nullfs, served, tmemfs
from bench.tools.report import Figures, Goal, Outcome, main, parser, say

PEERS = ("plain, throttled", "bindfs", "rclone", "passthrough_hp", "null", "tmemfs")
NAMES = 200
# Each has a file of its own, called as the load; a number of readers, or bytes a read.
LOADS = {
    "4-KiB random, 1 reader": ("random", 1),
    "4-KiB random, 4 readers": ("random", 4),
    "128-KiB sequential": ("sequential", MIB // 8),
    "1-MiB sequential": ("sequential", MIB),
}
STAT = "stat of a name"
STATES = ("cold", "warm")
CACHE_SHARE = 4  # the cache holds a quarter of a file, the pool all of them


@contextlib.contextmanager
def _program(name: str, place: Path, *words: str | Path) -> Iterator[Path]:
    """Mount by a program in the foreground."""
    if shutil.which(name) is None:
        raise BenchError(f"{name} is not on the PATH")
    with served([name, *words], place) as mount:
        yield mount.path


@contextlib.contextmanager
def _peer(name: str, space: Path, slow: Path, size: int) -> Iterator[Path]:
    """Mount one of the PEERS over the slow directory, and give the directory to read."""
    place = space / name
    with contextlib.ExitStack() as stack:
        if name == "plain, throttled":
            yield slow
        elif name == "bindfs":
            yield stack.enter_context(_program("bindfs", place, "-f", slow, place))
        elif name == "rclone":
            words = (
                "mount",
                slow,
                place,
                "--vfs-cache-mode",
                "full",
                "--cache-dir",
                space / "vfs",
                "--config",
                "/dev/null",
            )
            yield stack.enter_context(_program("rclone", place, *words))
        elif name == "passthrough_hp":
            yield stack.enter_context(_program("passthrough_hp", place, "--foreground", slow, place))
        elif name == "null":
            yield stack.enter_context(nullfs(place, size, NAMES)).path
        else:
            yield stack.enter_context(
                tmemfs(slow, place, "--attr-timeout", "60s", cache=max(MIB, size // CACHE_SHARE), pool=4 * size)
            ).path


def measure(seconds: float = 1.0, latency: str = "2ms", size: int = 24 * MIB, only: Sequence[str] = PEERS) -> Outcome:
    """Measure every load through every peer."""
    figures: Figures = {"unit": "reads/s, MiB/s, calls/s", "loads": {}, "skipped_peers": {}, "notes": []}
    with fast_workspace() as space:
        source, slow = space / "source", space / "slow"
        source.mkdir()
        for number, name in enumerate(LOADS):
            write_half_compressible(source / name, size // PAGE_SIZE, seed=number + 1)
        for number in range(NAMES):
            (source / f"{number:06d}").touch()
        with tmemfs(source, slow, "--throttle", f"latency={latency}", "--attr-timeout", "0", cache=MIB, pool=0):
            for peer in only:
                try:
                    with _peer(peer, space, slow, size) as place:
                        _measure_one(figures["loads"], peer, place, seconds)
                except BenchError as error:
                    figures["skipped_peers"][peer] = str(error)
                    figures["notes"].append(f"{peer} was skipped: {error}")
                    say(f"  {peer}: skipped: {error}")
    return Outcome(_goals(figures), figures)


def _measure_one(loads: Figures, peer: str, place: Path, seconds: float) -> None:
    """Run every load, cold and warm."""
    for load, (what, number) in LOADS.items():
        file = place / ("view" if peer == "null" else load)
        for state in STATES:
            if what == "random":
                if state == "warm":
                    pages.in_order(file, shuffled(file.stat().st_size // MIB, seed=4), MIB)
                rate = fio.read(file, pattern="randread", block=PAGE_SIZE, jobs=number, seconds=seconds).iops
            else:
                done = pages.sequentially(file, number)
                rate = done.pages * PAGE_SIZE / MIB / done.seconds
            loads.setdefault(f"{load}, {state}", {})[peer] = rate
    for state in STATES:
        loads.setdefault(f"{STAT}, {state}", {})[peer] = _stats(place)
    say(f"  {peer:<17} " + ", ".join(f"{load}: {rates[peer]:,.0f}" for load, rates in loads.items()))


def _stats(place: Path) -> float:
    """Ask for the attributes of every name once."""
    began = time.perf_counter()
    for number in range(NAMES):
        os.stat(place / f"{number:06d}")
    return NAMES / (time.perf_counter() - began)


def _goals(figures: Figures) -> list[Goal]:
    """Report tmemfs against each peer in every load; there are no goals, only what it is."""
    goals = []
    for load, rates in figures["loads"].items():
        ours = rates.get("tmemfs", 0.0)
        against = ", ".join(f"{ours / rate:.2g}× {peer}" for peer, rate in rates.items() if peer != "tmemfs" and rate)
        goals.append(Goal(f"tmemfs, {load}", "reported as it is", against, None))
    return goals


def picture(figures: Figures, path: Path) -> None:
    """Draw all rates."""
    title = "Over one slow directory: reads/s, MiB/s (sequential), calls/s (stat); more is better"
    draw.bars(path, title, figures["loads"], "a second", log=True)


if __name__ == "__main__":
    command = parser(__doc__)
    command.add_argument("--seconds", type=float, default=1.0, help="of each random load")
    command.add_argument("--latency", default="2ms", help="of the slow directory")
    command.add_argument("--size", type=int, default=24, help="MiB of each file")
    asked = command.parse_args()
    main(asked, lambda: measure(asked.seconds, asked.latency, asked.size * MIB), picture)
