"""All that tmemd knows about one guest."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

from tmem.lending.lender.reclaimpolicy import GuestActivity
from tmem.lending.lender.settings import GuestSettings
from tmem.lending.lender.slabmap import SlabMap, State
from tmem.lending.protocol.runs import Run, Runs


@dataclass(slots=True)
class Revocation:
    """A Revoke that was sent and not answered yet."""

    serial: int
    outstanding: int
    deadline: float
    draining_socket: bool = False  # timed out: the socket is being drained


@dataclass(slots=True, eq=False)
class Account:
    """One guest in the ledger. Change `settings` with `change`."""

    number: int
    token: bytes
    name: str
    uid: int
    pid: int
    map: SlabMap
    settings: GuestSettings
    persistent_share: int = 0  # the persistent cap, unless one was requested
    activity: GuestActivity = field(default_factory=GuestActivity)
    connected: bool = False
    ended: bool = False
    slabs_unknown: bool = False  # booked from before a restart: which slabs, its claims will tell
    barred: bool = False  # wrote repeatedly to slabs that it was not lent
    unresponsive: bool = False  # did not answer the last Revoke
    known_at_start: bool = False  # it was in the holdings file at the start
    claims: SlabMap | None = None  # received so far after it came back; None when settled
    reclaim_target: int = 0  # ephemeral slabs to take back
    revocation: Revocation | None = None  # the one open Revoke of ephemeral slabs
    serial: int = 0
    unconfirmed: dict[int, Runs] = field(default_factory=dict)  # by the serial of their Taken
    unsent_taken: deque[Run] = field(default_factory=deque)  # runs of taken slabs that no Taken names yet
    unpunched: int = 0  # slabs given up and not punched yet
    hanging: bool = False  # a call on its arena does not return
    excess_audits: int = 0
    revoked: int = 0  # slabs given back when asked
    taken: int = 0  # slabs taken without an answer

    def change(self, **settings: Any) -> None:
        """Change some of the settings."""
        self.settings = replace(self.settings, **settings)
        self.activity.weight = self.settings.weight

    @property
    def persistent_cap(self) -> int:
        """Persistent slabs that the guest may hold."""
        requested = self.settings.persistent_cap
        return self.persistent_share if requested is None else requested

    @property
    def ephemeral(self) -> int:
        """Ephemeral slabs held or being populated."""
        counts = self.map.counts
        return counts[State.EPHEMERAL] + counts[State.POPULATING_EPHEMERAL]

    @property
    def persistent(self) -> int:
        """Persistent slabs held or being populated."""
        counts = self.map.counts
        return counts[State.PERSISTENT] + counts[State.POPULATING_PERSISTENT]

    @property
    def held(self) -> int:
        """All slabs held or being populated."""
        return self.ephemeral + self.persistent

    @property
    def reserved(self) -> int:
        """Slabs that the guest can have at any time: its floor and its persistent cap."""
        return self.settings.floor + max(self.persistent_cap, self.persistent)

    @property
    def committed(self) -> int:
        """Reserved slabs, without the part of a default persistent cap that is not held."""
        return self.settings.floor + self.persistent if self.settings.persistent_cap is None else self.reserved

    @property
    def reclaimable(self) -> int:
        """Ephemeral slabs above the floor that are not in the target yet."""
        return 0 if self.hanging else max(0, self.revocable - self.settings.floor - self.reclaim_target)

    @property
    def revocable(self) -> int:
        """Ephemeral slabs that may be taken: none until it is known which slabs are persistent."""
        return 0 if self.slabs_unknown or self.ended or self.settings.evicted else self.map.counts[State.EPHEMERAL]

    @property
    def is_attached(self) -> bool:
        """Whether the guest is connected and its claims are settled: only then it gets Revoke and Taken."""
        return self.connected and self.claims is None

    @property
    def state(self) -> str:
        """The state as one word for the table."""
        if self.settings.evicted:
            return "evicted"
        if not self.connected:
            return "away"
        words = {
            "hanging": self.hanging,
            "claiming": self.claims is not None,
            "barred": self.barred,
            "draining": self.settings.draining,
        }
        return next((word for word, true in words.items() if true), "frozen" if self.settings.frozen else "connected")

    def next_serial(self) -> int:
        """Return the serial of the next message that needs an answer; 32 bits, never 0."""
        self.serial = self.serial % 0xFFFFFFFF + 1
        return self.serial

    def check(self) -> None:
        """Raise AssertionError unless the parts agree."""
        self.map.check()
        counts = self.map.counts
        assert self.activity.slabs == self.ephemeral
        assert 0 <= self.reclaim_target <= counts[State.EPHEMERAL]
        assert self.settings.floor <= self.settings.cap <= self.map.total
        unconfirmed = [run for runs in (*self.unconfirmed.values(), self.unsent_taken) for run in runs]
        assert sum(length for _, length in unconfirmed) == counts[State.TAKEN], "taken slabs of which nobody tells"
        assert self.map.holds(unconfirmed, State.TAKEN)
        assert self.connected or not (self.revocation or self.unconfirmed or self.unsent_taken or self.claims)
        if self.revocation is not None:
            assert 0 < self.revocation.outstanding <= self.reclaim_target
