"""Measure what the pool costs where it cannot help: scans that are read once, and a working set that fits the cache.

The same reads go through a mount with a pool and through one with `--pool none`, over the same backing, in turn. The
backings take 5 ms, 0.5 ms, and no extra time a request. Two scans read a file of several times the cache from start to
end, 1 MiB and 128 KiB at a time. A third scan reads each page once, 4 KiB at a time, in a seeded random order, through
a small cache that is already full. Before each scan both sides drop all pages, so none is read twice. The working set
takes three quarters of the cache and is read at random, 4 KiB at a time.

The figures are the medians of the pairs' ratios of time and of the servers' processor time, with their intervals
(bench/tools/verdict.py). Files are in memory where the machine has a tmpfs, so that only the throttle is slow.

    python -m bench.cost [--pairs 15] [--cache 32] [--times 4] [--only LOAD …] [--out FILE]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.tools import draw, pages, procmem
from bench.tools.content import MIB, PAGE_SIZE, shuffled, write_half_compressible
from bench.tools.harness import Mounted, fast_workspace, tmemfs
from bench.tools.report import Figures, Goal, Outcome, main, parser, ratios, say
from bench.tools.verdict import Verdict, in_turn, spread

GOAL = 3.0  # percent
BACKINGS = {"5 ms": "latency=5ms", "0.5 ms": "latency=0.5ms", "unthrottled": ""}
JUDGED = ("5 ms", "0.5 ms")
RANDOM_CACHE = MIB
RANDOM_PAGES = {"5 ms": 100, "0.5 ms": 600, "unthrottled": 2000}  # read after the cache is full
COUNTED = (
    *("precache_puts", "precache_passed", "precache_dropped"),
    *("precache_succ_gets", "precache_reads", "backing_pages"),
)


@dataclass(frozen=True, slots=True)
class Load:
    """One way to read `file`, once a pair; `prepare` runs before and is not timed."""

    file: str
    prepare: Callable[[Mounted, Path, int], None]
    read: Callable[[Path, int], pages.Pass]
    small: bool = False


def measure(pairs: int = 15, cache: int = 32 * MIB, times: int = 4, only: Sequence[str] = ()) -> Outcome:
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
                        say(f"{backing:<12} {name:<28} {_text(found)}")
    return Outcome(_goals(figures), figures)


def _loads(random_pages: int) -> dict[str, Load]:
    """Return the loads by name."""

    def drop(mount: Mounted, path: Path, pair: int) -> None:
        mount.control("drop_caches", "1")

    def fill(mount: Mounted, path: Path, pair: int) -> None:
        # With other pages than the measured ones, at random, so that no scan is detected.
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
        for side in in_turn(sides, pair):
            mount, path = sides[side], sides[side].path / load.file
            load.prepare(mount, path, pair)
            before, used = mount.stats(), procmem.thread_times(mount.pid)
            seconds[side].append(load.read(path, pair).seconds)
            processor[side].append(procmem.seconds_since(used, mount.pid))
            if side == "with a pool":
                counted.append(mount.since(before, *COUNTED))
    return {
        "slower_percent": _percent(seconds),
        "busier_percent": _percent(processor),
        "seconds": seconds,
        "processor_seconds": processor,
        "counted": counted,
    }


def _percent(sides: dict[str, list[float]]) -> list[float]:
    """Return for each pair how many percent more the side with a pool took."""
    return [100.0 * (ratio - 1.0) for ratio in ratios(sides["with a pool"], sides["no pool"])]


def _text(found: Figures) -> str:
    slower, busier = spread(found["slower_percent"]), spread(found["busier_percent"])
    return f"{slower.text('+.1f', ' % time')}, {busier.text('+.1f', ' % processor time')}"


def _goals(figures: Figures) -> list[Goal]:
    goals = []
    for backing in BACKINGS:
        for load, backings in figures["loads"].items():
            slower, what = spread(backings[backing]["slower_percent"]), f"a pool that cannot help: {load}, {backing}"
            if backing in JUDGED:
                goal, verdict = f"≤ {GOAL:.0f} % slower", slower.at_most(GOAL)
            else:
                goal, verdict = "–", Verdict.REPORTED
            goals.append(Goal(what, goal, _text(backings[backing]), verdict))
    return goals


def picture(figures: Figures, path: Path) -> None:
    """Draw how much slower each load is on each backing."""
    groups = {
        load: {backing: spread(found["slower_percent"]) for backing, found in backings.items()}
        for load, backings in figures["loads"].items()
    }
    title = "The cost of a pool that cannot help: time against --pool none"
    draw.bars(path, title, groups, "% more time (negative: less)", goal=GOAL, form="{:+.1f} %")


if __name__ == "__main__":
    command = parser(__doc__)
    command.add_argument("--pairs", type=int, default=15)
    command.add_argument("--cache", type=int, default=32, help="MiB")
    command.add_argument("--times", type=int, default=4, help="the scanned file is so many times the cache")
    command.add_argument("--only", nargs="*", default=[], help="names of the loads to measure")
    asked = command.parse_args()
    main(asked, lambda: measure(asked.pairs, asked.cache * MIB, asked.times, asked.only), picture)
