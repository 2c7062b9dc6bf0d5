"""What the pool costs where it cannot help: a scan that is used once, and a working set that fits the cache.

Measured: the same reads through a mount with a pool and one with `--pool none`, both over the same backing, in turn
and in the other order in every second pair; the figure is the median of the ratios of the pairs. On backings with
5 ms and 0.5 ms a request and an unthrottled one. Two scans read a file of several times the cache from start to end,
1 MiB and 128 KiB at a time; a third reads pages in a seeded random order, 4 KiB at a time, each once, through a small
cache that is full before. Before each, both sides drop what they hold, so nothing is ever read twice. The working set
is read at random, 4 KiB at a time, from the cache, three quarters of which it takes. The source is in memory where the
machine has a tmpfs: what is slow is the throttle, and it is equally slow on both sides. The processor time of the
serving processes, and the best time of each side against the other's, are reported too: they say the same with less
noise where others use the machine.

    python -m bench.cost [--pairs 9] [--cache 64] [--times 4] [--only LOAD …] [--out FILE]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.tools import draw, pages, procmem
from bench.tools.content import MIB, PAGE_SIZE, shuffled, write_half_compressible
from bench.tools.harness import Mounted, fast_workspace, tmemfs
from bench.tools.report import Figures, Goal, Outcome, main, median, parser, ratios, say

GOAL = 3.0  # percent
BACKINGS = {"5 ms": "latency=5ms", "0.5 ms": "latency=0.5ms", "unthrottled": ""}
JUDGED = ("5 ms", "0.5 ms")
RANDOM_CACHE = MIB
RANDOM_PAGES = {"5 ms": 160, "0.5 ms": 1000, "unthrottled": 2000}  # beyond those that fill the cache
COUNTED = ("precache_puts", "precache_passed", "precache_dropped", "precache_succ_gets", "backing_pages")


@dataclass(frozen=True, slots=True)
class Load:
    """One way of reading `file`, once for each pair; `prepare` runs before and is not timed."""

    file: str
    prepare: Callable[[Mounted, Path, int], None]
    read: Callable[[Path, int], pages.Pass]
    small: bool = False


def measure(pairs: int = 9, cache: int = 64 * MIB, times: int = 4, only: Sequence[str] = ()) -> Outcome:
    """Measure every load on every backing."""
    figures: Figures = {"cache_bytes": cache, "scan_bytes": times * cache, "loads": {}}
    with fast_workspace() as space:
        source = space / "source"
        source.mkdir()
        write_half_compressible(source / "scan", times * cache // PAGE_SIZE)
        write_half_compressible(source / "fits", cache * 3 // 4 // PAGE_SIZE, seed=2)
        for backing, throttle in BACKINGS.items():
            options = ("--throttle", throttle) if throttle else ()
            loads = {name: load for name, load in _loads(RANDOM_PAGES[backing]).items() if not only or name in only}
            for small, size in ((False, cache), (True, RANDOM_CACHE)):
                chosen = {name: load for name, load in loads.items() if load.small == small}
                with (
                    tmemfs(source, space / "pool", *options, cache=size, pool=4 * cache) as pool,
                    tmemfs(source, space / "none", *options, cache=size, pool=0) as none,
                ):
                    for name, load in chosen.items():
                        found = _in_turn({"with a pool": pool, "no pool": none}, load, pairs)
                        figures["loads"].setdefault(name, {})[backing] = found
                        slower, busier = found["slower_percent"], found["busier_percent"]
                        best = found["best_slower_percent"]
                        say(
                            f"{backing:<12} {name:<28} {slower:+6.1f} % slower (best of each side {best:+.1f} %),"
                            f" {busier:+6.1f} % processor time"
                        )
    return Outcome(_goals(figures), figures)


def _loads(random_pages: int) -> dict[str, Load]:
    """Return how the files are read, by name."""

    def drop(mount: Mounted, path: Path, pair: int) -> None:
        mount.control("drop_caches", "1")

    def fill(mount: Mounted, path: Path, pair: int) -> None:
        # From other pages than are measured, at random, so that none of them passes as a stream's does.
        mount.control("drop_caches", "1")
        mount.control("cache_size", str(RANDOM_CACHE))
        pages.in_order(path, shuffled(path.stat().st_size // (16 * PAGE_SIZE), seed=pair)[:24], 16 * PAGE_SIZE)

    def twice(mount: Mounted, path: Path, pair: int) -> None:
        for _ in range(2 if pair == 1 else 0):
            pages.sequentially(path)

    def at_random(path: Path, pair: int) -> pages.Pass:
        order = shuffled(path.stat().st_size // PAGE_SIZE, seed=1000 + pair)
        return pages.in_order(path, order[:random_pages])

    def all_of_it(path: Path, pair: int) -> pages.Pass:
        return pages.in_order(path, shuffled(path.stat().st_size // PAGE_SIZE, seed=pair))

    return {
        "scan, 1-MiB reads": Load("scan", drop, lambda path, _: pages.sequentially(path)),
        "scan, 128-KiB reads": Load("scan", drop, lambda path, _: pages.sequentially(path, MIB // 8)),
        "fits the cache, 4 KiB": Load("fits", twice, all_of_it),
        "scan, 4 KiB in random order": Load("scan", fill, at_random, small=True),
    }


def _in_turn(sides: dict[str, Mounted], load: Load, pairs: int) -> Figures:
    """Run both sides in turn, the second first in every other pair."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    processor: dict[str, list[float]] = {side: [] for side in sides}
    counted: list[dict[str, int]] = []
    for pair in range(1, pairs + 1):
        for side in sides if pair % 2 else reversed(sides):
            mount, path = sides[side], sides[side].path / load.file
            load.prepare(mount, path, pair)
            before, used = mount.stats(), procmem.run_seconds(mount.pid)
            seconds[side].append(load.read(path, pair).seconds)
            processor[side].append(procmem.run_seconds(mount.pid) - used)
            if side == "with a pool":
                counted.append(mount.since(before, *COUNTED))
    found = ratios(seconds["with a pool"], seconds["no pool"])
    used_by = {side: sum(values) for side, values in processor.items()}
    return {
        "slower_percent": 100.0 * (median(found) - 1.0),
        "best_slower_percent": 100.0 * (min(seconds["with a pool"]) / min(seconds["no pool"]) - 1.0),
        "busier_percent": 100.0 * (used_by["with a pool"] / max(used_by["no pool"], 0.01) - 1.0),
        "ratios": found,
        "seconds": seconds,
        "processor_seconds": processor,
        "counted": counted,
    }


