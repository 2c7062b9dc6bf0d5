"""A guest with its pools and arena, to which a test lends slabs."""

from __future__ import annotations

import os
import random
from typing import TypeVar

from tmem import PAGE_SIZE, SLAB_SIZE, Pool, Tmem
from tmem.arena import punch
from tmem.lending.guest.borrowedarena import BorrowedArena
from tmem.lending.guest.borrower import Borrower
from tmem.lending.protocol.messages import FromGuest, Lend, Taken, Welcome
from tmem.lending.protocol.runs import Runs

M = TypeVar("M")
SLAB_PAGES = SLAB_SIZE // PAGE_SIZE


def noise(seed: int) -> bytes:
    """Return a page that does not compress: sixteen fill a slab."""
    return random.Random(seed).randbytes(PAGE_SIZE)


class PooledGuest:
    """A borrower with an arena and a pool of each kind."""

    def __init__(self, slabs: int = 256, name: str = "/mnt", persistent_slabs: int = 0) -> None:
        self.released: list[int] = []  # slabs of hswap that tmemd wants back
        self.hello: FromGuest | None = None
        self.source = BorrowedArena(slabs)
        self.tmem = Tmem(self.source, clock=lambda: 0.0)
        self.pool: Pool = self.tmem.new_pool(name="precache")
        self.kept: Pool = self.tmem.new_pool(persistent=True, name="hswap")
        self.borrower = Borrower(self.source, self.tmem, name, persistent_slabs, persistent_pages=self)

    def register(self, cap: int) -> None:
        """Register with a tmemd that accepts the guest."""
        self.hello = self.borrower.greeting()[0]
        self.borrower.on_welcome(Welcome(1, cap, cap // 2))

    def request_release(self, slabs: int) -> None:
        """Record what hswap is asked for."""
        self.released.append(slabs)

    def note_eviction(self) -> None:
        """Do nothing: there is no swap-like file."""

    def lend(self, runs: Runs, serial: int = 1, persistent: bool = False) -> None:
        """Populate slabs and lend them."""
        for first, count in runs:
            os.posix_fallocate(self.source.fd, first * SLAB_SIZE, count * SLAB_SIZE)
        self.borrower.on_message(0.0, Lend(runs, serial, persistent))

    def take(self, runs: Runs, serial: int = 1) -> None:
        """Punch slabs and send the Taken."""
        for first, count in runs:
            for slab in range(first, first + count):
                punch(self.source.fd, slab)
        self.borrower.on_message(0.0, Taken(runs, serial))

    def fill(self, pages: int) -> None:
        """Put pages that do not compress."""
        for index in range(pages):
            self.pool.put(1, index, noise(index))

    def sent(self, kind: type[M], now: float = 0.0) -> list[M]:
        """Return what the guest sends now; all of it must be of one kind."""
        messages = self.borrower.outgoing(now)
        assert all(isinstance(message, kind) for message in messages), messages
        return [message for message in messages if isinstance(message, kind)]

    def answer_revokes(self) -> list[FromGuest]:
        """Answer all Revokes; return what the guest sends."""
        messages = self.borrower.outgoing(0.0)
        while self.borrower.has_open_revoke:
            self.borrower.answer_revoke()
            messages += self.borrower.outgoing(0.0)
        return messages

    def check(self) -> None:
        """Check the borrower and the pools."""
        self.borrower.check()
        self.tmem.check()
