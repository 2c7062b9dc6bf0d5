"""What a hit in a pool on borrowed slabs costs against one in a pool of the mount's own.

Measured: 4-KiB reads by one reader over the same file of 2:1 compressible pages in the same seeded random order,
through a mount with `--pool SIZE` and through one that borrows from a tmemd, both with a cache of 1 MiB, so that nearly
every page comes from the pool and every read sends a page back there. Both are mounted at the same time and read in
turn, after passes that bring them to the steady state. The figure is the median over the pairs of the ratio of the mean
time a read; the processor time of the serving processes is given, too. The counters prove where the pages came from
(at most one in fifty from the backing), and that the borrower still talks to tmemd.

    python -m bench.borrowed [--pairs 9] [--size 32] [--out FILE]
"""

from __future__ import annotations

import json
from pathlib import Path

from bench import draw, pages, procmem
from bench.children import BenchError
from bench.content import MIB, PAGE_SIZE, shuffled, write_half_compressible
from bench.harness import Mounted, tmemd, tmemfs, workspace
from bench.report import Figures, Goal, Outcome, bars, main, median, parser, say

GOAL = 1.05
SMALL_CACHE = MIB
WARM_UP_PASSES = 3


def measure(pairs: int = 9, size: int = 32 * MIB) -> Outcome:
    """Measure both mounts in turn."""
    order = shuffled(size // PAGE_SIZE, seed=5)
    with workspace() as space, tmemd(space, 4 * size) as lending:
        source = space / "source"
        source.mkdir()
        write_half_compressible(source / "file", len(order))
        borrow = ("--pool", f"unix:{lending.socket}")
        with (
            tmemfs(source, space / "own", cache=SMALL_CACHE, pool=2 * size) as own,
            tmemfs(source, space / "borrowed", *borrow, cache=SMALL_CACHE, pool=2 * size) as borrowed,
        ):
            for mount in (own, borrowed):
                for _ in range(WARM_UP_PASSES):
                    pages.in_order(mount.path / "file", order)
            rounds = [_round(own, borrowed, order, turn % 2 == 1) for turn in range(pairs)]
            state = json.loads((borrowed.path / ".tmemfs/stats.json").read_bytes())["lender"]
    if state != "connected":
        raise BenchError(f"the borrowing mount is {state}")
    names = ("own_microseconds", "borrowed_microseconds", "ratio", "processor_ratio")
    figures: Figures = {name: median([found[name] for found in rounds]) for name in names} | {"rounds": rounds}
    say(bars({"own slabs": figures[names[0]], "borrowed slabs": figures[names[1]]}, "µs a read"))
    result = figures["ratio"]
    what = "a hit in the pool on borrowed slabs, against the mount's own, 4-KiB reads, one reader"
    return Outcome([Goal(what, f"≤ {GOAL:.2f}×", f"{result:.2f}×", result <= GOAL)], figures)


def _round(own: Mounted, borrowed: Mounted, order: list[int], borrowed_first: bool) -> Figures:
    """Read every page once on each side."""
    seconds: dict[str, float] = {}
    used: dict[str, float] = {}
    sides = [("own", own), ("borrowed", borrowed)]
    for name, mount in reversed(sides) if borrowed_first else sides:
        before, began = mount.stats(), procmem.run_seconds(mount.pid)
        seconds[name] = pages.in_order(mount.path / "file", order).mean_seconds
        used[name] = procmem.run_seconds(mount.pid) - began
        counted = mount.since(before, "precache_succ_gets", "backing_reads")
        if counted["backing_reads"] > len(order) / 50 or counted["precache_succ_gets"] < len(order) / 2:
            raise BenchError(f"not a steady state: {counted}")
    return {
        "own_microseconds": 1e6 * seconds["own"],
        "borrowed_microseconds": 1e6 * seconds["borrowed"],
        "ratio": seconds["borrowed"] / seconds["own"],
        "processor_ratio": used["borrowed"] / used["own"],
    }


def picture(figures: Figures, path: Path) -> None:
    """Draw a read on both sides."""
    values = {"own slabs": figures["own_microseconds"], "borrowed slabs": figures["borrowed_microseconds"]}
    draw.bars(path, "4-KiB reads of pages in the pool by one reader", {"a read": values}, "µs")


if __name__ == "__main__":
    command = parser(__doc__)
    command.add_argument("--pairs", type=int, default=9)
    command.add_argument("--size", type=int, default=32, help="MiB of the file")
    asked = command.parse_args()
    main(asked, lambda: measure(asked.pairs, asked.size * MIB), picture)
