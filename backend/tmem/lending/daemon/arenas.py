"""The memfds of the guests: one descriptor for each, on which tmemd itself makes no call that could hang."""

from __future__ import annotations

import os
from dataclasses import dataclass

from tmem.lending.daemon import memfds


@dataclass(frozen=True, slots=True)
class Arena:
    """One guest's memfd, and the user that it belongs to."""

    fd: int
    slabs: int
    uid: int
    identity: tuple[int, int]


class Arenas:
    """Hold one descriptor for each guest."""

    def __init__(self) -> None:
        self._arenas: dict[int, Arena] = {}

    def adopt(self, guest: int, fd: int, slabs: int, uid: int) -> None:
        """Keep the descriptor of a guest that has none here."""
        assert guest not in self._arenas
        self._arenas[guest] = Arena(fd, slabs, uid, memfds.identity(fd))

    def get(self, guest: int) -> Arena | None:
        """Give the arena of a guest, None when there is none here."""
        return self._arenas.get(guest)

    def owner(self, identity: tuple[int, int]) -> int | None:
        """Tell whose a memfd is."""
        return next((guest for guest, arena in self._arenas.items() if arena.identity == identity), None)

    def release(self, guest: int) -> None:
        """Close the descriptor of a guest."""
        os.close(self._arenas.pop(guest).fd)

    def close(self) -> None:
        """Close every descriptor; guests keep their memory."""
        for guest in [*self._arenas]:
            self.release(guest)
