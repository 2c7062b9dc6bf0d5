"""Measure what a hit in the cache costs, against a filesystem that does nothing.

4-KiB random reads by four readers and 1-MiB sequential reads by one, through tmemfs with every page in its cache and
through `bench.subjects.nullfs` (the faster of its two files). Both are mounted at the same time, read through once, and
measured in turn. The figure is the median of the ratios of the rounds with its interval (bench/tools/verdict.py).

The goals are on a file that was filled in order, so that its pages lie side by side in the cache. A file that was
filled in random order is the worst case for large reads. tmemfs makes pyfuse3 read requests in a faster way
(`tmemfs.kernel.eager`), so a null filesystem that does the same is measured, too. The server's processor time a read
varies less on a shared machine, and is reported.

    python -m bench.hits [--pairs 7] [--seconds 1] [--size 64] [--out FILE]
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bench.tools import fio, pages, procmem
from bench.tools.children import BenchError
from bench.tools.content import MIB, PAGE_SIZE, shuffled, write_random
from bench.tools.harness import Mounted, nullfs, tmemfs, workspace
from bench.tools.report import Figures, Goal, Outcome, main, median, medians, parser, ratios, say
from bench.tools.verdict import in_turn, spread

RANDOM_GOAL, SEQUENTIAL_GOAL = 0.80, 0.70


@dataclass(frozen=True, slots=True)
class Sample:
    """The result of one side in one round."""

    rate: float  # reads a second for the small block, MiB a second for the large one
    processor: float  # microseconds of the serving process a read


@dataclass(frozen=True, slots=True)
class Load:
    """One way of reading."""

    name: str
    pattern: str
    block: int
    jobs: int

    def measure(self, path: Path, pid: int, seconds: float, seed: int) -> Sample:
        """Read for a while from a file that process `pid` serves."""
        used = procmem.run_seconds(pid)
        done = fio.read(path, pattern=self.pattern, block=self.block, jobs=self.jobs, seconds=seconds, seed=seed)
        used = procmem.run_seconds(pid) - used
        rate = done.iops if self.block == PAGE_SIZE else done.bytes_per_second / MIB
        return Sample(rate, 1e6 * used / max(done.reads, 1))


RANDOM = Load("4-KiB random reads, 4 readers", "randread", PAGE_SIZE, 4)
SEQUENTIAL = Load("1-MiB sequential reads", "read", MIB, 1)


def measure(pairs: int = 7, seconds: float = 1.0, size: int = 64 * MIB) -> Outcome:
    """Measure both loads on all sides in turn."""
    with workspace() as space:
        source = space / "source"
        source.mkdir()
        write_random(source / "ordered", size)
        write_random(source / "scattered", size, seed=2)
        cache = 2 * size + max(16 * MIB, size // 4)  # everything fits: nothing is evicted
        with (
            nullfs(space / "null", size) as null,
            nullfs(space / "eager", size, eager=True) as eager,
            tmemfs(source, space / "mount", cache=cache, pool=256 * MIB) as mount,
        ):
            sides = {f"null {name}": (null.path / name, null.pid) for name in ("view", "bytes")}
            sides["eager null"] = (eager.path / "view", eager.pid)
            sides |= {name: (mount.path / name, mount.pid) for name in ("ordered", "scattered")}
            _fill_scattered(mount.path / "scattered")
            for path, _ in sides.values():
                pages.sequentially(path)
            figures: Figures = {}
            for load in (RANDOM, SEQUENTIAL):
                figures[load.name] = _in_turn(load, sides, mount, pairs, seconds)
    return Outcome(_goals(figures), figures)


def _in_turn(load: Load, sides: dict[str, tuple[Path, int]], mount: Mounted, pairs: int, seconds: float) -> Figures:
    """Measure every side once a round; return all values and the ratios to the stronger null."""
    say(f"{load.name}: {pairs} rounds over {', '.join(sides)}")
    before = mount.stats()
    samples: dict[str, list[Sample]] = {name: [] for name in sides}
    for pair in range(pairs):
        for name, (path, pid) in in_turn(sides.items(), pair):
            samples[name].append(load.measure(path, pid, seconds, seed=pair + 1))
    if mount.since(before, "cache_misses")["cache_misses"]:
        raise BenchError("pages were missing from the cache: the figures would not be those of hits")
    values = {name: [sample.rate for sample in found] for name, found in samples.items()}
    processor = {name: median([sample.processor for sample in found]) for name, found in samples.items()}
    null = max(("null view", "null bytes"), key=lambda name: median(values[name]))
    say(medians(values, "/s" if load is RANDOM else "MiB/s"))
    against = {name: ratios(values[name], values[null]) for name in ("ordered", "scattered")}
    against["ordered, to the eager null"] = ratios(values["ordered"], values["eager null"])
    say(f"  ratios to {null}: " + ", ".join(f"{name} {spread(r).text('.2f', '×')}" for name, r in against.items()))
    say("  processor µs a read: " + ", ".join(f"{name} {used:.1f}" for name, used in processor.items()))
    return {
        "unit": "reads/s" if load is RANDOM else "MiB/s",
        "stronger_null": null,
        "values": values,
        "ratios": against,
        "processor_microseconds_a_read": processor,
    }


def _goals(figures: Figures) -> list[Goal]:
    goals = []
    for load, goal in ((RANDOM, RANDOM_GOAL), (SEQUENTIAL, SEQUENTIAL_GOAL)):
        found = figures[load.name]["ratios"]
        ratio, eager = spread(found["ordered"]), spread(found["ordered, to the eager null"])
        what = f"all pages in the cache, {load.name}, against a null filesystem"
        goals.append(Goal(what, f"≥ {goal:.2f}×", ratio.text(".2f", "×"), ratio.at_least(goal)))
        goals.append(Goal(f"{what} that reads requests as tmemfs does", "–", eager.text(".2f", "×")))
    return goals


def _fill_scattered(path: Path) -> None:
    """Read every page once in random order."""
    count = path.stat().st_size // PAGE_SIZE
    pages.in_order(path, shuffled(count, seed=3))


if __name__ == "__main__":
    command = parser(__doc__)
    command.add_argument("--pairs", type=int, default=7)
    command.add_argument("--seconds", type=float, default=1.0, help="of each side in each round")
    command.add_argument("--size", type=int, default=64, help="MiB a file")
    asked = command.parse_args()
    main(asked, lambda: measure(asked.pairs, asked.seconds, asked.size * MIB))
