"""Measure what a hit in a pool on borrowed slabs costs, against a hit in a pool of the mount's own.

One reader reads a file of 2:1 compressible pages, 4 KiB at a time, in the same seeded random order, through a mount
with `--pool SIZE` and through one that borrows from a tmemd. Both have a cache of 1 MiB, so nearly every page comes
from the pool, and every read puts another page there. Both are mounted at the same time and read in turn in the
steady state; then both are mounted anew.

A pass has one of two median times (23 or 43 µs on the machine of docs/benchmarks.md), depending on the core on which
the kernel runs the server. So the fastest pass of each side is compared, once for each pair of mounts. The figure is
the median of these ratios with its interval (bench/tools/verdict.py). The ratio of the servers' processor times over
all passes is reported, too. A pass fails when more than one page in fifty came from the backing.

    python -m bench.borrowed [--mounts 7] [--size 16] [--out FILE]
"""

from __future__ import annotations

import json
from pathlib import Path

from bench.tools import pages, procmem
from bench.tools.children import BenchError
from bench.tools.content import MIB, PAGE_SIZE, shuffled, write_half_compressible
from bench.tools.harness import Mounted, tmemd, tmemfs, workspace
from bench.tools.report import Figures, Goal, Outcome, main, medians, parser, ratios, say
from bench.tools.verdict import in_turn, spread

GOAL = 1.05
SIDES = ("own", "borrowed")
SMALL_CACHE = MIB
WARM_UP_PASSES = 4
PASSES = 6


def measure(mounts: int = 7, size: int = 16 * MIB) -> Outcome:
    """Measure both kinds of mount in turn, each time on fresh ones."""
    order = shuffled(size // PAGE_SIZE, seed=5)
    with workspace() as space, tmemd(space, 4 * size) as lending:
        source = space / "source"
        source.mkdir()
        write_half_compressible(source / "file", len(order))
        mounted = [_on_fresh_mounts(space, lending.socket, order, turn) for turn in range(mounts)]
    best = {side: [min(found[f"{side}_microseconds"] for found in rounds) for rounds in mounted] for side in SIDES}
    found = ratios(best["borrowed"], best["own"])
    figures: Figures = {"best_microseconds": best, "ratios": found, "mounts": mounted}
    say(medians(best, "µs a read"))
    what = "a hit in the pool on borrowed slabs, against the mount's own, 4-KiB reads, one reader"
    ratio = spread(found)
    processor = spread([one["processor_ratio"] for rounds in mounted for one in rounds])
    goals = [Goal(what, f"≤ {GOAL:.2f}×", ratio.text(".3f", "×"), ratio.at_most(GOAL))]
    goals.append(Goal("the same, processor time of the serving process", "–", processor.text(".2f", "×")))
    return Outcome(goals, figures)


def _on_fresh_mounts(space: Path, socket_path: Path, order: list[int], turn: int) -> list[Figures]:
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
        rounds = [_round({"own": own, "borrowed": borrowed}, order, turn + number) for number in range(PASSES)]
        state = json.loads((borrowed.path / ".tmemfs/stats.json").read_bytes())["lender"]
    if state != "connected":
        raise BenchError(f"the borrowing mount is {state}")
    return rounds


def _round(sides: dict[str, Mounted], order: list[int], number: int) -> Figures:
    """Read every page once on each side."""
    reads: dict[str, pages.Pass] = {}
    used: dict[str, float] = {}
    for name, mount in in_turn(sides.items(), number):
        before, began = mount.stats(), procmem.run_seconds(mount.pid)
        reads[name] = pages.in_order(mount.path / "file", order)
        used[name] = procmem.run_seconds(mount.pid) - began
        counted = mount.since(before, "precache_succ_gets", "precache_reads", "backing_reads")
        pooled = counted["precache_succ_gets"] + counted["precache_reads"]
        if counted["backing_reads"] > len(order) / 50 or pooled < len(order) / 2:
            raise BenchError(f"not a steady state: {counted}")
    return {
        "own_microseconds": 1e6 * reads["own"].median_seconds,
        "borrowed_microseconds": 1e6 * reads["borrowed"].median_seconds,
        "processor_ratio": used["borrowed"] / used["own"],
    }


if __name__ == "__main__":
    command = parser(__doc__)
    command.add_argument("--mounts", type=int, default=7, help="how often both are mounted")
    command.add_argument("--size", type=int, default=16, help="MiB of the file")
    asked = command.parse_args()
    main(asked, lambda: measure(asked.mounts, asked.size * MIB))
