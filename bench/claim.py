"""Measure whether memory that one guest does not use is there for the others at once.

Six guests, each a real mount, share the same total memory: six times X and once Y (bench/subjects/guests.py).

(a) static: each has X + Y/6 of cache, and no pool
(b) balloon: every 5 s a controller moves memory between the caches with the hysteresis of Linux's xen-selfballoon:
    what lacks at once, an eighth of a surplus. Quick balloon: every 0.5 s, all of a surplus
(c) tmemd with the policy greedy, pages uncompressed
(d) tmemd with its default policy, pages uncompressed
(e) tmemd as shipped, pages compressed
(f) limit: one cache of all the memory, in one process

Loads, seeded and the same in every arm, on backings of 5 ms and 0.5 ms a request:

*zipf*: fio reads 16-KiB blocks of a working set of eight times X. In each step two guests are busy. The first two are
busy again in the last step, so an arm that takes everything from an idle guest pays for it there.
*programs*: C builds, grep, sqlite queries and Python imports, each twice.
*traces*: six traces, replayed as file reads by all guests at the same time.

Reported are the pages read from the backings; the time of each step (fio's own, without its start) and its ratio to the
same step of another arm, lowest to highest; the mounts' processor time; fio's p50 and p99; and how long busy guests
take until half of their working set is in memory. The arms run one after the other, so only pages are judged: times of
single steps vary by a quarter on a shared machine.

    python -m bench.claim [--requests 2400] [--steps 4] [--cache 2] [--traces DIR] [--only LOAD …] [--out FILE]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from bench.subjects import guestloads
from bench.subjects.guestloads import Done
from bench.subjects.guests import ARMS, Guests, Shape, Watching, sharing
from bench.tools import draw, traces
from bench.tools.content import MIB, PAGE_SIZE
from bench.tools.harness import fast_workspace
from bench.tools.report import Figures, Goal, Outcome, main, median, parser, ratios, say
from bench.tools.verdict import Spread, Verdict, judged, spread

GUESTS = 6
BUSY = 2  # at the same time
POOL_TIMES, SET_TIMES = 12, 8  # Y and the working set, in X
HAS = 0.5  # of the working set
BACKINGS = {"5 ms": "latency=5ms", "0.5 ms": "latency=0.5ms"}
TRACE_REQUESTS = 1500
TRACE_SHARES = 0.05, 0.35  # X of a guest's pages, Y of all guests' pages
OURS = "e shipped"
OTHERS = {
    "a static": "a static split",
    "b balloon": "ballooning",
    "b quick balloon": "quick ballooning",
    "f limit": "one cache of all",
}
Step = Callable[[Sequence[Path], int], Done]


def measure(
    requests: int = 2400,
    steps: int = 4,
    cache: int = 2 * MIB,
    directory: Path | None = None,
    only: Sequence[str] = (),
    backings: Sequence[str] = tuple(BACKINGS),
    count: int = GUESTS,
    arms: Sequence[str] = ARMS,
) -> Outcome:
    """Measure every load in every arm."""
    shape = Shape(cache, POOL_TIMES * cache)
    figures: Figures = {"cache_bytes": cache, "pool_bytes": shape.pool, "guests": count, "loads": {}, "notes": []}
    wanted = [load for load in ("zipf", "programs", "traces") if not only or load in only]
    with fast_workspace() as space:
        if "zipf" in wanted:
            say("zipf")
            size = SET_TIMES * cache
            sources = _sources(space / "zipf", count, lambda source, seed: guestloads.make_blocks(source, size, seed))
            for backing in backings:
                step = lambda places, seed: guestloads.zipf(places, requests, seed)  # noqa: E731
                figures["loads"][f"zipf, {backing}"] = _stepped(space, sources, shape, backing, step, steps, size, arms)
        if "programs" in wanted:
            say("programs")
            sources = _sources(space / "programs", count, guestloads.make_programs)
            for backing in backings:
                found = _stepped(space, sources, shape, backing, guestloads.programs, 1, 0, arms)
                figures["loads"][f"programs, {backing}"] = found
        if "traces" in wanted:
            paths = traces.names(directory)[:GUESTS] if directory is not None else []
            if len(paths) == GUESTS:
                say("traces")
                figures["loads"] |= _traces(space, paths, min(TRACE_REQUESTS, requests))
            else:
                figures["notes"].append("replayed traces were skipped: six are needed, give --traces DIR")
    return Outcome(_goals(figures), figures)


def _sources(directory: Path, count: int, make: Callable[[Path, int], None]) -> list[Path]:
    """Return a new directory for each guest, filled by `make`."""
    sources = []
    for number in range(count):
        source = directory / f"guest{number}"
        source.mkdir(parents=True)
        make(source, number + 1)
        sources.append(source)
    return sources


def _stepped(
    space: Path,
    sources: Sequence[Path],
    shape: Shape,
    backing: str,
    step: Step,
    steps: int,
    size: int,
    arms: Sequence[str],
) -> Figures:
    """Run the steps of a load in each arm."""
    found: Figures = {}
    for arm in arms:
        with sharing(arm, space, sources, shape, BACKINGS[backing]) as guests:
            found[arm] = _steps(guests, step, steps, size)
        _tell(backing, arm, found[arm])
    return found


def _steps(guests: Guests, step: Step, steps: int, size: int) -> Figures:
    done: list[Done] = []
    until: list[float | None] = []
    held: list[int] = []
    taken = [_taken(guests)]
    for number in range(steps):
        busy = [(number * BUSY + place) % len(guests.paths) for place in range(BUSY)]
        with Watching(guests, busy) as watching:
            done.append(step([guests.paths[guest] for guest in busy], number + 1))
        taken.append(_taken(guests))
        if number and size:  # in the first step all memory is free
            until += watching.seconds_until(int(HAS * size))
            held += watching.max_held()
    figures = _figures(taken, done)
    if done[0].p50:
        figures["p50_seconds"] = median([value for one in done for value in one.p50])
        figures["p99_seconds"] = median([value for one in done for value in one.p99])
    if size and len(guests.mounts) > 1:
        reached = [value for value in until if value is not None]
        figures["seconds_until_memory"] = median(reached) if 2 * len(reached) > len(until) else None
        figures["most_held_share"] = median([each / size for each in held]) if held else None
    return figures


def _taken(guests: Guests) -> tuple[int, float]:
    """Return the pages read from the backings and the processor time so far."""
    return guests.backing_pages(), guests.processor_seconds()


def _figures(taken: Sequence[tuple[int, float]], done: Sequence[Done]) -> Figures:
    """Return the figures of a load, in total and by step; `taken` is from before each step and after the last."""
    steps: dict[str, list[float]] = {
        "backing_pages": [after - before for (before, _), (after, _) in pairwise(taken)],
        "seconds": [one.seconds for one in done],
        "processor_seconds": [after - before for (_, before), (_, after) in pairwise(taken)],
    }
    return {
        **{name: sum(values) for name, values in steps.items()},
        **{f"step_{name}": values for name, values in steps.items()},
    }


def _traces(space: Path, paths: Sequence[Path], requests: int) -> Figures:
    """Replay a trace in each guest, all at the same time."""
    counts: list[int] = []
    sources = _sources(
        space / "traces",
        GUESTS,
        lambda source, seed: counts.append(guestloads.make_replay(source, paths[seed - 1], requests, seed)),
    )
    total = PAGE_SIZE * sum(counts)
    # At least 2 MiB: a smaller cache reads nothing ahead, and the arms would differ.
    shape = Shape(max(2 * MIB, int(total * TRACE_SHARES[0] / GUESTS)), int(total * TRACE_SHARES[1]))
    loads: Figures = {}
    for backing, throttle in BACKINGS.items():
        found: Figures = {}
        for arm in ARMS:
            with sharing(arm, space, sources, shape, throttle) as guests:
                before = _taken(guests)
                done = [guestloads.replays(sources, guests.paths)]
                found[arm] = _figures([before, _taken(guests)], done)
            _tell(backing, arm, found[arm])
        loads[f"traces, {backing}"] = found
    return loads


def _tell(load: str, arm: str, found: Figures) -> None:
    text = f"  {load:<7} {arm:<15} {found['backing_pages']:>8,} backing pages {found['seconds']:5.1f} s"
    text += f" {found['processor_seconds']:5.1f} s of processor"
    if "p50_seconds" in found:
        text += f"  p50 {1e3 * found['p50_seconds']:6.2f} ms  p99 {1e3 * found['p99_seconds']:6.2f} ms"
    if "most_held_share" in found:
        until, share = found["seconds_until_memory"], found["most_held_share"]
        text += f"  has its memory after {'never' if until is None else f'{until:.1f} s'}"
        text += "" if share is None else f", at most {share:.0%} of the working set"
    say(text)


def _goals(figures: Figures) -> list[Goal]:
    """Return goals that compare tmemd as shipped with the other arms: pages are judged, times reported."""
    goals = []
    for load, arms in figures["loads"].items():
        for other, word in OTHERS.items():
            if other not in arms or OURS not in arms:
                continue
            pages = arms[OURS]["backing_pages"] / max(arms[other]["backing_pages"], 1)
            time = spread(ratios(arms[OURS]["step_seconds"], arms[other]["step_seconds"]))
            processor = arms[OURS]["processor_seconds"] / max(arms[other]["processor_seconds"], 0.01)
            text = f"{pages:.2f}× the pages, {time.text('.2f', '× the time')}, {processor:.2f}× the processor time"
            is_limit = other == "f limit"
            goal = "–" if is_limit else "fewer pages"
            verdict = Verdict.REPORTED if is_limit else judged(pages < 1.0)
            goals.append(Goal(f"{load}: tmemd as shipped against {word}", goal, text, verdict))
    return goals


def picture(figures: Figures, path: Path) -> None:
    """Draw the pages read from the backings in all arms, as shares of the static split's."""
    groups = {
        load: {arm: _share("backing_pages", found, arms["a static"]) for arm, found in arms.items()}
        for load, arms in figures["loads"].items()
    }
    title = f"Pages read from the slow directories: {figures['guests']} guests, the same memory in every arm"
    draw.bars(path, title, groups, "× the static split (less is better)", form="{:.2f}")


