"""Measure how fast pages come from the pool, against pages from the cache.

One reader reads a file of 2:1 compressible pages through a mount whose cache holds all of it and through one with a
cache of 1 MiB, where nearly every page comes from the pool: 4 KiB at a time in the same seeded random order, then
128 KiB and 1 MiB at a time from beginning to end. Both are mounted at the same time and read in turn in the steady
state. The figures are the ratios of the rates, as medians of the pairs with their
intervals (bench/tools/verdict.py). A read of the backing fails the measure. The difference of the server's processor
time for a random page varies less on a shared machine, and is reported.

    python -m bench.poolhit [--pairs 9] [--size 32] [--out FILE]
"""

from __future__ import annotations

from bench.tools import pages, procmem
from bench.tools.children import BenchError
from bench.tools.content import MIB, PAGE_SIZE, shuffled, write_half_compressible
from bench.tools.harness import Mounted, tmemfs, workspace
from bench.tools.report import Figures, Goal, Outcome, main, parser, say
from bench.tools.verdict import in_turn, spread

BLOCKS = {"4 KiB, random": (PAGE_SIZE, 0.7), "128 KiB": (MIB // 8, 0.4), "1 MiB": (MIB, 0.4)}  # bytes, goal
SMALL_CACHE = MIB
WARM_UP_PASSES = 3
_COUNTED = ("cache_hits", "precache_succ_gets", "precache_reads", "backing_reads", "precache_dropped")


def measure(pairs: int = 9, size: int = 32 * MIB) -> Outcome:
    """Measure both mounts in turn."""
    order = shuffled(size // PAGE_SIZE, seed=5)
    with workspace() as space:
        source = space / "source"
        source.mkdir()
        write_half_compressible(source / "file", len(order))
        with (
            tmemfs(source, space / "cache", cache=2 * size + 8 * MIB, pool=2 * size) as cached,
            tmemfs(source, space / "pool", cache=SMALL_CACHE, pool=2 * size) as pooled,
        ):
            for mount in (cached, pooled):
                for _ in range(WARM_UP_PASSES):
                    pages.in_order(mount.path / "file", order)
            rounds = [_round(cached, pooled, order, pair) for pair in range(pairs)]
    figures: Figures = {"rounds": rounds}
    goals = []
    for name, (_, goal) in BLOCKS.items():
        ratio = spread([found[name]["ratio"] for found in rounds])
        figures[name] = ratio.median
        say(f"  {name:<14} {ratio.text('.2f', ' of the rate of the cache')}")
        what = f"pages in the pool (2:1 compressible) instead of in the cache, one reader, {name}"
        goals.append(Goal(what, f"≥ {goal} of its rate", ratio.text(".2f", ""), ratio.at_least(goal)))
    processor = spread([found["more_processor_microseconds"] for found in rounds])
    figures["more_processor_microseconds"] = processor.median
    goals.append(Goal("the same, processor time a random page", "–", processor.text(".1f", " µs more")))
    return Outcome(goals, figures)


def _round(cached: Mounted, pooled: Mounted, order: list[int], pair: int) -> Figures:
    """Read every page once on each side, in each way."""
    found: Figures = {}
    for name, (block, _) in BLOCKS.items():
        seconds, used, counted = {}, {}, {}
        for mount in in_turn((cached, pooled), pair):
            before, processor = mount.stats(), procmem.run_seconds(mount.pid)
            path = mount.path / "file"
            done = pages.in_order(path, order) if block == PAGE_SIZE else pages.sequentially(path, block)
            used[mount] = procmem.run_seconds(mount.pid) - processor
            seconds[mount] = done.seconds
            counted[mount] = mount.since(before, *_COUNTED)
            if counted[mount]["backing_reads"]:
                raise BenchError(f"{counted[mount]['backing_reads']} reads went to the backing: not a steady state")
        share = (counted[pooled]["precache_succ_gets"] + counted[pooled]["precache_reads"]) / len(order)
        if share < 0.5:
            raise BenchError(f"only {share:.0%} of the pages came from the pool")
        found[name] = {
            "ratio": seconds[cached] / seconds[pooled],
            "seconds": {"cache": seconds[cached], "pool": seconds[pooled]},
            "pool_share": share,
            "counted": {"cache": counted[cached], "pool": counted[pooled]},
        }
        if block == PAGE_SIZE:
            found["more_processor_microseconds"] = 1e6 * (used[pooled] - used[cached]) / len(order) / share
    return found


if __name__ == "__main__":
    command = parser(__doc__)
    command.add_argument("--pairs", type=int, default=9)
    command.add_argument("--size", type=int, default=32, help="MiB of the file")
    asked = command.parse_args()
    main(asked, lambda: measure(asked.pairs, asked.size * MIB))
