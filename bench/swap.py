"""Measure what it costs to page to a mount, against zram, a slow file and a null filesystem.

A process writes pages of four times the memory that it may have, in random order. For most of them one page comes in
and another goes out. The same process with the same content (2:1 compressible) and the same limit swaps in turn to the
hswap file of a mount whose pool holds everything, to a null pyfuse3 filesystem that keeps the bytes, to zram with lz4,
and to a file of a mount whose directory takes 5 ms a request. Every page is written before. A quarter of the pages is
timed, in six parts, and every byte of a quarter is compared afterwards. The figures are medians of the parts' ratios
with their intervals (bench/tools/verdict.py). The goal is on the slow file. It takes part in the first round only, and
with an advantage: part of its writes began before the timed parts. zram is in the kernel, so its ratio shows what FUSE
and Python cost.

    python -m bench.swap [--rounds 3] [--limit 16] [--slow-rounds 1] [--out FILE]

Needs root, loop devices and a memory cgroup. No other swap may be on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bench.subjects import swapareas
from bench.subjects.paging import pager, vmstat
from bench.subjects.swapareas import Area
from bench.tools.children import BenchError
from bench.tools.content import MIB, PAGE_SIZE
from bench.tools.harness import workspace
from bench.tools.memcg import limited
from bench.tools.report import Figures, Goal, Outcome, main, median, parser, ratios, say
from bench.tools.verdict import in_turn, spread

GOAL = 20.0
TIMES_LIMIT = 4
SHARE = 4  # 1/SHARE of all pages is timed: the slow file takes minutes for all
PARTS = 6  # parts of the timed pages: fewer pairs decide nothing
_SECONDS = 600.0
_AREAS: Mapping[str, Area] = {"hswap": swapareas.hswap, "null": swapareas.null, "zram": swapareas.zram}


def measure(rounds: int = 3, limit: int = 16 * MIB, slow_rounds: int = 1) -> Outcome:
    """Measure all of them."""
    what = f"paging {TIMES_LIMIT} × the memory of a process, hswap against a file behind 5 ms"
    lacking = swapareas.lacks()
    if lacking is not None:
        return Outcome([Goal(what, f"≥ {GOAL:.0f}× faster", f"skipped: {lacking}")], {"skipped": lacking})
    found: dict[str, list[Figures]] = {name: [] for name in (*_AREAS, "slow")}
    with workspace() as space:
        for turn in range(rounds):
            for name, area in in_turn(_AREAS.items(), turn):
                _try(found, name, area, space, limit)
            if turn < slow_rounds:
                _try(found, "slow", swapareas.slow, space, limit)
    per_page = {name: median([one["microseconds_a_page"] for one in some]) for name, some in found.items() if some}
    say("  " + ", ".join(f"{name} {cost:.1f} µs a page in and out" for name, cost in per_page.items()))
    figures: Figures = {"limit_bytes": limit, "working_set_bytes": TIMES_LIMIT * limit, "passes": found}
    figures["microseconds_a_page"] = per_page
    figures["hswap_times"] = times = {name: _against(found["hswap"], found[name]) for name in per_page}
    if found["slow"]:
        faster = spread([1 / ratio for ratio in times["slow"]])
        goals = [Goal(what, f"≥ {GOAL:.0f}× faster", faster.text(".0f", "× faster"), faster.at_least(GOAL))]
    else:
        goals = [Goal(what, f"≥ {GOAL:.0f}× faster", "not measured")]
    for name, words in (("zram", "zram with lz4"), ("null", "a null filesystem used as swap the same way")):
        if found[name]:
            text = spread(times[name]).text(".2f", "× its time")
            text += f", {per_page['hswap']:.0f} against {per_page[name]:.0f} µs a page"
            goals.append(Goal(f"the same, against {words}", "–", text))
    return Outcome(goals, figures)


def _against(some: list[Figures], other: list[Figures]) -> list[float]:
    """Return the ratios of corresponding parts."""
    pairs = zip(some, other, strict=False)
    return [ratio for one, two in pairs for ratio in ratios(one["part_seconds"], two["part_seconds"])]


def _try(found: dict[str, list[Figures]], name: str, area: Area, space: Path, limit: int) -> None:
    """Make one pass; report and skip an area that this machine does not have."""
    say(f"paging to {name}")
    try:
        found[name].append(_pass(area, space, limit))
    except BenchError as error:
        if name in ("hswap", "slow"):
            raise
        say(f"{name}: {error}")


def _pass(area: Area, space: Path, limit: int) -> Figures:
    size = TIMES_LIMIT * limit
    with area(space, 2 * size), limited(limit) as cgroup, pager(cgroup, size) as process:
        process.run("write", _SECONDS)
        before = vmstat()
        timed = [process.run(f"write {size // PAGE_SIZE // SHARE // PARTS}", _SECONDS) for _ in range(PARTS)]
        swapped = {name: value - before[name] for name, value in vmstat().items()}
        count, seconds = sum(part.pages for part in timed), sum(part.seconds for part in timed)
        if swapped["pswpin"] < count // 2:
            raise BenchError(f"only {swapped} of {count} pages were swapped: is the limit for this process?")
        checked = process.run(f"check {count}", _SECONDS)
    if checked.wrong:
        raise BenchError(f"{checked.wrong} of {checked.pages} pages came back wrong")
    return {
        "part_seconds": [part.seconds for part in timed],
        "microseconds_a_page": 1e6 * seconds / count,
        "check_seconds": checked.seconds,
        "major_faults": sum(part.major_faults for part in timed),
        **swapped,
    }


if __name__ == "__main__":
    command = parser(__doc__)
    command.add_argument("--rounds", type=int, default=3)
    command.add_argument("--limit", type=int, default=16, help="MiB that the process may have")
    command.add_argument("--slow-rounds", type=int, default=1, help="rounds in which the slow file takes part")
    asked = command.parse_args()
    main(asked, lambda: measure(asked.rounds, asked.limit * MIB, asked.slow_rounds))
