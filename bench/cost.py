"""What the pool costs where it cannot help: a scan that is used once, and a working set that fits the cache.

Measured: the same reads through a mount with a pool and one with `--pool none`, both over the same backing, in turn
and in the other order in every second pair; the figure is the median of the ratios of the pairs. On backings with
5 ms and 0.5 ms a request and an unthrottled one. The scans read a file of several times the cache from start to end,
1 MiB or 128 KiB at a time, or its pages in a seeded random order, each once; before each, both sides drop what they
hold, so nothing is ever read twice. The working set is read at random, 4 KiB at a time, from the cache. The source is
in memory where the machine has a tmpfs: what is slow is the throttle, and it is equally slow on both sides.

    python -m bench.cost [--pairs 9] [--cache 64] [--times 4] [--only scan fits …] [--out FILE]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from bench import pages, procmem
from bench.content import MIB, PAGE_SIZE, shuffled, write_half_compressible
from bench.harness import Mounted, fast_workspace, tmemfs
from bench.report import Figures, Goal, Outcome, main, median, parser, say

GOAL = 3.0  # percent
BACKINGS = {"5 ms": "latency=5ms", "0.5 ms": "latency=0.5ms", "unthrottled": ""}
JUDGED = ("5 ms", "0.5 ms")
RANDOM_PAGES = {"5 ms": 200, "0.5 ms": 1500, "unthrottled": 8000}
COUNTED = ("precache_puts", "precache_dropped", "backing_pages")
Read = Callable[[Path, int], pages.Pass]


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
            with (
                tmemfs(source, space / "pool", *options, cache=cache, pool=4 * cache) as pool,
                tmemfs(source, space / "none", *options, cache=cache, pool=0) as none,
            ):
                for load, read in _loads(backing, times * cache).items():
                    if only and not any(word in load for word in only):
                        continue
                    found = _pairs(pool, none, load, read, pairs)
                    figures["loads"].setdefault(load, {})[backing] = found
                    say(f"  {backing:<12} {load:<28} {found['slower_percent']:+6.1f} % slower than without a pool")
    return Outcome(_goals(figures), figures)


def _loads(backing: str, size: int) -> dict[str, Read]:
    """Return how the files are read, by name."""
    count = size // PAGE_SIZE

    def at_random(path: Path, pair: int) -> pages.Pass:
        return pages.in_order(path, shuffled(count, seed=pair)[: RANDOM_PAGES[backing]])

    def fits(path: Path, pair: int) -> pages.Pass:
        order = shuffled(path.stat().st_size // PAGE_SIZE, seed=pair)
        return pages.in_order(path, order)

    return {
        "scan, 1-MiB reads": lambda path, _: pages.sequentially(path),
        "scan, 128-KiB reads": lambda path, _: pages.sequentially(path, MIB // 8),
        "scan, 4 KiB in random order": at_random,
        "fits the cache, 4 KiB": fits,
    }


def _pairs(pool: Mounted, none: Mounted, load: str, read: Read, pairs: int) -> Figures:
    """Run both sides in turn."""
    name = "fits" if load.startswith("fits") else "scan"
    seconds: dict[str, list[float]] = {"pool": [], "none": []}
    processor: dict[str, list[float]] = {"pool": [], "none": []}
    counted: list[dict[str, int]] = []
    if name == "fits":
        for mount in (pool, none):
            for _ in range(2):
                pages.sequentially(mount.path / name)
    for pair in range(pairs):
        sides = [("pool", pool), ("none", none)]
        for side, mount in sides if pair % 2 == 0 else reversed(sides):
            if name == "scan":
                mount.control("drop_caches", "1")
            before, used = mount.stats(), procmem.run_seconds(mount.pid)
            done = read(mount.path / name, pair + 1)
            seconds[side].append(done.seconds)
            processor[side].append(procmem.run_seconds(mount.pid) - used)
            if side == "pool":
                counted.append(mount.since(before, *COUNTED))
    ratio = [one / other for one, other in zip(seconds["pool"], seconds["none"], strict=True)]
    return {
        "slower_percent": 100.0 * (median(ratio) - 1.0),
        "ratios": ratio,
        "seconds": seconds,
        "processor_seconds": processor,
        "counted": counted,
    }


def _goals(figures: Figures) -> list[Goal]:
    goals = []
    for load, backings in figures["loads"].items():
        for backing, found in backings.items():
            slower = found["slower_percent"]
            judged = backing in JUDGED
            goal = f"≤ {GOAL:.0f} % slower" if judged else "as it is"
            result = f"{slower:+.1f} %"
            goals.append(
                Goal(
                    f"{load}, {backing}: with a pool that cannot help", goal, result, slower <= GOAL if judged else None
                )
            )
    return goals


if __name__ == "__main__":
    command = parser(__doc__)
    command.add_argument("--pairs", type=int, default=9)
    command.add_argument("--cache", type=int, default=64, help="MiB")
    command.add_argument("--times", type=int, default=4, help="the scanned file is so many times the cache")
    command.add_argument("--only", nargs="*", default=[], help="words of the loads to measure")
    asked = command.parse_args()
    main(asked, lambda: measure(asked.pairs, asked.cache * MIB, asked.times, asked.only))
