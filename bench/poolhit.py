"""Measure what a page from the pool costs more than one from the cache.

One reader reads a file of 2:1 compressible pages, 4 KiB at a time, in the same seeded random order, through a mount
whose cache holds all of it and through one with a cache of 1 MiB, where nearly every page comes from the pool and every
read puts another page there. Both are mounted at the same time and read in turn in the steady state. The figure is the
difference of the mean times a read, divided by the share of pages that came from the pool: the median of the pairs with
its interval (bench/tools/verdict.py). A read of the backing fails the measure. The difference of the server's processor
time varies less on a shared machine, and is reported.

    python -m bench.poolhit [--pairs 9] [--size 32] [--out FILE]
"""

from __future__ import annotations

from bench.tools import pages, procmem
from bench.tools.children import BenchError
from bench.tools.content import MIB, PAGE_SIZE, shuffled, write_half_compressible
from bench.tools.harness import Mounted, tmemfs, workspace
from bench.tools.report import Figures, Goal, Outcome, main, median, medians, parser, say
from bench.tools.verdict import in_turn, spread

GOAL = 25.0  # microseconds
SMALL_CACHE = MIB
WARM_UP_PASSES = 3
_ALSO = ("more_microseconds_by_medians", "more_processor_microseconds")


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
    more = spread([found["more_microseconds"] for found in rounds])
    figures: Figures = {
        "more_microseconds": more.median,
        **{name: median([found[name] for found in rounds]) for name in _ALSO},
        "rounds": rounds,
    }
    say(medians({side: [found[f"{side}_microseconds"] for found in rounds] for side in ("cache", "pool")}, "µs a read"))
    say("  " + ", ".join(f"{name} {figures[name]:.1f}" for name in _ALSO))
    what = "page in the pool (2:1 compressible) instead of in the cache, 4-KiB reads, one reader"
    goals = [Goal(what, f"≤ {GOAL:.0f} µs more", more.text(".1f", " µs more"), more.at_most(GOAL))]
    processor = spread([found["more_processor_microseconds"] for found in rounds])
    goals.append(Goal("the same, processor time of the serving process", "–", processor.text(".1f", " µs more")))
    return Outcome(goals, figures)


def _round(cached: Mounted, pooled: Mounted, order: list[int], pair: int) -> Figures:
    """Read every page once on each side."""
    names = ("cache_hits", "precache_succ_gets", "backing_reads", "precache_dropped")
    sides = {}
    for mount in in_turn((cached, pooled), pair):
        before = mount.stats()
        used = procmem.run_seconds(mount.pid)
        done = pages.in_order(mount.path / "file", order)
        used = procmem.run_seconds(mount.pid) - used
        counted = mount.since(before, *names)
        if counted["backing_reads"]:
            raise BenchError(f"{counted['backing_reads']} reads went to the backing: not a steady state")
        sides[mount] = done, used, counted
    (cache, cache_used, cache_counted), (pool, pool_used, pool_counted) = sides[cached], sides[pooled]
    share = pool_counted["precache_succ_gets"] / len(order)
    if share < 0.5:
        raise BenchError(f"only {share:.0%} of the pages came from the pool")
    return {
        "cache_microseconds": 1e6 * cache.mean_seconds,
        "pool_microseconds": 1e6 * pool.mean_seconds,
        "more_microseconds": 1e6 * (pool.mean_seconds - cache.mean_seconds) / share,
        "more_microseconds_by_medians": 1e6 * (pool.median_seconds - cache.median_seconds),
        "more_processor_microseconds": 1e6 * (pool_used - cache_used) / len(order) / share,
        "pool_share": share,
        "cache_counters": cache_counted,
        "pool_counters": pool_counted,
    }


if __name__ == "__main__":
    command = parser(__doc__)
    command.add_argument("--pairs", type=int, default=9)
    command.add_argument("--size", type=int, default=32, help="MiB of the file")
    asked = command.parse_args()
    main(asked, lambda: measure(asked.pairs, asked.size * MIB))
