"""Measure how well tmemd divides memory between guests, by simulation, against other ways to divide it.

Traces are the guests of the real lender (bench/models/lent.py), each with an LRU cache before a pool in the real
pool's order (bench/models/slotpool.py). Measured are the misses of all guests together. The memory is 5, 10 and 20 %
of the traces' distinct pages; each cache has half of that share of its trace. All guests take equally long, at a
thousand requests a second in sum. Slabs are lent by each policy of tmemd and of bench/models/reclaimpolicies.py.

Compared with (bench/models/splits.py): equal parts, one common FIFO pool, one common pool, and the best
fixed parts, which are known only afterwards. Measured as well: guests of a user each; guests with a floor of half an
equal part, against a pool of that floor alone; and guests that are busy in turn, for 0.5, 5 and 60 s. Synthetic traces
are left out unless they are named. Counts are exact; nothing is random.

    python -m bench.division --traces DIR [--only NAME …] [--limit REQUESTS] [--out FILE]
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bench.models import splits
from bench.models.lent import LentMemory
from bench.models.reclaimpolicies import COMPARED
from bench.models.slotpool import Stream, stream
from bench.tools import traces
from bench.tools.report import Figures, Goal, Outcome, main, parser, say
from bench.tools.verdict import Verdict, judged
from tmem.lending.lender.reclaimpolicy import DEFAULT

SHARES = (0.05, 0.10, 0.20)
SYNTHETIC = ("lirs_loop", "lirs_2_pools")
RATE = 1000.0  # requests a second of all guests
PHASES = (0.5, 5.0, 60.0)  # seconds that a guest is busy when it is its turn
PHASED_SHARE, PHASED_REQUESTS = 0.10, 60_000
NEAR_GOAL, FLOOR_SLACK, TURNS_GOAL = 5.0, 1.0, 2.0  # percent


@dataclass(frozen=True, slots=True)
class Setting:
    """Guests and the memory between them."""

    paths: tuple[Path, ...]
    limit: int
    share: float

    def streams(self) -> list[Stream]:
        """Return the guests."""
        return [_stream(path, self.limit, self.share / 2) for path in self.paths]

    def slabs(self) -> int:
        """Return how many slabs there are in sum."""
        return max(len(self.paths), round(sum(one.footprint for one in self.streams()) * self.share / 16))


@cache
def _stream(path: Path, limit: int, cache_share: float) -> Stream:
    return stream(traces.title(path), traces.read(path, limit), cache_share)


# Each runs in a worker and returns its figure.


def lent(setting: Setting, division: str) -> int:
    """Count the misses with lent memory."""
    return sum(_lend(setting, division))


def lent_to_users(setting: Setting, division: str) -> int:
    """Count the misses with memory lent to guests of different users."""
    return sum(_lend(setting, division, user_each=True))


def _lend(setting: Setting, division: str, floors: Sequence[int] = (), *, user_each: bool = False) -> list[int]:
    guests = setting.streams()
    memory = LentMemory(guests, setting.slabs(), COMPARED[division], floors, user_each=user_each)
    seconds = sum(one.requests for one in guests) / RATE
    for guest, place in splits.schedule(guests):
        one = guests[guest]
        memory.pass_to((one.at[place] + 0.5) / one.requests * seconds)
        memory.request(guest, one.misses[place], one.evicted[place])
    memory.lender.check()
    return [guest.pool.misses for guest in memory.guests]


def fixed(setting: Setting, _: str) -> int:
    """Count the misses with equal parts."""
    guests = setting.streams()
    return sum(splits.alone(one, setting.slabs() // len(guests)) for one in guests)


def in_common(setting: Setting, order: str) -> int:
    """Count the misses with one pool."""
    guests = setting.streams()
    count = splits.common_fifo if order == "fifo" else splits.common
    return count(guests, splits.schedule(guests), setting.slabs())


def curve(setting: Setting, name: str) -> dict[int, int]:
    """Count the misses of one guest by the size of its pool."""
    one = next(one for one in setting.streams() if one.name == name)
    return {slabs: splits.alone(one, slabs) for slabs in splits.grid(one, setting.slabs())}


def with_floors(setting: Setting, division: str) -> float:
    """Return by how many percent the guest that fares worst misses more than in a pool of its floor alone."""
    guests = setting.streams()
    floor = setting.slabs() // (2 * len(guests))
    misses = _lend(setting, division, [floor] * len(guests))
    return max(100.0 * (mine / splits.alone(one, floor) - 1) for mine, one in zip(misses, guests, strict=True))


def turns(guests: Sequence[Stream], seconds: float) -> list[tuple[float, int, int]]:
    """Return (time, guest, position in its stream) when the guests are busy one after the other."""
    found, nexts, requests, clock = [], [0] * len(guests), [0] * len(guests), 0.0
    while any(place < len(one.at) for place, one in zip(nexts, guests, strict=True)):
        for guest, one in enumerate(guests):
            if nexts[guest] >= len(one.at):
                continue
            first = requests[guest]
            requests[guest] += round(seconds * RATE)
            while nexts[guest] < len(one.at) and one.at[nexts[guest]] < requests[guest]:
                found.append((clock + (one.at[nexts[guest]] - first) / RATE, guest, nexts[guest]))
                nexts[guest] += 1
            clock += seconds
    return found


def busy_in_turn(setting: Setting, how: str) -> list[int]:
    """Count the misses of guests that are busy in turn, for each length of a turn."""
    guests, misses = setting.streams(), []
    for seconds in PHASES:
        order = turns(guests, seconds)
        if how == "one pool":
            misses.append(splits.common(guests, [(guest, place) for _, guest, place in order], setting.slabs()))
            continue
        memory = LentMemory(guests, setting.slabs(), COMPARED[how])
        for now, guest, place in order:
            memory.pass_to(now)
            memory.request(guest, guests[guest].misses[place], guests[guest].evicted[place])
        misses.append(sum(guest.pool.misses for guest in memory.guests))
    return misses


@dataclass(frozen=True, slots=True)
class Task:
    """One count for a worker."""

    count: Callable[[Setting, str], Any]
    setting: Setting
    how: str

    def run(self) -> Any:
        """Count."""
        return self.count(self.setting, self.how)


def _work(task: Task) -> tuple[Task, Any]:
    return task, task.run()


def measure(directory: Path | None, only: Sequence[str] = (), limit: int = 0) -> Outcome:
    """Divide memory between the traces of a directory, in all ways."""
    paths = traces.names(directory) if directory is not None and directory.is_dir() else []
    paths = [path for path in paths if traces.title(path) in only or (not only and traces.title(path) not in SYNTHETIC)]
    if len(paths) < 2:
        where = "no --traces DIR was given" if directory is None else f"no two traces in {directory.name}"
        say(f"division: skipped: {where}")
        return Outcome(_goals({}), {"skipped": where})
    guests = tuple(paths)
    settings = [Setting(guests, limit, share) for share in SHARES]
    phased = Setting(guests, min(limit or PHASED_REQUESTS, PHASED_REQUESTS), PHASED_SHARE)
    tasks = [Task(curve, setting, traces.title(path)) for path in reversed(paths) for setting in settings]
    tasks += [Task(lent, setting, name) for setting in settings for name in COMPARED]
    tasks += [Task(in_common, setting, order) for setting in settings for order in ("pool", "fifo")]
    tasks += [Task(count, setting, DEFAULT) for setting in settings for count in (with_floors, fixed, lent_to_users)]
    tasks += [Task(busy_in_turn, phased, how) for how in (*COMPARED, "one pool")]
    say(f"division: {len(tasks)} counts over {len(paths)} guests on {os.cpu_count()} cores")
    found: dict[tuple[str, float, str], Any] = {}
    for task, result in traces.on_all_cores(_work, tasks):
        found[task.count.__name__, task.setting.share, task.how] = result
        say(f"  {task.count.__name__:<13} {task.setting.share:4.0%}  {task.how}")
    figures: Figures = {
        "guests": [traces.title(path) for path in paths],
        "default": DEFAULT,
        "sizes": [_size(setting, found) for setting in settings],
        "busy_in_turn": {how: found["busy_in_turn", PHASED_SHARE, how] for how in (*COMPARED, "one pool")},
        "turns_seconds": list(PHASES),
    }
    return Outcome(_goals(figures), figures)


def _size(setting: Setting, found: dict[tuple[str, float, str], Any]) -> Figures:
    """Return the figures of one size, with the best fixed parts."""
    share, guests = setting.share, setting.streams()
    curves = [found["curve", share, one.name] for one in guests]
    split = splits.best_split(curves, setting.slabs())
    best = sum(splits.alone(one, slabs) for one, slabs in zip(guests, split, strict=True))
    misses = {f"lent, {name}": found["lent", share, name] for name in COMPARED}
    misses |= {
        f"lent, {DEFAULT}, a user each": found["lent_to_users", share, DEFAULT],
        "equal parts": found["fixed", share, DEFAULT],
        "one FIFO": found["in_common", share, "fifo"],
        "one pool": found["in_common", share, "pool"],
        "best fixed parts": best,
    }
    requests = sum(one.requests for one in guests)
    say(f"  {share:.0%} of the distinct pages, {setting.slabs()} slabs")
    for name, count in misses.items():
        say(f"    {name:<22} {count:>8} misses, ratio {count / requests:.3f}, {100 * (count / best - 1):+6.1f} %")
    return {
        "share": share,
        "slabs": setting.slabs(),
        "requests": requests,
        "best_parts": split,
        "misses": misses,
        "change_percent": {name: 100.0 * (count / best - 1) for name, count in misses.items()},
        "worst_with_floor_percent": found["with_floors", share, DEFAULT],
    }


def _goals(figures: Figures) -> list[Goal]:
    goals = []
    sizes = {size["share"]: size for size in figures.get("sizes", [])}
    for share in SHARES:
        size = sizes.get(share)
        for what, goal, value in (
            (
                f"memory lent at {share:.0%}, misses against the best fixed parts",
                NEAR_GOAL,
                size and size["change_percent"][f"lent, {DEFAULT}"],
            ),
            (
                f"memory lent at {share:.0%}, misses of the guest that fares worst against its floor alone",
                FLOOR_SLACK,
                size and size["worst_with_floor_percent"],
            ),
        ):
            goals.append(_at_most(what, goal, value))
    turns_found = figures.get("busy_in_turn")
    for number, seconds in enumerate(PHASES):
        value = None
        if turns_found is not None:
            value = 100.0 * (turns_found[DEFAULT][number] / turns_found["age"][number] - 1)
        what = f"guests busy in turn for {seconds:g} s, misses of {DEFAULT} against age"
        goals.append(_at_most(what, TURNS_GOAL, value))
    return goals


def _at_most(what: str, goal: float, percent: float | None) -> Goal:
    result = "skipped: no traces" if percent is None else f"{percent:+.1f} %"
    return Goal(what, f"≤ {goal:+.0f} %", result, Verdict.REPORTED if percent is None else judged(percent <= goal))


if __name__ == "__main__":
    command = parser(__doc__)
    traces.arguments(command)
    asked = command.parse_args()
    main(asked, lambda: measure(asked.traces, asked.only, asked.limit))
