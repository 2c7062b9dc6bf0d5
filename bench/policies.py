"""Which page goes first: traces replayed through the real cache and pool, against LRU cache + FIFO pool.

Measured: misses at four size pairs (cache 1, 2.5, 5 and 10 %, pool 2, 5, 10 and 20 % of the distinct pages of the
trace), both sides with exactly the same number of pages (bench/replay.py). The figure is the change of the misses in
percent: for each trace its mean over the sizes, and the mean of the traces. Replays share nothing, so they run on
all cores. Nothing is random but the content of the pages, which is seeded.

    python -m bench.policies --traces DIR [--only NAME …] [--limit REQUESTS] [--out FILE]
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import traces
from bench.children import BenchError
from bench.replay import Sizes, replay_baseline, replay_real
from bench.report import Figures, Goal, Outcome, main, parser, say

SHARES = ((0.01, 0.02), (0.025, 0.05), (0.05, 0.10), (0.10, 0.20))
MEAN_GOAL, WORST_GOAL = -5.0, 10.0  # percent


@dataclass(frozen=True, slots=True)
class Task:
    """One replay of one trace at one size pair, on both sides."""

    path: Path
    shares: tuple[float, float]
    limit: int


@dataclass(frozen=True, slots=True)
class Result:
    """What a replay counted."""

    trace: str
    shares: tuple[float, float]
    sizes: Sizes
    requests: int
    footprint: int
    misses: int
    baseline: int

    @property
    def change(self) -> float:
        """Percent more misses than the baseline; negative is better."""
        return 100.0 * (self.misses - self.baseline) / self.baseline


def replay(task: Task) -> Result:
    """Replay a trace on both sides."""
    pages = traces.read(task.path, task.limit)
    footprint = len(set(pages))
    sizes = Sizes.of(footprint, *task.shares)
    misses, baseline = replay_real(pages, sizes), replay_baseline(pages, sizes)
    return Result(traces.title(task.path), task.shares, sizes, len(pages), footprint, misses, baseline)


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
    with multiprocessing.get_context("spawn").Pool(os.cpu_count(), _ignore_interrupts) as workers:
        for result in workers.imap_unordered(replay, tasks):  # the longest first, so that the cores end together
            results.append(result)
            cache, pool = result.shares
            say(
                f"  {result.trace:<16} cache {cache:5.1%} pool {pool:5.1%}"
                f"  {result.misses:>8} misses, {result.baseline:>8} by LRU + FIFO: {result.change:+6.1f} %"
            )
    return _summarize(results)


def _ignore_interrupts() -> None:
    """Leave a Ctrl-C to the parent, which terminates its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _summarize(results: Sequence[Result]) -> Outcome:
    means: dict[str, float] = {}
    for name in sorted({result.trace for result in results}):
        changes = [result.change for result in results if result.trace == name]
        means[name] = sum(changes) / len(changes)
        say(f"  {name:<16} {means[name]:+6.1f} % misses in the mean of its sizes")
    figures: Figures = {
        "unit": "percent change of misses against LRU + FIFO",
        "traces": means,
        "mean": sum(means.values()) / len(means),
        "worst": max(means.values()),
        "replays": [_plain(result) for result in sorted(results, key=lambda r: (r.trace, r.shares))],
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
        "misses": result.misses,
        "baseline_misses": result.baseline,
        "change_percent": result.change,
    }


def _goals(figures: Figures) -> list[Goal]:
    goals = []
    for what, key, most in (("in the mean", "mean", MEAN_GOAL), ("of the worst trace", "worst", WORST_GOAL)):
        text = f"traces through the real objects, misses {what} against LRU + FIFO"
        value = figures.get(key)
        result = "skipped: no traces" if value is None else f"{value:+.1f} %"
        goals.append(Goal(text, f"≤ {most:+.0f} %", result, None if value is None else value <= most))
    return goals


if __name__ == "__main__":
    command = parser(__doc__)
    command.add_argument("--traces", type=Path, help="directory with the traces")
    command.add_argument("--only", nargs="*", default=[], help="names of traces, without suffixes")
    command.add_argument("--limit", type=int, default=0, help="replay only the first so many requests of each")
    asked = command.parse_args()
    if asked.limit < 0:
        raise BenchError("--limit is a number of requests")
    main(asked, lambda: measure(asked.traces, asked.only, asked.limit))
