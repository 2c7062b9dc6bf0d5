"""How memory is divided between guests when there is not enough: whose slab goes first, and who may have it.

A policy says what a slab is worth where it is (`worth`) and what one more would be worth to a guest that asks
(`need`). The guest with the least worth gives way, as long as that is below the need of the one who asks. Caps and
floors are the ledger's; times are handed in.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import ClassVar

from tmem.lending.messages import Report


@dataclass(slots=True, eq=False)
class Standing:
    """What is known of one guest's need for ephemeral memory."""

    weight: float = 1.0
    slabs: int = 0  # ephemeral slabs held or promised
    age: float | None = None  # of the next victim when it was last told
    told: float = -inf  # when that was
    slabs_then: int = 0
    lent: float = -inf  # when ephemeral slabs were last lent
    report: Report | None = None

    def tell(self, now: float, age: float | None) -> None:
        """Note the age of the next victim."""
        self.age, self.told, self.slabs_then = age, now, self.slabs

    def oldness(self, now: float, given: int = 0) -> float:
        """Estimate the age of the next victim once `given` more slabs were given up; infinite without a page.

        The pages that went since the age was told were the oldest ones, so what is left is younger in proportion.
        """
        if self.age is None:
            # No page at all: slabs that were lent a while ago and never used are of no use.
            return inf if self.told > self.lent else now - self.lent
        left = self.slabs - given
        part = min(1.0, left / self.slabs_then) if self.slabs_then else 1.0
        return self.age * part + (now - self.told)


class Division:
    """The policy `age`, and the base of the others: whose next victim is oldest gives way."""

    name: ClassVar[str] = "age"

    def reported(self, standing: Standing, now: float, report: Report) -> None:
        """Take in a report."""
        standing.report = report
        standing.tell(now, report.age)

    def bound(self, standing: Standing, standings: Iterable[Standing], size: int) -> int | None:
        """Give the most ephemeral slabs that the guest may hold by the policy; None for no such bound."""
        return None

    def worth(self, standing: Standing, now: float, given: int = 0) -> float:
        """Give what a slab is worth where it is, once `given` others are gone."""
        return -standing.oldness(now, given) / standing.weight

    def need(self, standing: Standing, now: float) -> float:
        """Give what one more slab is worth to a guest that asks."""
        return self.worth(standing, now) if standing.age is not None else inf


class Greedy(Division):
    """First come, first served: nobody gives way to an ephemeral request."""

    name = "greedy"

    def need(self, standing: Standing, now: float) -> float:
        """Give less than any worth."""
        return -inf


class Static(Division):
    """Everybody has a share of the size by weight, and no more even while others use nothing."""

    name = "static"

    def bound(self, standing: Standing, standings: Iterable[Standing], size: int) -> int | None:
        """Give the share."""
        return int(size * standing.weight / sum(other.weight for other in standings))

    def need(self, standing: Standing, now: float) -> float:
        """Give more than any worth: who is within the share gets it."""
        return inf


class Utility(Division):
    """Marginal hits per slab."""

    name = "utility"


DIVISIONS: dict[str, type[Division]] = {policy.name: policy for policy in (Division, Utility, Greedy, Static)}
DEFAULT = Division.name


def choose(
    division: Division, victims: Sequence[tuple[Standing, int]], slabs: int, need: float, now: float
) -> list[int]:
    """Give how many of `slabs` each victim gives, of the most that are named; none whose worth is not below `need`."""
    given = [0] * len(victims)
    step = max(1, slabs // 16)
    heap = [(division.worth(standing, now), place) for place, (standing, most) in enumerate(victims) if most > 0]
    heapq.heapify(heap)
    while slabs and heap and heap[0][0] < need:
        place = heap[0][1]
        standing, most = victims[place]
        count = min(step, slabs, most - given[place])
        given[place] += count
        slabs -= count
        if given[place] < most:
            heapq.heapreplace(heap, (division.worth(standing, now, given[place]), place))
        else:
            heapq.heappop(heap)
    return given
