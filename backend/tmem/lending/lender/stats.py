"""Counters and sums of the lender. Every reason to deny or refuse has a counter of its own."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Denial(Enum):
    """Why an Ask ended incomplete; the text is sent to the guest."""

    FROZEN = "the guest is frozen"
    DRAINING = "the guest is being drained"
    BARRED = "the guest wrote to memory that it was not lent"
    HANGS = "a call on the guest's arena does not return"
    CAP = "the guest holds its cap"
    PERSISTENT_CAP = "the guest holds its persistent cap"
    UID_CAP = "the guests of this user hold the user's cap"
    YOUNGER = "nobody's pages are worth less"
    MEMORY = "the machine is short of memory"

    @property
    def counter(self) -> str:
        """The name of its counter."""
        return f"denied_{self.name.lower()}"


class Why(Enum):
    """Why a Hello or a verb was refused."""

    VERSION = "refused_version"
    GUESTS = "refused_guests"  # too many guests, or too many of one uid
    PROMISE = "refused_promise"  # a floor or persistent cap that does not fit
    CONNECTED = "refused_connected"  # the guest's old connection has not ended
    TOKEN = "refused_token"  # the token of another guest, or other facts than before
    EVICTED = "refused_evicted"  # an evicted guest came back
    LIMITS = "refused_limits"  # limits that contradict each other or the arena
    UNKNOWN = "refused_unknown"  # no such guest, or more than one
    TRUST = "refused_trust"  # a changing verb of a user other than root and tmemd's own


@dataclass(slots=True)
class Counters:
    """The running counts."""

    asks: int = 0
    lends: int = 0  # Lend messages
    lent_slabs: int = 0
    returned_slabs: int = 0  # with or without a Revoke
    late_returned_slabs: int = 0  # that had been taken meanwhile
    revokes: int = 0  # Revoke messages
    revoked_slabs: int = 0  # for a Revoke
    unanswered_revokes: int = 0
    taken_slabs: int = 0  # without a Return, or with an incomplete one
    lost_slabs: int = 0  # claimed, but taken or holes
    refused_claim_slabs: int = 0  # ephemeral slabs claimed after a restart, without room
    unreal_slabs: int = 0  # not populated because memory was short
    audits: int = 0
    excess_audits: int = 0  # that found more populated than booked
    excess_bytes: int = 0  # punched by them
    barred_guests: int = 0
    hangs: int = 0  # calls on a guest's arena that did not return in time
    faults: int = 0  # messages that no honest guest sends
    joins: int = 0
    rejoins: int = 0
    evictions: int = 0
    ends: int = 0
    denied_frozen: int = 0
    denied_draining: int = 0
    denied_barred: int = 0
    denied_hangs: int = 0
    denied_cap: int = 0
    denied_persistent_cap: int = 0
    denied_uid_cap: int = 0
    denied_younger: int = 0
    denied_memory: int = 0
    refused_version: int = 0
    refused_guests: int = 0
    refused_promise: int = 0
    refused_connected: int = 0
    refused_token: int = 0
    refused_evicted: int = 0
    refused_limits: int = 0
    refused_unknown: int = 0
    refused_trust: int = 0

    def deny(self, denial: Denial) -> None:
        """Count a denied Ask."""
        setattr(self, denial.counter, getattr(self, denial.counter) + 1)

    def refuse(self, why: Why | None) -> None:
        """Count a refused Hello or verb."""
        if why is not None:
            setattr(self, why.value, getattr(self, why.value) + 1)


@dataclass(frozen=True, slots=True)
class LenderStats:
    """Sums in slabs, and the values of Counters."""

    size: int
    free: int
    ephemeral: int
    persistent: int
    promised: int  # being populated
    unpunched: int  # given up, and not free yet
    pinned: int  # punched, but still in use
    reserved: int  # committed: floors, requested persistent caps, persistent slabs
    guests: int
    connected: int
    map_bytes: int  # memory of the slab maps
    counters: dict[str, int]
