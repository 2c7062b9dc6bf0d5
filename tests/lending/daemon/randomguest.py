"""Guests that borrow, return and reconnect at random, each in its own thread, and check their persistent slabs."""

from __future__ import annotations

import random
import threading
from pathlib import Path

from tests.conftest import SECONDS
from tests.lending.fakeguest import Denied, FakeGuest, GuestRefused


class RandomGuest(threading.Thread):
    """One guest that goes on whatever happens to tmemd. It checks the contents of its persistent slabs.

    It never writes to ephemeral slabs: a late write to a taken slab would populate it, and the populated memory could
    not be compared with the ledger.
    """

    def __init__(self, path: Path, number: int, seed: int, slabs: int = 96, persistent: int = 24) -> None:
        super().__init__(daemon=True)
        self.guest = FakeGuest(path, slabs, f"/mnt/{number}", persistent)
        self.lives = 0  # connections in which it got something done
        self.failure: BaseException | None = None
        self._rng = random.Random(f"{seed} {number}")
        self._contents: dict[int, bytes] = {}
        self._ending = threading.Event()

    def finish(self) -> None:
        """Stop, and take in what has arrived."""
        self._ending.set()
        self.join(SECONDS * 2)
        assert not self.is_alive(), "a borrower hangs"
        if self.failure is not None:
            raise self.failure

    def run(self) -> None:
        """Borrow until told to stop."""
        try:
            while not self._ending.is_set():
                self.guest.join_patiently()
                try:
                    self._live()
                except OSError:
                    self.guest.leave()
        except (Exception, GuestRefused) as error:
            self.failure = error

    def _live(self) -> None:
        """Borrow until told to stop, or until the connection ends, which is an OSError."""
        before = self.lives
        while not self._ending.is_set():
            try:
                self._turn()
                self.lives = before + 1
            except Denied:
                self._ending.wait(0.01)
            finally:
                self.verify()

    def verify(self) -> None:
        """Check that every persistent slab has what was written to it."""
        for slab, content in self._contents.items():
            assert self.guest.read(slab, len(content)) == content, f"persistent slab {slab} of {self.guest.name}"

    def _turn(self) -> None:
        rng, guest = self._rng, self.guest
        guest.answer_revokes()
        choice = rng.random()
        if choice < 0.5:
            guest.ask(rng.randint(1, 24))
        elif choice < 0.6 and len(guest.persistent) < 24:
            for slab in guest.ask(rng.randint(1, 4), persistent=True):
                self._contents[slab] = rng.randbytes(64)
                guest.write(slab, self._contents[slab])
        elif choice < 0.65 and guest.persistent:
            slab = rng.choice(sorted(guest.persistent))
            self._contents.pop(slab, None)  # it has none if tmemd went before all that was asked for was lent
            guest.give({slab}, persistent=True)
        elif guest.held:
            guest.give(set(rng.sample(sorted(guest.held), rng.randint(1, len(guest.held)))))
