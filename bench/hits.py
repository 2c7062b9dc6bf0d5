"""What a hit costs: all pages in the cache, against a filesystem that does nothing.

Measured: 4-KiB random reads by four readers (IOPS) and 1-MiB sequential reads by one (bytes a second), through
tmemfs with every page in its cache, against `bench.nullfs` (the faster of its two files). Both sides are mounted at
the same time, read through once before, and measured in turn; the figure is the median of the ratios of the pairs.
Two files are read through tmemfs: one that was filled in order, so that its pages lie side by side in the cache (the
goal is on this one), and one that was filled in random order, the worst case for large reads.

    python -m bench.hits [--pairs 5] [--seconds 2] [--size 64] [--out FILE]
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from bench import fio
from bench.children import BenchError
from bench.content import MIB, PAGE_SIZE, shuffled, write_random
from bench.harness import Mounted, nullfs, tmemfs, workspace
from bench.report import Figures, Goal, Outcome, bars, main, median, parser, ratios, say

RANDOM_GOAL, SEQUENTIAL_GOAL = 0.80, 0.70


@dataclass(frozen=True, slots=True)
class Load:
    """One way of reading."""

    name: str
    pattern: str
    block: int
    jobs: int

    def measure(self, path: Path, seconds: float, seed: int) -> float:
        """Return reads a second for the small block, MiB a second for the large one."""
        done = fio.read(
            path, pattern=self.pattern, block=self.block, jobs=self.jobs, seconds=seconds, seed=seed
        )
        return done.iops if self.block == PAGE_SIZE else done.bytes_per_second / MIB


RANDOM = Load("4-KiB random reads, 4 readers", "randread", PAGE_SIZE, 4)
SEQUENTIAL = Load("1-MiB sequential reads", "read", MIB, 1)


def measure(pairs: int = 5, seconds: float = 2.0, size: int = 64 * MIB) -> Outcome:
    """Measure both loads on all sides in turn."""
    with workspace() as space:
        source = space / "source"
        source.mkdir()
        write_random(source / "ordered", size)
        write_random(source / "scattered", size, seed=2)
        cache = 2 * size + max(16 * MIB, size // 4)  # all fits with room to spare: nothing is ever evicted
        with (
            nullfs(space / "null", size) as null,
            tmemfs(source, space / "mount", cache=cache, pool=256 * MIB) as mount,
        ):
            sides = {
                "null view": null.path / "view",
                "null bytes": null.path / "bytes",
                "ordered": mount.path / "ordered",
                "scattered": mount.path / "scattered",
            }
            _fill_scattered(sides["scattered"])
            for path in sides.values():
                _read_through(path)
            figures: Figures = {}
            for load in (RANDOM, SEQUENTIAL):
                figures[load.name] = _in_turn(load, sides, mount, pairs, seconds)
    return Outcome(_goals(figures), figures)


def _in_turn(load: Load, sides: dict[str, Path], mount: Mounted, pairs: int, seconds: float) -> Figures:
    """Measure every side once a round; return all values and the ratios to the stronger null."""
    say(f"{load.name}: {pairs} rounds over {', '.join(sides)}")
    before = mount.stats()
    values: dict[str, list[float]] = {name: [] for name in sides}
    for pair in range(pairs):
        for name, path in sides.items():
            values[name].append(load.measure(path, seconds, seed=pair + 1))
    if mount.since(before, "cache_misses")["cache_misses"]:
        raise BenchError("pages were missing from the cache: the figures would not be those of hits")
    null = max(("null view", "null bytes"), key=lambda name: median(values[name]))
    say(bars({name: median(found) for name, found in values.items()}, "/s" if load is RANDOM else "MiB/s"))
    against = {name: ratios(values[name], values[null]) for name in ("ordered", "scattered")}
    say("  ratios to " + null + ": " + ", ".join(f"{name} {median(r):.3f}" for name, r in against.items()))
    return {
        "unit": "reads/s" if load is RANDOM else "MiB/s",
        "stronger_null": null,
        "values": values,
        "ratios": against,
        "median_ratios": {name: median(found) for name, found in against.items()},
    }


def _goals(figures: Figures) -> list[Goal]:
    goals = []
    for load, least in ((RANDOM, RANDOM_GOAL), (SEQUENTIAL, SEQUENTIAL_GOAL)):
        ratio = figures[load.name]["median_ratios"]["ordered"]
        what = f"all pages in the cache, {load.name}, against a null filesystem"
        goals.append(Goal(what, f"≥ {least:.2f}×", f"{ratio:.2f}×", ratio >= least))
    return goals


def _read_through(path: Path) -> None:
    with open(path, "rb", buffering=0) as file:
        while file.read(MIB):
            pass


def _fill_scattered(path: Path) -> None:
    """Read every page once in random order."""
    fd = os.open(path, os.O_RDONLY)
    try:
        for page in shuffled(os.fstat(fd).st_size // PAGE_SIZE, seed=3):
            os.pread(fd, PAGE_SIZE, page * PAGE_SIZE)
    finally:
        os.close(fd)


if __name__ == "__main__":
    command = parser(__doc__)
    command.add_argument("--pairs", type=int, default=5)
    command.add_argument("--seconds", type=float, default=2.0, help="how long each side is read in each round")
    command.add_argument("--size", type=int, default=64, help="MiB a file")
    asked = command.parse_args()
    main(asked, lambda: measure(asked.pairs, asked.seconds, asked.size * MIB))
