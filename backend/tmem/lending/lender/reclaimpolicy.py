"""Values slabs: whose slabs are reclaimed first, and for whom.

A policy gives the value of a slab where it is (`value`) and of one more slab to a guest that asks (`bid`). The guest
with the lowest value gives way, as long as that is below the bid. Caps and floors are the ledger's. Time is an
argument.

`age` compares the ages of the oldest pages in either queue. (The age of the next victim looks like the natural
measure. It is that of a young page while the small queue is over its share, even if the main queue ends in pages not
used for hours. Misses were 2 to 5 % more, and several times as many beside a guest that reads in a loop.)

`mix`, the default, divides a busy guest's age by its usefulness: its hits and ghost hits a slab, against those of all
busy guests of its user. With twice the hits, pages may stay twice as long. Usefulness is bounded, because a guest
without memory has had no hits. An idle guest is judged by age alone and gives way first, because its hits tell
nothing new. So neither a scan nor an idle guest keeps memory.

Hits are compared only between guests of one user, and ages between users only where `fairness` allows it, because
guests report both themselves.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import exp, inf
from typing import ClassVar

from tmem.lending.protocol.messages import BATCH_SLABS, Report

# Seconds without a report after which a guest is idle; a busy one reports about once a second.
IDLE_SECONDS = 1.5
# Time constant of the average of hits, and bound of the usefulness that divides an age.
AVERAGING_SECONDS = 10.0
MAX_USEFULNESS = 16.0

# Idle guests give way before busy ones; values compare within a rank.
IDLE, BUSY = 0, 1
SlabValue = tuple[int, float]


@dataclass(slots=True, eq=False)
class GuestActivity:
    """A guest's reported use of ephemeral memory."""

    weight: float = 1.0
    slabs: int = 0  # ephemeral slabs held or promised
    age: float | None = None  # of the oldest page, when last reported
    age_time: float = -inf  # when it was reported
    slabs_at_age: int = 0
    lent: float = -inf  # when ephemeral slabs were last lent
    report: Report | None = None
    reported: float = -inf  # when the report came
    asked: float = -inf  # when it last asked for ephemeral slabs
    quiet: bool = False  # no counter moved between the last two reports, and no Ask since
    hits: float = 0.0  # a second
    ghost_hits: float = 0.0
    uid: int = 0

    def update_age(self, now: float, age: float | None) -> None:
        """Set the age of the oldest page."""
        self.age, self.age_time, self.slabs_at_age = age, now, self.slabs

    def ask(self, now: float, age: float | None) -> None:
        """Record an Ask: the guest is not idle."""
        self.asked, self.quiet = now, False
        if age is not None:
            self.update_age(now, age)

    def on_report(self, now: float, report: Report) -> None:
        """Update the averages from a report."""
        last = self.report
        self.quiet = last is not None and _counters(last) == _counters(report)
        if last is not None and not self.quiet:
            # A quiet guest sends no reports: its next one covers the last second.
            seconds = min(max(now - self.reported, 0.001), IDLE_SECONDS)
            part = 1.0 - exp(-seconds / AVERAGING_SECONDS)
            self.hits += part * (max(0, report.hits - last.hits) / seconds - self.hits)
            self.ghost_hits += part * (max(0, report.ghost_hits - last.ghost_hits) / seconds - self.ghost_hits)
        self.report, self.reported = report, now
        self.update_age(now, report.age)

    def idle(self, now: float) -> bool:
        """Return whether the guest does nothing."""
        return self.quiet or now - max(self.reported, self.asked) > IDLE_SECONDS

    @property
    def needs_first_slabs(self) -> bool:
        """Whether the guest has no page yet, and less than a batch of slabs."""
        return self.age is None and self.slabs < BATCH_SLABS

    def oldest_age(self, now: float, given: int = 0) -> float:
        """Estimate the age of the oldest page after `given` more slabs are given up; infinite without a page.

        The pages that went since the age was told were the oldest ones, so what is left is younger in proportion.
        """
        if self.age is None:
            # No page: the slabs are as old as their last lend.
            return inf if self.age_time > self.lent else now - self.lent
        left = self.slabs - given
        part = min(1.0, left / self.slabs_at_age) if self.slabs_at_age else 1.0
        return self.age * part + (now - self.age_time)


