"""The actions that the lender decides on. An executor carries them out in the order in which they are returned."""

from __future__ import annotations

from dataclasses import dataclass

from tmem.lending.lender.settings import GuestSettings
from tmem.lending.lender.stats import Why
from tmem.lending.protocol.kind import Kind
from tmem.lending.protocol.messages import ToGuest
from tmem.lending.protocol.runs import Runs


class Refusal(Exception):
    """A refused verb or Hello: one line with the remedy."""

    def __init__(self, reason: str, why: Why | None = None, retry: bool = False, evicted: bool = False) -> None:
        """`reason` is the line; `why` names the counter of a refusal by the lender."""
        super().__init__(reason)
        self.why = why
        self.retry = retry
        self.evicted = evicted


class GuestFault(Exception):
    """A message that no honest guest sends: cut the connection, then call `Lender.on_disconnected`."""


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message to a connected guest; the executor cuts off a guest that does not read."""

    guest: int
    message: ToGuest


@dataclass(frozen=True, slots=True)
class Populate:
    """Populate slabs as far as memory allows, punch the rest, then call `Lender.on_populated` with those that are."""

    guest: int
    batch: int
    runs: Runs
    kind: Kind


@dataclass(frozen=True, slots=True)
class Punch:
    """Free the memory of slabs, before any later action on the guest. Runs may be large and contain holes.

    `freed` slabs stay booked until it is done: call `Lender.on_punched` with them then, unless there are none.
    """

    guest: int
    runs: Runs
    freed: int = 0


@dataclass(frozen=True, slots=True)
class FindHoles:
    """Find slabs that are not fully populated, and call `Lender.on_holes_found` with them."""

    guest: int
    runs: Runs


@dataclass(frozen=True, slots=True)
class CountPopulated:
    """Count the arena's populated bytes after all earlier actions on the guest, and call `Lender.on_audited`.

    `held` is what the guest holds by then, in slabs.
    """

    guest: int
    held: int


@dataclass(frozen=True, slots=True)
class DrainSocket:
    """Empty the guest's socket, call `Lender.on_message` for each message, then `on_socket_drained`."""

    guest: int


@dataclass(frozen=True, slots=True)
class HangUp:
    """End a guest's connection after what was sent; the lender expects no call for it."""

    guest: int


@dataclass(frozen=True, slots=True)
class Close:
    """Close the guest's memfd, if there is one, then call `Lender.on_closed`: its memory is free only then.

    All other actions on the guest come before, also those that come of them meanwhile.
    """

    guest: int


Action = Send | Populate | Punch | FindHoles | CountPopulated | DrainSocket | HangUp | Close


@dataclass(frozen=True, slots=True)
class Holding:
    """What a guest holds, as kept over a restart of tmemd: the number of slabs, not which."""

    token: bytes
    name: str
    uid: int
    pid: int
    slabs: int
    ephemeral: int
    persistent: int
    settings: GuestSettings
