"""How memory is divided between guests when there is not enough: whose slab goes first, and who may have it.

A policy says what a slab is worth where it is (`value`) and what one more would be worth to a guest that asks
(`bid`). The guest with the least value gives way, as long as that is below the bid of the guest that asks. Caps and
floors are the ledger's; times are handed in.

`age` compares the ages of the oldest pages, whichever queue they are in. (The next victim's age, which looks like the
natural measure, is that of a young page as long as a guest's probation is over its share, while its main queue may
end in pages that were of no use for hours; compared so, the misses were 2 to 5 % more, and several times as many
beside a guest that reads in a loop.) `mix`, the default, divides a busy guest's age by its usefulness, its hits and
ghost hits per slab against those of all busy guests: twice the hits, and its pages may stay twice as long. It is
bounded, as a guest that has had no memory yet has had no hits. A guest that does nothing is judged by age alone, and
at once: nothing more can be learned about its hits. So neither a scan nor a guest that has stopped keeps memory.

Hits are compared between the guests of one user alone, and ages between users only where `fairness` lets them: both
are what guests say of themselves.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import exp, inf
from typing import ClassVar

from tmem.lending.protocol.messages import BATCH, Report

# Seconds without a report after which a guest is idle; a busy one reports about once a second.
SILENT = 1.5
# Seconds over which hits are averaged, and how much they may change what an age counts.
MEMORY = 10.0
MOST_USEFUL = 16.0

# Idle guests give way before busy ones; worths compare within a rank.
IDLE, BUSY = 0, 1
SlabValue = tuple[int, float]


@dataclass(slots=True, eq=False)
class GuestActivity:
    """What is known of one guest's need for ephemeral memory."""

    weight: float = 1.0
    slabs: int = 0  # ephemeral slabs held or promised
    age: float | None = None  # of the oldest page when it was last told
    told: float = -inf  # when that was
    slabs_then: int = 0
    lent: float = -inf  # when ephemeral slabs were last lent
    report: Report | None = None
    reported: float = -inf  # when that came
    asked: float = -inf  # when it last asked for ephemeral slabs
    resting: bool = False  # nothing moved between the last two reports, and it did not ask since
    hits: float = 0.0  # a second
    ghost_hits: float = 0.0
    uid: int = 0

    def tell(self, now: float, age: float | None) -> None:
        """Note the age of the oldest page."""
        self.age, self.told, self.slabs_then = age, now, self.slabs

    def ask(self, now: float, age: float | None) -> None:
        """Note that the guest asks for more: it is not idle."""
        self.asked, self.resting = now, False
        if age is not None:
            self.tell(now, age)

    def take_in(self, now: float, report: Report) -> None:
        """Note a report."""
        last = self.report
        self.resting = last is not None and _counters(last) == _counters(report)
        if last is not None and not self.resting:
            # What came after a rest came within the last second.
            seconds = min(max(now - self.reported, 0.001), SILENT)
            part = 1.0 - exp(-seconds / MEMORY)
            self.hits += part * (max(0, report.hits - last.hits) / seconds - self.hits)
            self.ghost_hits += part * (max(0, report.ghost_hits - last.ghost_hits) / seconds - self.ghost_hits)
        self.report, self.reported = report, now
        self.tell(now, report.age)

    def idle(self, now: float) -> bool:
        """Tell whether the guest does nothing."""
        return self.resting or now - max(self.reported, self.asked) > SILENT

    @property
    def needs_a_start(self) -> bool:
        """Tell whether the guest has no page yet, and too little memory to have shown what it does with it."""
        return self.age is None and self.slabs < BATCH

    def oldest_age(self, now: float, given: int = 0) -> float:
        """Estimate the age of the oldest page once `given` more slabs were given up; infinite without a page.

        The pages that went since the age was told were the oldest ones, so what is left is younger in proportion.
        """
        if self.age is None:
            # No page at all: slabs that were lent a while ago and never used are of no use.
            return inf if self.told > self.lent else now - self.lent
        left = self.slabs - given
        part = min(1.0, left / self.slabs_then) if self.slabs_then else 1.0
        return self.age * part + (now - self.told)


def _counters(report: Report) -> tuple[int, ...]:
    return (report.pages, report.puts, report.hits, report.misses)


