"""Measure what names and attributes cost, against a filesystem that does nothing.

Calls a second through tmemfs over a local directory and through `bench.subjects.nullfs`, in turn: `stat` of a name that
the kernel has cached; listing a directory of 1,000 entries with attributes; create and unlink of an empty file. Both
sides have an attribute time-out of one second, and answer once before. The figure is the median of the ratios of the
rounds with its interval (bench/tools/verdict.py). The server's processor time a call varies less, and is reported.

    python -m bench.metadata [--pairs 7] [--seconds 0.5] [--out FILE]
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from bench.tools import procmem
from bench.tools.content import MIB
from bench.tools.harness import nullfs, tmemfs, workspace
from bench.tools.report import Figures, Goal, Outcome, main, median, medians, parser, ratios, say
from bench.tools.verdict import in_turn, spread

GOAL = 0.80
NAMES = 1000
Rate = Callable[[Path, float], tuple[int, float]]


def stat_cached(root: Path, seconds: float) -> tuple[int, float]:
    """Call `stat` on one name; return the calls and their time."""
    path = os.fspath(root / "000001")
    return _repeat(lambda: [os.stat(path) for _ in range(1000)], 1000, seconds)


def readdir(root: Path, seconds: float) -> tuple[int, float]:
    """List a directory; a call is one entry."""
    return _repeat(lambda: os.listdir(root), NAMES, seconds)


def create_unlink(root: Path, seconds: float) -> tuple[int, float]:
    """Create and unlink a file; a call is one pair."""
    path = os.fspath(root / "made")

    def pairs() -> None:
        for _ in range(50):
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))
            os.unlink(path)

    return _repeat(pairs, 50, seconds)


def _repeat(work: Callable[[], object], calls: int, seconds: float) -> tuple[int, float]:
    work()  # the first call is not answered by the kernel's cache
    began, done = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < seconds:
        work()
        done += calls
    return done, spent


LOADS: dict[str, Rate] = {"stat of a cached name": stat_cached, "readdir": readdir, "create and unlink": create_unlink}


def measure(pairs: int = 7, seconds: float = 0.5) -> Outcome:
    """Measure each load on both sides in turn."""
    figures: Figures = {}
    goals: list[Goal] = []
    with workspace() as space:
        source = space / "source"
        source.mkdir()
        for number in range(NAMES):
            (source / f"{number:06d}").touch()
        with (
            nullfs(space / "null", MIB, NAMES) as null,
            tmemfs(source, space / "mount", cache=16 * MIB, pool=16 * MIB) as mount,
        ):
            sides = {"null": (null.path, null.pid), "tmemfs": (mount.path, mount.pid)}
            for name, load in LOADS.items():
                figures[name] = _in_turn(name, load, sides, pairs, seconds)
                ratio = spread(figures[name]["ratios"])
                what = f"{name}, against a null filesystem"
                goals.append(Goal(what, f"≥ {GOAL:.2f}×", ratio.text(".2f", "×"), ratio.at_least(GOAL)))
    return Outcome(goals, figures)


def _in_turn(name: str, load: Rate, sides: dict[str, tuple[Path, int]], pairs: int, seconds: float) -> Figures:
    rates: dict[str, list[float]] = {side: [] for side in sides}
    processor: dict[str, list[float]] = {side: [] for side in sides}
    for pair in range(pairs):
        for side, (root, pid) in in_turn(sides.items(), pair):
            used = procmem.run_seconds(pid)
            calls, spent = load(root, seconds)
            rates[side].append(calls / spent)
            processor[side].append(1e6 * (procmem.run_seconds(pid) - used) / max(calls, 1))
    found = ratios(rates["tmemfs"], rates["null"])
    spent_on = {side: median(values) for side, values in processor.items()}
    costs = ", ".join(f"{spent:.1f} {side}" for side, spent in spent_on.items())
    say(f"{name}: {spread(found).text('.2f', '×')}, processor µs a call: {costs}")
    say(medians(rates, "/s"))
    return {"calls_a_second": rates, "ratios": found, "processor_microseconds_a_call": spent_on}


if __name__ == "__main__":
    command = parser(__doc__)
    command.add_argument("--pairs", type=int, default=7)
    command.add_argument("--seconds", type=float, default=0.5, help="of each side in each round")
    asked = command.parse_args()
    main(asked, lambda: measure(asked.pairs, asked.seconds))
