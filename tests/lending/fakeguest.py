"""A patient guest without a pool: what tests do with bench.subjects.syncguest, waiting for whatever takes a while."""

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
    """A connection, an arena, and what was lent of it. It answers a Revoke only when it is told to."""

    def join_patiently(self) -> Self:
        """Register again as soon as somebody listens who takes it."""
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
        """Ask, and again after a while, until so many are lent."""
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
        """Wait for a Revoke and give what it asks for; tell how many slabs that were."""
        return self.give_for(self.expect(m.Revoke))

    def write(self, slab: int, page: bytes) -> None:
        """Write to the start of a slab."""
        os.pwrite(self.fd, page, slab * SLAB_SIZE)

    def read(self, slab: int, length: int) -> bytes:
        """Read the start of a slab."""
        return os.pread(self.fd, length, slab * SLAB_SIZE)
