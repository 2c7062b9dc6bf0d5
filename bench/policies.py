"""Measure the misses of cache and pool on traces, against the policies that others use.

Each case is replayed at four sizes: a cache of 1, 2.5, 5 and 10 % and a pool of 2, 5, 10 and 20 % of its distinct
pages. The engine with a real cache and pool ("ours") and an LRU cache over an exclusive FIFO pool have the same number
of pages in each part. The engine's policy alone, LRU, FIFO, S3-FIFO and Belady's optimum have one cache of both sizes
together (bench/models/replay.py, classic.py). LRU over FIFO has exactly the misses of LRU, so the picture shows only
LRU.

There are three groups of cases:

* traces: those of a directory;
* phases: several of them one after the other, on pages of their own; and a loop that fits after a trace that filled
  the memory with pages used twice, which a policy that protects such pages may never give up;
* back and forth: a range of pages is read forwards, then backwards, and so on. LRU is optimal here, so the figure is
  what our protection against scans costs.

The figure is the change of misses against LRU over FIFO: for each case the mean of its sizes, then the mean of the
group. Counts are exact; only the pages' content is random, and seeded.

    python -m bench.policies --traces DIR [--only NAME …] [--limit REQUESTS] [--out FILE]
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.models import classic
from bench.models.replay import Sizes, replay_engine, replay_policy
from bench.tools import draw, traces
from bench.tools.report import Figures, Goal, Outcome, main, parser, say
from bench.tools.verdict import Verdict, judged

SHARES = ((0.01, 0.02), (0.025, 0.05), (0.05, 0.10), (0.10, 0.20))
OURS, ALONE, BASELINE = "ours", "policy alone", "LRU + FIFO"
TRACES, PHASES, BACK_AND_FORTH = "traces", "phases", "back and forth"

# Percent, in the mean of a group.
GOALS = {TRACES: -12.0, PHASES: -7.0, BACK_AND_FORTH: 3.0}
WORST_GOAL = 10.0

LOOP = "loop"  # of four fifths of the memory
_LOOP_ROUNDS = 25
_PHASES = (
    ("lirs_multi1", "lirs_multi2", "lirs_multi3"),
    ("lirs_sprite", "lirs_2_pools"),
    ("lirs_2_pools", "lirs_loop", "lirs_sprite"),
    ("P3", "OLTP"),
    ("lirs_multi2", LOOP),
)
_RANGE_PAGES = 5000
_PASSES = 40


@dataclass(frozen=True, slots=True)
class Case:
    """What is replayed: a trace, several and perhaps a loop one after the other, or none: back and forth."""

    group: str
    name: str
    paths: tuple[Path, ...] = ()
    loop: bool = False


@dataclass(frozen=True, slots=True)
class Task:
    """One replay of one case at one size pair, under every policy. `limit` is for each trace of the case."""

    case: Case
    shares: tuple[float, float]
    limit: int


@dataclass(frozen=True, slots=True)
class Result:
    """The misses of one replay."""

    case: Case
    shares: tuple[float, float]
    sizes: Sizes
    requests: int
    footprint: int
    misses: dict[str, int]  # by policy

    def change(self, policy: str) -> float:
        """Percent more misses than the baseline; negative is better."""
        return 100.0 * (self.misses[policy] - self.misses[BASELINE]) / self.misses[BASELINE]


def replay(task: Task) -> Result:
    """Replay a case under every policy."""
    case = task.case
    pages = _concatenated([traces.read(path, task.limit) for path in case.paths])
    if case.group == BACK_AND_FORTH:
        pages = back_and_forth(_RANGE_PAGES, _PASSES)[: task.limit or None]
    footprint = len(set(pages))
    sizes = Sizes.of(footprint, *task.shares)
    if case.loop:
        loop = array("q", range(sizes.pages * 4 // 5)) * _LOOP_ROUNDS
        pages = _concatenated([pages, loop])
    misses = {
        OURS: replay_engine(pages, sizes),
        ALONE: replay_policy(pages, sizes.pages),
        BASELINE: classic.lru_over_fifo(pages, sizes.cache, sizes.pool),
    }
    misses |= {name: count(pages, sizes.pages) for name, count in classic.POLICIES.items()}
    return Result(case, task.shares, sizes, len(pages), len(set(pages)), misses)


def _concatenated(parts: Sequence[array[int]]) -> array[int]:
    """Return traces one after the other, the pages of each behind those of the one before."""
    pages, start = array("q"), 0
    for part in parts:
        pages.extend(array("q", (start + page for page in part)) if start else part)
        start = max(pages, default=-1) + 1
    return pages


def back_and_forth(count: int, passes: int) -> array[int]:
    """Return `passes` passes over pages 0..count-1, each second one backwards."""
    forth = array("q", range(count))
    back = forth[::-1]
    pages = array("q", forth)
    for number in range(1, passes):
        pages.extend(back[1:] if number % 2 else forth[1:])  # the page where it turns is read once
    return pages


def cases(paths: Sequence[Path]) -> list[Case]:
    """Return the cases that can be made of traces, the shortest first."""
    found = {traces.title(path): path for path in paths}
    made = [Case(TRACES, name, (path,)) for name, path in found.items()]
    for names in _PHASES:
        parts = [name for name in names if name != LOOP]
        if all(name in found for name in parts):
            made.append(Case(PHASES, " + ".join(names), tuple(found[name] for name in parts), LOOP in names))
    made.append(Case(BACK_AND_FORTH, BACK_AND_FORTH))
    return sorted(made, key=lambda case: sum(path.stat().st_size for path in case.paths))


def measure(directory: Path | None, only: Sequence[str] = (), limit: int = 0) -> Outcome:
    """Replay all traces of a directory, and what is made of them."""
    paths = traces.names(directory) if directory is not None and directory.is_dir() else []
    paths = [path for path in paths if not only or traces.title(path) in only]
    if not paths:
        where = "no --traces DIR was given" if directory is None else f"no traces in {directory.name}"
        say(f"policies: skipped: {where}")
        return Outcome(_goals({}), {"skipped": where})
    # The longest first, so that all cores end together.
    tasks = [Task(case, shares, limit) for case in reversed(cases(paths)) for shares in reversed(SHARES)]
    say(f"policies: {len(tasks)} replays of {len(tasks) // len(SHARES)} cases on {os.cpu_count()} cores")
    results: list[Result] = []
    for result in traces.on_all_cores(replay, tasks):
        results.append(result)
        cache, pool = result.shares
        say(
            f"  {result.case.name:<16} cache {cache:5.1%} pool {pool:5.1%}"
            f"  {result.misses[OURS]:>8} misses, {result.misses[BASELINE]:>8} by {BASELINE}:"
            f" {result.change(OURS):+6.1f} %"
        )
    return _summarize(sorted(results, key=lambda result: (result.case.name, result.shares)))


def _summarize(results: Sequence[Result]) -> Outcome:
    groups = {group: _group([result for result in results if result.case.group == group]) for group in GOALS}
    for group, found in groups.items():
        if found:
            of_all = ", ".join(f"{policy} {its['mean']:+.1f} %" for policy, its in found["policies"].items())
            say(f"  {group}, in the mean of all: {of_all}")
    figures: Figures = {
        "unit": f"percent change of misses against {BASELINE}",
        **groups[TRACES],
        "groups": {group: found for group, found in groups.items() if found},
        "replays": [_plain(result) for result in results],
    }
    return Outcome(_goals(figures), figures)


def _group(results: Sequence[Result]) -> Figures:
    """Return the changes of the cases of a group, their mean and the worst; for us, and for every policy."""
    if not results:
        return {}
    changes: dict[str, dict[str, float]] = {policy: {} for policy in results[0].misses}
    for name in sorted({result.case.name for result in results}):
        mine = [result for result in results if result.case.name == name]
        for policy, found in changes.items():
            found[name] = sum(result.change(policy) for result in mine) / len(mine)
        say(f"  {name:<16} {changes[OURS][name]:+6.1f} % misses in the mean of its sizes")
    of_all = {policy: sum(found.values()) / len(found) for policy, found in changes.items()}
    return {
        "traces": changes[OURS],
        "policies": {policy: {"mean": of_all[policy], "traces": changes[policy]} for policy in changes},
        "mean": of_all[OURS],
        "worst": max(changes[OURS].values()),
    }


def _plain(result: Result) -> Figures:
    return {
        "group": result.case.group,
        "trace": result.case.name,
        "cache_share": result.shares[0],
        "pool_share": result.shares[1],
        "cache_pages": result.sizes.cache,
        "pool_pages": result.sizes.pool,
        "requests": result.requests,
        "distinct_pages": result.footprint,
        "misses": result.misses[OURS],
        "baseline_misses": result.misses[BASELINE],
        "change_percent": result.change(OURS),
        "policies": result.misses,
    }


def _goals(figures: Figures) -> list[Goal]:
    groups = figures.get("groups", {})
    asked = [(f"{group}: misses in the mean", group, "mean", limit) for group, limit in GOALS.items()]
    asked.insert(1, (f"{TRACES}: misses of the worst", TRACES, "worst", WORST_GOAL))
    goals = []
    for what, group, key, limit in asked:
        value = groups.get(group, {}).get(key)
        result = "skipped: no traces" if value is None else f"{value:+.1f} %"
        verdict = Verdict.REPORTED if value is None else judged(value <= limit)
        goals.append(Goal(f"{what}, against {BASELINE}", f"≤ {limit:+.0f} %", result, verdict))
    return goals


def picture(figures: Figures, path: Path) -> None:
    """Draw the miss ratio over the size, a small picture a trace."""
    parts: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for found in figures["replays"]:
        if found["group"] != TRACES:
            continue
        size = 100 * (found["cache_share"] + found["pool_share"])
        series = parts.setdefault(found["trace"], {})
        for policy in (OURS, *classic.POLICIES):
            misses = found["policies"][policy]
            series.setdefault(policy, []).append((size, misses / found["requests"]))
    labels = "cache and pool together, % of the distinct pages", "miss ratio"
    draw.panels(path, "Misses of each trace under each policy: lower is better", parts, labels)


if __name__ == "__main__":
    command = parser(__doc__)
    traces.arguments(command)
    asked = command.parse_args()
    main(asked, lambda: measure(asked.traces, asked.only, asked.limit), picture)
