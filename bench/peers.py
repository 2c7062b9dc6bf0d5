"""Measure tmemfs against other filesystems over one slow directory.

The peers are the slow directory itself, bindfs, and rclone mount with its vfs cache. The loads are 4-KiB random reads
with 1 and 4 readers (reads a second), and 128-KiB and 1-MiB sequential reads (MiB a second). *Cold* is the first read
of a file, *warm* a read after the whole file was read. All are mounted at the same time and measured in turn, with new
files in each round. The figures are medians of the rounds' ratios (lowest to highest).

The slow directory is a tmemfs mount with a throttle, the smallest cache, no pool and no attribute time-out, so all
peers meet the same delays. bindfs and rclone use the kernel's page cache, as large as free memory, and rclone a
directory on disk; tmemfs keeps to its `--cache` and `--pool`. rclone caches names for five minutes, tmemfs here for
one.

    python -m bench.peers [--rounds 3] [--seconds 0.3] [--latency 2ms] [--size 8] [--out FILE]
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.tools import fio, pages
from bench.tools.children import BenchError
from bench.tools.content import MIB, PAGE_SIZE, shuffled, write_half_compressible
from bench.tools.harness import fast_workspace, served, tmemfs
from bench.tools.report import Figures, Goal, Outcome, main, parser, ratios, say
from bench.tools.verdict import in_turn, spread

OURS = "tmemfs"
PEERS = ("plain, throttled", "bindfs", "rclone", OURS)
# Each has its own file in each round: number of readers, or bytes a read.
LOADS = {
    "4-KiB random, 1 reader": ("random", 1),
    "4-KiB random, 4 readers": ("random", 4),
    "128-KiB sequential": ("sequential", MIB // 8),
    "1-MiB sequential": ("sequential", MIB),
}
STATES = ("cold", "warm")
CACHE_SHARE = 4  # the cache holds a quarter of a file, the pool all of them


@contextlib.contextmanager
def _program(name: str, place: Path, *words: str | Path) -> Iterator[Path]:
    """Mount with a program that stays in the foreground."""
    if shutil.which(name) is None:
        raise BenchError(f"{name} is not on the PATH")
    with served([name, *words], place) as mount:
        yield mount.path


@contextlib.contextmanager
def _peer(name: str, space: Path, slow: Path, size: int) -> Iterator[Path]:
    """Mount one of the PEERS over the slow directory; yield the directory to read."""
    place = space / name
    with contextlib.ExitStack() as stack:
        if name == "plain, throttled":
            yield slow
        elif name == "bindfs":
            yield stack.enter_context(_program("bindfs", place, "-f", slow, place))
        elif name == "rclone":
            options = ("--vfs-cache-mode", "full", "--cache-dir", space / "vfs", "--config", "/dev/null")
            yield stack.enter_context(_program("rclone", place, "mount", slow, place, *options))
        else:
            yield stack.enter_context(
                tmemfs(slow, place, "--attr-timeout", "60s", cache=max(MIB, size // CACHE_SHARE), pool=4 * size)
            ).path


def measure(
    rounds: int = 3, seconds: float = 0.3, latency: str = "2ms", size: int = 8 * MIB, only: Sequence[str] = PEERS
) -> Outcome:
    """Measure every load through every peer."""
    figures: Figures = {"unit": "reads/s, MiB/s", "loads": {}, "skipped_peers": {}, "notes": []}
    with fast_workspace() as space, contextlib.ExitStack() as stack:
        source, slow = space / "source", space / "slow"
        for number in range(rounds):
            _make_files(source / str(number), size, seed=10 * number)
        throttle = f"latency={latency}"
        stack.enter_context(tmemfs(source, slow, "--throttle", throttle, "--attr-timeout", "0", cache=MIB, pool=0))
        places: dict[str, Path] = {}
        for peer in only:
            try:
                places[peer] = stack.enter_context(_peer(peer, space, slow, size))
            except BenchError as error:
                figures["skipped_peers"][peer] = str(error)
                figures["notes"].append(f"{peer} was skipped: {error}")
                say(f"  {peer}: skipped: {error}")
        for number in range(rounds):
            for peer, place in in_turn(places.items(), number):
                _measure_one(figures["loads"], peer, place, number, seconds)
    return Outcome(_goals(figures), figures)


def _make_files(directory: Path, size: int, seed: int) -> None:
    """Write the files of a round."""
    directory.mkdir(parents=True)
    for number, name in enumerate(LOADS):
        write_half_compressible(directory / name, size // PAGE_SIZE, seed=seed + number)


def _measure_one(loads: Figures, peer: str, mount: Path, number: int, seconds: float) -> None:
    """Run every load, cold and warm."""
    rates = {}
    for load, (what, count) in LOADS.items():
        file = mount / str(number) / load
        for state in STATES:
            if what == "random":
                if state == "warm":
                    pages.in_order(file, shuffled(file.stat().st_size // MIB, seed=4), MIB)
                rate = fio.read(file, pattern="randread", block=PAGE_SIZE, jobs=count, seconds=seconds).iops
            else:
                done = pages.sequentially(file, count)
                rate = done.pages * PAGE_SIZE / MIB / done.seconds
            rates[f"{load}, {state}"] = rate
    for name, rate in rates.items():
        loads.setdefault(name, {}).setdefault(peer, []).append(rate)
    say(f"  {peer:<17} " + ", ".join(f"{load}: {rate:,.0f}" for load, rate in rates.items()))


def _goals(figures: Figures) -> list[Goal]:
    """Return the ratios to each peer in every load; nothing is judged."""
    goals = []
    for load, rates in figures["loads"].items():
        against = {peer: spread(ratios(rates[OURS], theirs)) for peer, theirs in rates.items() if peer != OURS}
        text = "; ".join(f"{ratio.text('.2g', '×')} {peer}" for peer, ratio in against.items())
        goals.append(Goal(f"tmemfs, {load}", "–", text))
    return goals


if __name__ == "__main__":
    command = parser(__doc__)
    command.add_argument("--rounds", type=int, default=3)
    command.add_argument("--seconds", type=float, default=0.3, help="of each random load")
    command.add_argument("--latency", default="2ms", help="of the slow directory")
    command.add_argument("--size", type=int, default=8, help="MiB of each file")
    asked = command.parse_args()
    main(asked, lambda: measure(asked.rounds, asked.seconds, asked.latency, asked.size * MIB))
