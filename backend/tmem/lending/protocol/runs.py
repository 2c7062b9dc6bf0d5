"""Slab numbers as runs: `((first, count), ...)`, ascending and without overlap."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

Run = tuple[int, int]
Runs = tuple[Run, ...]

MAX_RUNS = 4096  # runs in one message: 45 KB at most


def count(runs: Iterable[Run]) -> int:
    """Return the number of slabs in runs."""
    return sum(length for _, length in runs)


def end(runs: Sequence[Run]) -> int:
    """Return the number after the last slab; 0 without runs."""
    return sum(runs[-1]) if runs else 0


def validate(runs: Iterable[Run], slabs: int) -> None:
    """Raise ValueError unless the runs are ascending, do not overlap, and lie within so many slabs."""
    last = 0
    for first, length in runs:
        if first < last:
            raise ValueError("runs are not ascending, or overlap")
        last = first + length
    if last > slabs:
        raise ValueError("a run ends beyond the largest arena")


def slabs_of(runs: Iterable[Run]) -> list[int]:
    """Return the slab numbers in runs."""
    return [slab for first, length in runs for slab in range(first, first + length)]


def runs_of(slabs: Iterable[int]) -> Runs:
    """Return slab numbers, in any order, as runs."""
    return merge((slab, 1) for slab in sorted(slabs))


def merge(runs: Iterable[Run]) -> Runs:
    """Join runs that touch."""
    merged: list[Run] = []
    for first, length in runs:
        if merged and sum(merged[-1]) == first:
            merged[-1] = (merged[-1][0], merged[-1][1] + length)
        else:
            merged.append((first, length))
    return tuple(merged)


def split_by_slabs(runs: Iterable[Run], max_slabs: int) -> Iterator[Runs]:
    """Cut runs into pieces of at most `max_slabs` slabs; yield nothing without runs."""
    rest = deque(runs)
    while rest:
        yield pop_slabs(rest, max_slabs)


def pop_slabs(queue: deque[Run], max_slabs: int) -> Runs:
    """Remove up to `max_slabs` slabs from the front of a queue of runs; stop where the queue is not ascending."""
    popped: list[Run] = []
    room = max_slabs
    while queue and room and (not popped or queue[0][0] >= end(popped)):
        first, length = queue.popleft()
        popped.append((first, min(length, room)))
        if length > room:
            queue.appendleft((first + room, length - room))
        room -= popped[-1][1]
    return tuple(popped)


def split_for_messages(runs: Sequence[Run], max_runs: int = MAX_RUNS) -> Iterator[tuple[Runs, bool]]:
    """Split runs into pieces that fit into a message, each with whether it is the last.

    Without runs there is one empty piece.
    """
    for start in range(0, max(1, len(runs)), max_runs):
        yield tuple(runs[start : start + max_runs]), start + max_runs >= len(runs)
