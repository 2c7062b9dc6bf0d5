"""What it costs to page to a mount: a process that works on four times the memory it may have.

Measured: the time a page, over a random quarter of all pages, of writing them anew: for most of them a page comes in
and another goes out. In the same run, with the same process, the same content (2:1 compressible) and the same limit, it
swaps in turn to a mount's hswap file whose pool holds everything, to a null pyfuse3 filesystem that keeps the bytes and
does nothing else, to zram with lz4, and to a file on a mount whose directory takes 5 ms a request. Every page is
written before and every byte of a quarter compared afterwards. The figures are medians of ratios of neighbouring
passes; the slow file takes part in one of them.

The goal is on the slow file. zram is in the kernel: its ratio says what the way through FUSE and Python costs.

    python -m bench.swap [--rounds 3] [--limit 16] [--slow-rounds 1] [--out FILE]

Needs root, loop devices and a memory cgroup; nothing else may be swapped to meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bench.subjects import swapareas
from bench.subjects.paging import Round, pager, vmstat
from bench.subjects.swapareas import Area
from bench.tools import draw
from bench.tools.children import BenchError
from bench.tools.content import PAGE_SIZE
from bench.tools.harness import workspace
from bench.tools.memcg import limited
from bench.tools.report import Figures, Goal, Outcome, bars, main, median, parser, ratios, say

GOAL = 20.0
MIB = 1 << 20
TIMES_LIMIT = 4
PARTS = 4  # of all pages, how many are timed: the slow file takes minutes for all of them
_SECONDS = 600.0
_AREAS: Mapping[str, Area] = {"hswap": swapareas.hswap, "null": swapareas.null, "zram": swapareas.zram}


def measure(rounds: int = 3, limit: int = 16 * MIB, slow_rounds: int = 1) -> Outcome:
    """Measure all of them."""
    what = f"paging {TIMES_LIMIT} × the memory of a process, hswap against a file behind 5 ms"
    lacking = swapareas.lacks()
    if lacking is not None:
        return Outcome([Goal(what, f"≥ {GOAL:.0f}× faster", f"skipped: {lacking}", None)], {"skipped": lacking})
    found: dict[str, list[Figures]] = {name: [] for name in (*_AREAS, "slow")}
    with workspace() as space:
        for turn in range(rounds):
            for name, area in _AREAS.items():
                _try(found, name, area, space, limit)
            if turn < slow_rounds:
                _try(found, "slow", swapareas.slow, space, limit)
    per_page = {name: median([one["microseconds_a_page"] for one in some]) for name, some in found.items() if some}
    say(bars(per_page, "µs a page in and out"))
    figures: Figures = {"limit_bytes": limit, "working_set_bytes": TIMES_LIMIT * limit, "passes": found}
    figures["microseconds_a_page"] = per_page
    figures["hswap_against"] = {
        name: median(ratios(*(_times(found[which], found[name]) for which in ("hswap", name))))
        for name in ("null", "zram", "slow")
        if found[name]
    }
    against = figures["hswap_against"]
    faster = 1 / against["slow"] if "slow" in against else None
    result = f"{faster:.0f}× faster" if faster is not None else "not measured"
    goals = [Goal(what, f"≥ {GOAL:.0f}× faster", result, None if faster is None else faster >= GOAL)]
    for name, words in (("zram", "zram with lz4"), ("null", "a null filesystem used as swap the same way")):
        if name in against:
            text = f"{against[name]:.2f}× its time ({per_page['hswap']:.0f} against {per_page[name]:.0f} µs a page)"
            goals.append(Goal(f"the same, against {words}", "–", text, None))
    return Outcome(goals, figures)


def picture(figures: Figures, path: Path) -> None:
    """Draw what a page costs."""
    names = {"slow": "slow file"}
    costs = {names.get(name, name): cost for name, cost in figures["microseconds_a_page"].items()}
    title = f"Paging {TIMES_LIMIT} × the memory of a process: a page in and out"
    draw.bars(path, title, {"swap to": costs}, "µs a page", log=True)


def _times(some: list[Figures], other: list[Figures]) -> list[float]:
    """Give the seconds of the passes that both have."""
    return [one["seconds"] for one in some[: min(len(some), len(other))]]


def _try(found: dict[str, list[Figures]], name: str, area: Area, space: Path, limit: int) -> None:
    """Make one pass; what this machine does not have is said and left out."""
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
        timed: Round = process.run(f"write {size // PAGE_SIZE // PARTS}", _SECONDS)
        swapped = {name: value - before[name] for name, value in vmstat().items()}
        if swapped["pswpout"] < timed.pages // 2 or swapped["pswpin"] < timed.pages // 2:
            raise BenchError(f"only {swapped} of {timed.pages} pages were swapped: is the limit for this process?")
        checked = process.run(f"check {timed.pages}", _SECONDS)
    if checked.wrong:
        raise BenchError(f"{checked.wrong} of {checked.pages} pages came back wrong")
    return {
        "seconds": timed.seconds,
        "microseconds_a_page": 1e6 * timed.seconds / timed.pages,
        "check_seconds": checked.seconds,
        "major_faults": timed.major_faults,
        **swapped,
    }


if __name__ == "__main__":
    command = parser(__doc__)
    command.add_argument("--rounds", type=int, default=3)
    command.add_argument("--limit", type=int, default=16, help="MiB that the process may have")
    command.add_argument("--slow-rounds", type=int, default=1, help="rounds in which the slow file takes part")
    asked = command.parse_args()
    main(asked, lambda: measure(asked.rounds, asked.limit * MIB, asked.slow_rounds), picture)
