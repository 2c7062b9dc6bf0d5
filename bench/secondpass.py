"""Measure how much faster the second pass over a file of four times the cache is than the first.

The file is 2:1 compressible and fits cache and pool together; the backing takes 5 ms a request. Read in a seeded random
order, 4 KiB at a time: the goal is on this one, which waits for the backing at each page. Read sequentially, 1 MiB at a
time: read-ahead hides most of the latency in the first pass already, and pages of a first scan are not pooled, so most
pages of the second pass come from the backing again. The sequential cache is larger, because a random pass over four
times its size would take minutes. Cache and pool are dropped before each round. The figure is the median of the ratios
of the rounds with its interval (bench/tools/verdict.py).

    python -m bench.secondpass [--rounds 6] [--cache 1] [--large 64] [--latency 5ms] [--out FILE]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from bench.tools import pages
from bench.tools.content import MIB, PAGE_SIZE, shuffled, write_half_compressible
from bench.tools.harness import Mounted, tmemfs, workspace
from bench.tools.report import Figures, Goal, Outcome, main, medians, parser, say
from bench.tools.verdict import spread

GOAL = 30.0
TIMES_CACHE = 4


def measure(rounds: int = 6, cache: int = MIB, large: int = 64 * MIB, latency: str = "5ms") -> Outcome:
    """Measure both orders."""
    order = shuffled(TIMES_CACHE * cache // PAGE_SIZE, seed=6)
    throttle = f"latency={latency}"
    figures: Figures = {}
    with workspace() as space:
        source = space / "source"
        source.mkdir()
        for name, bound in (("random", cache), ("sequential", large)):
            size = TIMES_CACHE * bound
            file = space / "mount" / name
            write_half_compressible(source / name, size // PAGE_SIZE)
            with tmemfs(source, space / "mount", "--throttle", throttle, cache=bound, pool=size) as mount:
                read = partial(pages.in_order, file, order) if name == "random" else partial(pages.sequentially, file)
                figures[name] = _passes(f"{name}, cache {bound // MIB}M", mount, read, rounds)
                figures[name] |= {"cache_bytes": bound, "working_set_bytes": size}
    what = f"second pass over 4 × cache that fits cache + pool, backing with {latency} latency"
    random, sequential = (
        spread([one["ratio"] for one in figures[name]["rounds"]]) for name in ("random", "sequential")
    )
    goals = [Goal(what, f"≥ {GOAL:.0f}× faster", random.text(".0f", "× faster"), random.at_least(GOAL))]
    goals.append(Goal("the same, sequential with readahead", "–", sequential.text(".1f", "× faster")))
    return Outcome(goals, figures)


def _passes(name: str, mount: Mounted, read: Callable[[], pages.Pass], rounds: int) -> Figures:
    """Read everything twice, `rounds` times from nothing."""
    found: list[Figures] = []
    for _ in range(rounds):
        mount.control("drop_caches", "1")
        first = read()
        before = mount.stats()
        second = read()
        counted = mount.since(
            before, "cache_hits", "precache_succ_gets", "precache_reads", "backing_pages", "precache_dropped"
        )
        found.append(
            {
                "first_seconds": first.seconds,
                "second_seconds": second.seconds,
                "ratio": first.seconds / second.seconds,
                "second_pass": counted,
            }
        )
    times = {f"{which} pass": [1e3 * one[f"{which}_seconds"] for one in found] for which in ("first", "second")}
    missed = max(one["second_pass"]["backing_pages"] for one in found)
    faster = spread([one["ratio"] for one in found]).text(".1f", "× faster")
    say(f"{name}: the second pass is {faster}, at most {missed} pages of it from the backing")
    say(medians(times, "ms"))
    return {"rounds": found}


if __name__ == "__main__":
    command = parser(__doc__)
    command.add_argument("--rounds", type=int, default=6)
    command.add_argument("--cache", type=int, default=1, help="MiB of the cache, random order")
    command.add_argument("--large", type=int, default=64, help="MiB of the cache, sequential")
    command.add_argument("--latency", default="5ms", help="of the backing, a request")
    asked = command.parse_args()
    main(asked, lambda: measure(asked.rounds, asked.cache * MIB, asked.large * MIB, asked.latency))
