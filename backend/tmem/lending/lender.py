"""Who is lent what and who gives way: all of tmemd's decisions, without I/O and without a clock.

Every method that decides takes `now`, seconds of any monotonic clock, and returns actions, which are to be carried
out in order. Guests are numbers, unique while tmemd runs. All sizes are slabs.
"""

from __future__ import annotations

from collections.abc import Sequence

from tmem.lending.actions import Action, Holding
from tmem.lending.messages import FromGuest, Hello, Row, Runs

PATIENCE = 0.020  # seconds that a guest has to answer a Revoke
BATCH = 64  # slabs: the most that is made real, or that an honest guest may be in excess, at once
RETRY = 0.1  # seconds after which a guest that was denied asks again, at the soonest


class Lender:
    """The ledger's owner: joins, asks, returns, reports, ends and verbs go in, actions come out."""

    def __init__(
        self,
        size: int,
        *,
        division: str = "age",
        uid_cap: int | None = None,
        holdings: Sequence[Holding] = (),
        now: float = 0.0,
    ) -> None:
        """Start with `size` slabs to lend; `uid_cap` bounds what the guests of one uid other than 0 hold together.

        `holdings` are those of guests whose process is alive, from before a restart: they stay booked and are
        not lent to others until their guests claim them or end. Their numbers are given by `guests_away`.
        """
        raise NotImplementedError

    # Guests come and go.

    def guests_away(self) -> dict[int, Holding]:
        """Give the guests that are not connected, with what they hold (watch their processes, call `ended`)."""
        raise NotImplementedError

    def holdings(self) -> list[Holding]:
        """Give what every guest holds, to be kept for a restart. Slabs being made real count as held."""
        raise NotImplementedError

    def join(self, now: float, hello: Hello, uid: int, pid: int) -> tuple[int, list[Action]]:
        """Register a guest and give its number; its memfd must be known to be of `hello.slabs` and sealed.

        Refusal when it may not join; `retry` is set when the guest's old connection has not ended yet. With
        `again` the number is the one it had when its token is known.
        """
        raise NotImplementedError

    def received(self, now: float, guest: int, message: FromGuest) -> list[Action]:
        """Take a message of a connected guest; GuestFault when no honest guest sends it."""
        raise NotImplementedError

    def disconnected(self, now: float, guest: int) -> list[Action]:
        """Note that the connection ended, after all that it held was read; the guest keeps what it holds."""
        raise NotImplementedError

    def ended(self, now: float, guest: int) -> list[Action]:
        """Note that the guest's process is gone (its connection too); gives Close."""
        raise NotImplementedError

    def closed(self, now: float, guest: int) -> list[Action]:
        """Note that the memfd is closed: the guest's slabs are free and its number is forgotten."""
        raise NotImplementedError

    # What the executor found out.

    def made(self, now: float, guest: int, batch: int, runs: Runs) -> list[Action]:
        """Note which slabs of a MakeReal are real; the others are punched. Lends them, or denies if there are none.

        May be called for a guest that disconnected or ended since.
        """
        raise NotImplementedError

    def holes(self, now: float, guest: int, runs: Runs) -> list[Action]:
        """Note which claimed slabs turned out to be holes; ephemeral ones are answered as taken."""
        raise NotImplementedError

    def dry(self, now: float, guest: int) -> list[Action]:
        """Note that the guest's socket was read dry, after ReadDry: what it still owes is taken."""
        raise NotImplementedError

    def audited(self, now: float, guest: int, real_bytes: int) -> list[Action]:
        """Compare what is real in a guest's memfd (st_blocks * 512) with the ledger, when nothing is being made real.

        An excess is punched and counted; one that stays above a batch ends the lending to the guest.
        """
        raise NotImplementedError

    def deadline(self) -> float | None:
        """Give the time at which `wake` is to be called; None when nothing is waited for."""
        raise NotImplementedError

    def wake(self, now: float) -> list[Action]:
        """Act on what is due."""
        raise NotImplementedError

    # Verbs of a person; each may raise Refusal.

    def find(self, guest: str) -> int:
        """Give the number of a guest by its number or name; Refusal when there is none or more than one."""
        raise NotImplementedError

    def set_limits(
        self,
        now: float,
        guest: int,
        *,
        weight: float | None = None,
        cap: int | None = None,
        floor: int | None = None,
        persistent_cap: int | None = None,
    ) -> list[Action]:
        """Change limits; takes back what a lower cap no longer allows."""
        raise NotImplementedError

    def freeze(self, now: float, guest: int | None) -> list[Action]:
        """Freeze the pools of a guest, or of all and of those that come; nothing more is lent to them."""
        raise NotImplementedError

    def thaw(self, now: float, guest: int | None) -> list[Action]:
        """End what freeze and drain did."""
        raise NotImplementedError

    def revoke(self, now: float, guest: int, slabs: int, persistent: bool = False) -> list[Action]:
        """Take so many slabs back from a guest; persistent ones are asked for and never taken."""
        raise NotImplementedError

    def drain(self, now: float, guest: int) -> list[Action]:
        """Take back all ephemeral slabs of a guest, and lend it nothing until it is thawed."""
        raise NotImplementedError

    def resize(self, now: float, size: int) -> tuple[int, list[Action]]:
        """Change how much there is to lend; gives the new size, which persistent slabs and promises may keep larger."""
        raise NotImplementedError

    # What a person sees.

    def rows(self, now: float) -> list[Row]:
        """Give the table of guests, by number."""
        raise NotImplementedError

    def stats(self) -> dict[str, int | float]:
        """Give the sums and the counters; every reason of a refusal has its own."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise AssertionError unless sums equal totals, no slab is in two states and budgets hold."""
        raise NotImplementedError