def _share(key: str, found: Figures, other: Figures) -> Spread:
    """Return the ratio of two arms in total, with the interval of their steps."""
    steps = zip(found[f"step_{key}"], other[f"step_{key}"], strict=True)
    interval = spread([one / max(two, 0.01) for one, two in steps])
    return replace(interval, median=found[key] / max(other[key], 0.01))


if __name__ == "__main__":
    command = parser(__doc__)
    command.add_argument("--requests", type=int, default=2400, help="of fio, a busy guest and step")
    command.add_argument("--steps", type=int, default=4)
    command.add_argument("--cache", type=int, default=2, help="MiB of each guest's cache, its X")
    command.add_argument("--guests", type=int, default=GUESTS, help="other than six for a small run; traces take six")
    command.add_argument("--fast", action="store_true", help="only the backing with 0.5 ms")
    command.add_argument("--traces", type=Path, help="directory with the traces")
    command.add_argument("--only", nargs="*", default=[], help="zipf, programs, traces")
    asked = command.parse_args()
    backings = tuple(BACKINGS)[1:] if asked.fast else tuple(BACKINGS)
    settings = asked.requests, asked.steps, asked.cache * MIB, asked.traces, asked.only, backings, asked.guests
    main(asked, lambda: measure(*settings), picture)
