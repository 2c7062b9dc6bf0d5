"""Judge goals on a noisy machine: the median of some values, its interval, and a verdict.

Sides are measured in turn, in pairs, so that a disturbance of the machine hits both sides of a pair. The ratios (or
differences) of the pairs are judged. The interval is the sign test's: it holds the true median with at least 95 %
confidence, for any distribution of the noise (J.-Y. Le Boudec, Performance Evaluation of Computer and Communication
Systems, 2010, theorem 2.1). Rejected: a bootstrap, whose intervals are too short for ten pairs; means, which one
disturbed pair decides. A goal is met when the whole interval is on its side, missed when the whole interval is on the
other side, else not decided. Fewer than six pairs decide nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

T = TypeVar("T")

CONFIDENCE = 0.95


class Verdict(StrEnum):
    """The verdict on a goal."""

    MET = "met"
    MISSED = "missed"
    OPEN = "not decided"  # the goal is inside the interval
    REPORTED = "reported"  # there is no goal
    UNJUDGED = "not judged"  # the sizes were too small


def judged(met: bool) -> Verdict:
    """Return the verdict for a count that does not vary."""
    return Verdict.MET if met else Verdict.MISSED


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some values and its interval; their extremes if they are too few."""

    median: float
    low: float
    high: float
    count: int
    enough: bool

    def at_most(self, bound: float) -> Verdict:
        """Judge against an upper bound."""
        if not self.enough or self.low <= bound < self.high:
            return Verdict.OPEN
        return judged(self.high <= bound)

    def at_least(self, bound: float) -> Verdict:
        """Judge against a lower bound."""
        if not self.enough or self.low < bound <= self.high:
            return Verdict.OPEN
        return judged(self.low >= bound)

    def text(self, form: str, unit: str = "") -> str:
        """Render the median and the interval."""
        inside = f" ({self.low:{form}} to {self.high:{form}})" if self.count > 1 else ""
        return f"{self.median:{form}}{unit}{inside}"


def spread(values: Sequence[float]) -> Spread:
    """Return the median and its interval by the sign test."""
    ordered, count = sorted(values), len(values)
    cut, tail = 0, 1 / 2**count  # probability that at most `cut` of the values are on one side of the true median
    while 2 * tail <= 1 - CONFIDENCE:
        cut += 1
        tail += math.comb(count, cut) / 2**count
    half = count // 2
    middle = ordered[half] if count % 2 else (ordered[half - 1] + ordered[half]) / 2
    first = max(0, cut - 1)
    return Spread(middle, ordered[first], ordered[-1 - first], count, cut > 0)


def in_turn(sides: Iterable[T], number: int) -> list[T]:
    """Return the order of the sides in a round: reversed in every second round, so that no side is always first."""
    order = list(sides)
    return order[::-1] if number % 2 else order
