"""A guest without a pool for tests: bench.subjects.syncguest with methods that retry and wait."""

from __future__ import annotations

import os
import time
from typing import Self

from bench.subjects.syncguest import SEALS, Denied, GuestRefused, SyncGuest, make_arena
from tests.conftest import SECONDS
from tmem.arena import SLAB_SIZE
from tmem.lending.protocol import messages as m

__all__ = ["SEALS", "Denied", "FakeGuest", "GuestRefused", "make_arena"]


class FakeGuest(SyncGuest):
    """A connection, an arena, and what was lent of it. It answers a Revoke only in `answer_revoke(s)`."""

    def join_patiently(self) -> Self:
        """Register again; retry until a tmemd accepts it."""
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                return self.join(again=True)
            except (OSError, GuestRefused):
                self.leave()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    def ask_until(self, slabs: int, persistent: bool = False) -> set[int]:
        """Ask repeatedly until `slabs` slabs are lent; return them."""
        got: set[int] = set()
        deadline = time.monotonic() + SECONDS
        while len(got) < slabs:
            try:
                got |= self.ask(min(m.MAX_ASK, slabs - len(got)), persistent)
            except Denied:
                assert time.monotonic() < deadline, f"only {len(got)} of {slabs} slabs were lent"
                time.sleep(0.02)
        return got

    def answer_revoke(self) -> int:
        """Wait for a Revoke and return the slabs that it asks for; return how many."""
        return self.give_for(self.expect(m.Revoke))

    def write(self, slab: int, page: bytes) -> None:
        """Write to the start of a slab."""
        os.pwrite(self.fd, page, slab * SLAB_SIZE)

    def read(self, slab: int, length: int) -> bytes:
        """Read the start of a slab."""
        return os.pread(self.fd, length, slab * SLAB_SIZE)
