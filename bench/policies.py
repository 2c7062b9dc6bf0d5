"""Measure the misses of cache and pool on traces, against the policies that others use.

Traces are replayed at four sizes: a cache of 1, 2.5, 5 and 10 % and a pool of 2, 5, 10 and 20 % of the trace's distinct
pages. The real cache and pool (bench/models/replay.py) and an LRU cache over an exclusive FIFO pool have the same
number of pages in each part. LRU, FIFO, S3-FIFO and Belady's optimum have one cache of both sizes together
(bench/models/classic.py). LRU over FIFO has exactly the misses of LRU, so the picture shows only LRU.

The figure is the change of misses against LRU over FIFO: for each trace the mean of its sizes, then the mean of the
traces. Counts are exact; only the pages' content is random, and seeded.

    python -m bench.policies --traces DIR [--only NAME …] [--limit REQUESTS] [--out FILE]
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.models import classic
from bench.models.replay import Sizes, replay_real
from bench.tools import draw, traces
from bench.tools.report import Figures, Goal, Outcome, main, parser, say
from bench.tools.verdict import Verdict, judged

SHARES = ((0.01, 0.02), (0.025, 0.05), (0.05, 0.10), (0.10, 0.20))
OURS, BASELINE = "ours", "LRU + FIFO"
MEAN_GOAL, WORST_GOAL = -5.0, 10.0  # percent


@dataclass(frozen=True, slots=True)
class Task:
    """One replay of one trace at one size pair, on both sides."""

    path: Path
    shares: tuple[float, float]
    limit: int


@dataclass(frozen=True, slots=True)
class Result:
    """The misses of one replay."""

    trace: str
    shares: tuple[float, float]
    sizes: Sizes
    requests: int
    footprint: int
    misses: dict[str, int]  # by policy

    def change(self, policy: str) -> float:
        """Percent more misses than the baseline; negative is better."""
        return 100.0 * (self.misses[policy] - self.misses[BASELINE]) / self.misses[BASELINE]


def replay(task: Task) -> Result:
    """Replay a trace under every policy."""
    pages = traces.read(task.path, task.limit)
    footprint = len(set(pages))
    sizes = Sizes.of(footprint, *task.shares)
    misses = {OURS: replay_real(pages, sizes), BASELINE: classic.lru_over_fifo(pages, sizes.cache, sizes.pool)}
    misses |= {name: count(pages, sizes.cache + sizes.pool) for name, count in classic.POLICIES.items()}
    return Result(traces.title(task.path), task.shares, sizes, len(pages), footprint, misses)


def measure(directory: Path | None, only: Sequence[str] = (), limit: int = 0) -> Outcome:
    """Replay all traces of a directory."""
    paths = traces.names(directory) if directory is not None and directory.is_dir() else []
    paths = [path for path in paths if not only or traces.title(path) in only]
    if not paths:
        where = "no --traces DIR was given" if directory is None else f"no traces in {directory.name}"
        say(f"policies: skipped: {where}")
        return Outcome(_goals({}), {"skipped": where})
    tasks = [Task(path, shares, limit) for path in reversed(paths) for shares in reversed(SHARES)]
    say(f"policies: {len(tasks)} replays of {len(paths)} traces on {os.cpu_count()} cores")
    results: list[Result] = []
    for result in traces.on_all_cores(replay, tasks):  # longest first, so that all cores end together
        results.append(result)
        cache, pool = result.shares
        say(
            f"  {result.trace:<16} cache {cache:5.1%} pool {pool:5.1%}"
            f"  {result.misses[OURS]:>8} misses, {result.misses[BASELINE]:>8} by {BASELINE}:"
            f" {result.change(OURS):+6.1f} %"
        )
    return _summarize(sorted(results, key=lambda result: (result.trace, result.shares)))


def _summarize(results: Sequence[Result]) -> Outcome:
    policies = list(results[0].misses)
    changes: dict[str, dict[str, float]] = {policy: {} for policy in policies}
    for name in sorted({result.trace for result in results}):
        mine = [result for result in results if result.trace == name]
        for policy in policies:
            changes[policy][name] = sum(result.change(policy) for result in mine) / len(mine)
        say(f"  {name:<16} {changes[OURS][name]:+6.1f} % misses in the mean of its sizes")
    means = changes[OURS]
    of_all = {policy: sum(found.values()) / len(found) for policy, found in changes.items()}
    say("  in the mean of all: " + ", ".join(f"{policy} {value:+.1f} %" for policy, value in of_all.items()))
    figures: Figures = {
        "unit": f"percent change of misses against {BASELINE}",
        "traces": means,
        "policies": {policy: {"mean": of_all[policy], "traces": changes[policy]} for policy in policies},
        "mean": sum(means.values()) / len(means),
        "worst": max(means.values()),
        "replays": [_plain(result) for result in results],
    }
    return Outcome(_goals(figures), figures)


def _plain(result: Result) -> Figures:
    return {
        "trace": result.trace,
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
    goals = []
    for what, key, limit in (("in the mean", "mean", MEAN_GOAL), ("of the worst trace", "worst", WORST_GOAL)):
        text = f"traces through the real objects, misses {what} against {BASELINE}"
        value = figures.get(key)
        result = "skipped: no traces" if value is None else f"{value:+.1f} %"
        verdict = Verdict.REPORTED if value is None else judged(value <= limit)
        goals.append(Goal(text, f"≤ {limit:+.0f} %", result, verdict))
    return goals


def picture(figures: Figures, path: Path) -> None:
    """Draw the miss ratio over the size, a small picture a trace."""
    parts: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for found in figures["replays"]:
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