def _counters(report: Report) -> tuple[int, ...]:
    return (report.pages, report.puts, report.hits, report.misses)


class ReclaimPolicy:
    """The policy `age`, and the base of the others: the guest with the oldest page gives way."""

    name: ClassVar[str] = "age"

    def survey(self, activities: Iterable[GuestActivity], now: float) -> None:
        """Gather statistics of all guests before values are compared."""

    def value(self, activity: GuestActivity, now: float, given: int = 0) -> SlabValue:
        """Return the value of a slab of this guest after `given` others are given up."""
        return IDLE, -activity.oldest_age(now, given) / activity.weight

    def bid(self, activity: GuestActivity, now: float) -> tuple[float, float]:
        """Return the value of one more slab to this guest, against idle guests and against busy ones."""
        if activity.needs_first_slabs:
            return inf, inf
        return -activity.oldest_age(now) / activity.weight, inf


class AgeUtility(ReclaimPolicy):
    """Age over usefulness for busy guests, age alone for idle ones."""

    name = "mix"

    def __init__(self) -> None:
        self._usual: dict[int, float] = {}  # hits and ghost hits a second and slab, of the busy guests of each user

    def survey(self, activities: Iterable[GuestActivity], now: float) -> None:
        """Average the hits a slab of the busy guests of each user."""
        hits: defaultdict[int, float] = defaultdict(float)
        slabs: Counter[int] = Counter()
        for activity in activities:
            if not activity.idle(now):
                hits[activity.uid] += activity.hits + activity.ghost_hits
                slabs[activity.uid] += activity.slabs
        self._usual = {uid: hits[uid] / max(1, slabs[uid]) for uid in hits}

    def _usefulness(self, activity: GuestActivity) -> float:
        usual = self._usual.get(activity.uid)
        if not usual:
            return 1.0
        useful = (activity.hits + activity.ghost_hits) / max(1, activity.slabs) / usual
        return min(MAX_USEFULNESS, max(1 / MAX_USEFULNESS, useful))

    def value(self, activity: GuestActivity, now: float, given: int = 0) -> SlabValue:
        """Return the value of a slab of this guest after `given` others are given up."""
        value = -activity.oldest_age(now, given) / activity.weight
        return (IDLE, value) if activity.idle(now) else (BUSY, value / self._usefulness(activity))

    def bid(self, activity: GuestActivity, now: float) -> tuple[float, float]:
        """Return the value of one more slab to this guest, against idle guests and against busy ones."""
        if activity.needs_first_slabs:
            return inf, inf
        value = -activity.oldest_age(now) / activity.weight
        return value, value / self._usefulness(activity)


RECLAIM_POLICIES: dict[str, type[ReclaimPolicy]] = {policy.name: policy for policy in (AgeUtility, ReclaimPolicy)}
DEFAULT = AgeUtility.name


def choose(
    policy: ReclaimPolicy,
    victims: Sequence[tuple[GuestActivity, int]],
    slabs: int,
    bid: tuple[float, float],
    now: float,
) -> list[int]:
    """Return how many of `slabs` each victim gives, up to its limit, while its value is below `bid`."""
    given = [0] * len(victims)
    step = max(1, slabs // 16)
    heap = [(policy.value(activity, now), place) for place, (activity, most) in enumerate(victims) if most > 0]
    heapq.heapify(heap)
    while slabs and heap:
        (rank, value), place = heap[0]
        if value >= bid[rank]:
            heapq.heappop(heap)  # the others of its rank have higher values
            continue
        activity, most = victims[place]
        count = min(step, slabs, most - given[place])
        given[place] += count
        slabs -= count
        if given[place] < most:
            heapq.heapreplace(heap, (policy.value(activity, now, given[place]), place))
        else:
            heapq.heappop(heap)
    return given