class ReclaimPolicy:
    """The policy `age`, and the base of the others: whose oldest page is oldest gives way."""

    name: ClassVar[str] = "age"

    def survey(self, activities: Iterable[GuestActivity], now: float) -> None:
        """Look at all guests, before what they have is compared."""

    def bound(self, activity: GuestActivity, activities: Iterable[GuestActivity], size: int) -> int | None:
        """Give the most ephemeral slabs that the guest may hold by the policy; None for no such bound."""
        return None

    def value(self, activity: GuestActivity, now: float, given: int = 0) -> SlabValue:
        """Give what a slab is worth where it is, once `given` others are gone."""
        return IDLE, -activity.oldest_age(now, given) / activity.weight

    def bid(self, activity: GuestActivity, now: float) -> tuple[float, float]:
        """Give what one more slab is worth to a guest that asks, against idle guests and against busy ones."""
        if activity.needs_a_start:
            return inf, inf
        return -activity.oldest_age(now) / activity.weight, inf


class AgeUtility(ReclaimPolicy):
    """Age over usefulness for busy guests, age alone for idle ones."""

    name = "mix"

    def __init__(self) -> None:
        self._usual: dict[int, float] = {}  # hits and ghost hits a second and slab, of the busy guests of each user

    def survey(self, activities: Iterable[GuestActivity], now: float) -> None:
        """Find out what is usual among the busy guests of each user."""
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
        return min(MOST_USEFUL, max(1 / MOST_USEFUL, useful))

    def value(self, activity: GuestActivity, now: float, given: int = 0) -> SlabValue:
        """Give what a slab is worth where it is, once `given` others are gone."""
        value = -activity.oldest_age(now, given) / activity.weight
        return (IDLE, value) if activity.idle(now) else (BUSY, value / self._usefulness(activity))

    def bid(self, activity: GuestActivity, now: float) -> tuple[float, float]:
        """Give what one more slab is worth to a guest that asks, against idle guests and against busy ones."""
        if activity.needs_a_start:
            return inf, inf
        value = -activity.oldest_age(now) / activity.weight
        return value, value / self._usefulness(activity)


class Utility(ReclaimPolicy):
    """Marginal hits per slab for busy guests, those of the ghosts for the one who asks; age for idle ones."""

    name = "utility"

    def value(self, activity: GuestActivity, now: float, given: int = 0) -> SlabValue:
        """Give the hits a second that the slab brings."""
        if activity.idle(now):
            return super().value(activity, now, given)
        return BUSY, activity.weight * activity.hits / max(1, activity.slabs)

    def bid(self, activity: GuestActivity, now: float) -> tuple[float, float]:
        """Give the hits a second that one more slab would bring."""
        if activity.needs_a_start:
            return inf, inf
        return super().bid(activity, now)[0], activity.weight * activity.ghost_hits / max(1, activity.slabs)


class Greedy(ReclaimPolicy):
    """First come, first served: nobody gives way to an ephemeral request."""

    name = "greedy"

    def bid(self, activity: GuestActivity, now: float) -> tuple[float, float]:
        """Give less than any value."""
        return -inf, -inf


class Static(ReclaimPolicy):
    """Everybody has a share of the size by weight, and no more even while others use nothing."""

    name = "static"

    def bound(self, activity: GuestActivity, activities: Iterable[GuestActivity], size: int) -> int | None:
        """Give the share."""
        return int(size * activity.weight / sum(other.weight for other in activities))

    def bid(self, activity: GuestActivity, now: float) -> tuple[float, float]:
        """Give more than any value: who is within the share gets it."""
        return inf, inf


RECLAIM_POLICIES: dict[str, type[ReclaimPolicy]] = {
    policy.name: policy for policy in (AgeUtility, ReclaimPolicy, Utility, Greedy, Static)
}
DEFAULT = AgeUtility.name


def choose(
    policy: ReclaimPolicy,
    victims: Sequence[tuple[GuestActivity, int]],
    slabs: int,
    bid: tuple[float, float],
    now: float,
) -> list[int]:
    """Give how many of `slabs` each victim gives, of the most that are named; none whose value is not below `bid`."""
    given = [0] * len(victims)
    step = max(1, slabs // 16)
    heap = [(policy.value(activity, now), place) for place, (activity, most) in enumerate(victims) if most > 0]
    heapq.heapify(heap)
    while slabs and heap:
        (rank, value), place = heap[0]
        if value >= bid[rank]:
            heapq.heappop(heap)  # and so for the others of its rank, who are worth more
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
