"""What a hit in a pool on borrowed slabs costs against one in a pool of the mount's own.

Measured: 4-KiB reads by one reader over the same file of 2:1 compressible pages in the same seeded random order,
through a mount with `--pool SIZE` and through one that borrows from a tmemd, both with a cache of 1 MiB, so that nearly
every page comes from the pool and every read sends a page back there. Both are mounted at the same time and read in
turn, after passes that bring them to the steady state; then both are mounted anew. A pass's median read takes one of
two times, on either side, by where the kernel runs the serving process beside its reader (23 or 43 us where this was
written). So the figure compares the fastest pass of each side; the medians of all passes and the ratio of the processor
time of the serving processes are given, too. The counters prove where the pages came from (at most one in fifty from
the backing), and that the borrower still talks to tmemd.

    python -m bench.borrowed [--mounts 9] [--size 16] [--out FILE]
"""

from __future__ import annotations

import json
from pathlib import Path

from bench.tools import draw, pages, procmem
from bench.tools.children import BenchError
from bench.tools.content import MIB, PAGE_SIZE, shuffled, write_half_compressible
from bench.tools.harness import Mounted, tmemd, tmemfs, workspace
from bench.tools.report import Figures, Goal, Outcome, bars, main, median, parser, say

GOAL = 1.05
SMALL_CACHE = MIB
WARM_UP_PASSES = 5
PASSES = 8


def measure(mounts: int = 9, size: int = 16 * MIB) -> Outcome:
    """Measure both kinds of mount in turn, each time on fresh ones."""
    order = shuffled(size // PAGE_SIZE, seed=5)
    with workspace() as space, tmemd(space, 4 * size) as lending:
        source = space / "source"
        source.mkdir()
        write_half_compressible(source / "file", len(order))
        rounds = []
        for turn in range(mounts):
            rounds += _on_fresh_mounts(space, lending.socket, order, turn % 2 == 1)
    names = ("own_microseconds", "borrowed_microseconds", "processor_ratio")
    figures: Figures = {name: median([found[name] for found in rounds]) for name in names} | {"rounds": rounds}
    best = {side: min(found[f"{side}_microseconds"] for found in rounds) for side in ("own", "borrowed")}
    figures |= {f"best_{side}_microseconds": time for side, time in best.items()}
    result = figures["ratio"] = best["borrowed"] / best["own"]
    say(bars({f"{side} slabs": time for side, time in best.items()}, "µs a read"))
    say(f"  processor time of a pass: {figures['processor_ratio']:.2f}×")
    what = "a hit in the pool on borrowed slabs, against the mount's own, 4-KiB reads, one reader"
    return Outcome([Goal(what, f"≤ {GOAL:.2f}×", f"{result:.2f}×", result <= GOAL)], figures)


def _on_fresh_mounts(space: Path, socket_path: Path, order: list[int], borrowed_first: bool) -> list[Figures]:
    """Mount both kinds, bring them to the steady state, and read in turn."""
    pool = 2 * len(order) * PAGE_SIZE
    with (
        tmemfs(space / "source", space / "own", cache=SMALL_CACHE, pool=pool) as own,
        tmemfs(
            space / "source", space / "borrowed", "--pool", f"unix:{socket_path}", cache=SMALL_CACHE, pool=pool
        ) as borrowed,
    ):
        for mount in (own, borrowed):
            for _ in range(WARM_UP_PASSES):
                pages.in_order(mount.path / "file", order)
        rounds = [_round(own, borrowed, order, turn % 2 == int(borrowed_first)) for turn in range(PASSES)]
        state = json.loads((borrowed.path / ".tmemfs/stats.json").read_bytes())["lender"]
    if state != "connected":
        raise BenchError(f"the borrowing mount is {state}")
    return rounds


def _round(own: Mounted, borrowed: Mounted, order: list[int], borrowed_first: bool) -> Figures:
    """Read every page once on each side."""
    reads: dict[str, pages.Pass] = {}
    used: dict[str, float] = {}
    sides = [("own", own), ("borrowed", borrowed)]
    for name, mount in reversed(sides) if borrowed_first else sides:
        before, began = mount.stats(), procmem.run_seconds(mount.pid)
        reads[name] = pages.in_order(mount.path / "file", order)
        used[name] = procmem.run_seconds(mount.pid) - began
        counted = mount.since(before, "precache_succ_gets", "backing_reads")
        if counted["backing_reads"] > len(order) / 50 or counted["precache_succ_gets"] < len(order) / 2:
            raise BenchError(f"not a steady state: {counted}")
    return {
        "own_microseconds": 1e6 * reads["own"].median_seconds,
        "borrowed_microseconds": 1e6 * reads["borrowed"].median_seconds,
        "processor_ratio": used["borrowed"] / used["own"],
    }


def picture(figures: Figures, path: Path) -> None:
    """Draw a read on both sides."""
    values = {f"{side} slabs": figures[f"best_{side}_microseconds"] for side in ("own", "borrowed")}
    draw.bars(path, "4-KiB reads of pages in the pool by one reader", {"a read": values}, "µs")


if __name__ == "__main__":
    command = parser(__doc__)
    command.add_argument("--mounts", type=int, default=9, help="how often both are mounted")
    command.add_argument("--size", type=int, default=16, help="MiB of the file")
    asked = command.parse_args()
    main(asked, lambda: measure(asked.mounts, asked.size * MIB), picture)
