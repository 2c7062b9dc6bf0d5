"""Reclaim policies that tmemd does not offer: `bench.division` and `bench.claim` compare its own with them."""

from __future__ import annotations

from math import inf

from tmem.lending.lender.reclaimpolicy import BUSY, RECLAIM_POLICIES, GuestActivity, ReclaimPolicy, SlabValue


class Utility(ReclaimPolicy):
    """Compares hits a slab for busy guests, and age for idle ones.

    A busy guest's slab is worth its hits a slab, and one more slab to it its ghost hits a slab.
    """

    name = "utility"

    def value(self, activity: GuestActivity, now: float, given: int = 0) -> SlabValue:
        """Return the hits a second that the slab brings; for an idle guest, a value by age."""
        if activity.idle(now):
            return super().value(activity, now, given)
        return BUSY, activity.weight * activity.hits / max(1, activity.slabs)

    def bid(self, activity: GuestActivity, now: float) -> tuple[float, float]:
        """Return the bid by age against idle guests; against busy ones, the hits a second of one more slab."""
        if activity.needs_first_slabs:
            return inf, inf
        return super().bid(activity, now)[0], activity.weight * activity.ghost_hits / max(1, activity.slabs)


class Greedy(ReclaimPolicy):
    """First come, first served: no slab is reclaimed for another guest's ephemeral Ask."""

    name = "greedy"

    def bid(self, activity: GuestActivity, now: float) -> tuple[float, float]:
        """Return less than any value."""
        return -inf, -inf


COMPARED: dict[str, type[ReclaimPolicy]] = RECLAIM_POLICIES | {policy.name: policy for policy in (Utility, Greedy)}
