"""The settings of one guest, kept over a restart of tmemd."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GuestSettings:
    """What the guest's Hello and the administrator set; sizes in slabs."""

    cap: int
    weight: float = 1.0
    floor: int = 0
    persistent_cap: int | None = None  # None: not requested, the ledger gives it a share
    frozen: bool = False
    draining: bool = False
    evicted: bool = False  # it holds nothing, and is remembered so that it is not let in again