def _goals(figures: Figures) -> list[Goal]:
    goals = []
    for load, backings in figures["loads"].items():
        for backing, found in backings.items():
            slower, judged = found["slower_percent"], backing in JUDGED
            goal = f"≤ {GOAL:.0f} % slower" if judged else "reported as it is"
            met = slower <= GOAL if judged else None
            goals.append(Goal(f"with a pool that cannot help: {load}, {backing}", goal, f"{slower:+.1f} %", met))
    return goals


def picture(figures: Figures, path: Path) -> None:
    """Draw how much slower each load is on each backing."""
    groups = {
        load: {backing: found["slower_percent"] for backing, found in backings.items()}
        for load, backings in figures["loads"].items()
    }
    title = "The cost of a pool that cannot help: time against --pool none"
    draw.bars(path, title, groups, "% slower (negative: faster)", goal=GOAL, form="{:+.1f} %")


if __name__ == "__main__":
    command = parser(__doc__)
    command.add_argument("--pairs", type=int, default=9)
    command.add_argument("--cache", type=int, default=64, help="MiB")
    command.add_argument("--times", type=int, default=4, help="the scanned file is so many times the cache")
    command.add_argument("--only", nargs="*", default=[], help="names of the loads to measure")
    asked = command.parse_args()
    main(asked, lambda: measure(asked.pairs, asked.cache * MIB, asked.times, asked.only), picture)
