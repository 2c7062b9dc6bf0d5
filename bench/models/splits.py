"""Divide memory between guests in ways to compare with: fixed parts, one common pool, and the best fixed parts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from bench.models.slotpool import PAGES_A_SLAB, SlotPool, Stream

# Sizes of a guest's pool, as shares of all memory, at which its misses are counted to find the best split.
GRID = (0, 1 / 64, 1 / 32, 1 / 16, 3 / 32, 1 / 8, 3 / 16, 1 / 4, 5 / 16, 3 / 8, 7 / 16, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1)


def schedule(streams: Sequence[Stream]) -> list[tuple[int, int]]:
    """Return (guest, position in its stream) in order of time; all guests take equally long."""
    times = np.concatenate([(np.asarray(one.at) + 0.5) / one.requests for one in streams])
    guests = np.concatenate([np.full(len(one.at), guest, dtype=np.int64) for guest, one in enumerate(streams)])
    places = np.concatenate([np.arange(len(one.at), dtype=np.int64) for one in streams])
    order = np.argsort(times, kind="stable")
    return list(zip(guests[order].tolist(), places[order].tolist(), strict=True))


def alone(one: Stream, slabs: int) -> int:
    """Count the misses of a guest with a pool of its own."""
    pool = SlotPool(one.footprint, slabs * PAGES_A_SLAB)
    for page, evicted in zip(one.misses, one.evicted, strict=True):
        pool.get(page)
        if evicted >= 0:
            pool.put(evicted, 0.0)
    return pool.misses


def common_fifo(streams: Sequence[Stream], order: Sequence[tuple[int, int]], slabs: int) -> int:
    """Count the misses of guests that share one FIFO pool."""
    slots, misses = slabs * PAGES_A_SLAB, 0
    pool: OrderedDict[tuple[int, int], None] = OrderedDict()
    for guest, place in order:
        key = (guest, streams[guest].misses[place])
        if key in pool:
            del pool[key]
        else:
            misses += 1
        evicted = streams[guest].evicted[place]
        if evicted >= 0:
            pool[guest, evicted] = None
            if len(pool) > slots:
                pool.popitem(last=False)
    return misses


def common(streams: Sequence[Stream], order: Sequence[tuple[int, int]], slabs: int) -> int:
    """Count the misses of guests that share one pool of the engine."""
    firsts = [sum(one.footprint for one in streams[:guest]) for guest in range(len(streams))]
    pool = SlotPool(sum(one.footprint for one in streams), slabs * PAGES_A_SLAB)
    for guest, place in order:
        one, first = streams[guest], firsts[guest]
        pool.get(first + one.misses[place])
        evicted = one.evicted[place]
        if evicted >= 0:
            pool.put(first + evicted, 0.0)
    return pool.misses


def grid(one: Stream, slabs: int) -> list[int]:
    """Return the sizes at which a guest's misses are counted; none is larger than its distinct pages."""
    useful = -(-one.footprint // PAGES_A_SLAB)
    return sorted({min(round(share * slabs), useful) for share in GRID})


def best_split(curves: Sequence[dict[int, int]], slabs: int) -> list[int]:
    """Return the sizes, in sum at most `slabs`, with the fewest misses; the curves are interpolated linearly."""
    step = max(1, slabs // 256)
    places = np.arange(0, slabs // step + 1) * step
    best = np.zeros(len(places))
    choices = []
    for curve in curves:
        sizes = sorted(curve)
        misses = np.interp(places, sizes, [curve[size] for size in sizes])
        totals = np.full(len(places), np.inf)
        choice = np.zeros(len(places), dtype=np.int64)
        for mine in range(len(places)):
            candidate = np.full(len(places), np.inf)
            candidate[mine:] = best[: len(places) - mine] + misses[mine]
            better = candidate < totals
            totals[better], choice[better] = candidate[better], mine
        best = totals
        choices.append(choice)
    split, left = [], int(np.argmin(best))
    for choice in reversed(choices):
        mine = int(choice[left])
        split.append(mine * step)
        left -= mine
    return split[::-1]
