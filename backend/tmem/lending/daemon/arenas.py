"""The memfds of the guests, and what the lender's decisions do to them. Its `work` may run in a thread.

Everything is done in the order in which it was decided, by one thread at a time: a slab that was punched may be made
real again a moment later, and what one guest gives up is free before another gets it.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass

from tmem.arena import SLAB_SIZE, punch
from tmem.headroom import Headroom
from tmem.lending.daemon import memfds
from tmem.lending.lender.actions import FindHoles, MakeReal, Punch
from tmem.lending.lender.slabmap import count, in_steps
from tmem.lending.protocol.messages import Runs

log = logging.getLogger(__name__)

Work = MakeReal | Punch | FindHoles


@dataclass(frozen=True, slots=True)
class Arena:
    """One guest's memfd."""

    fd: int
    slabs: int
    identity: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Found:
    """What came of a MakeReal or a FindHoles: the slabs that are real, or that are holes."""

    work: MakeReal | FindHoles
    runs: Runs


class Arenas:
    """Hold one descriptor for each guest, make slabs real within the headroom, and punch them."""

    def __init__(self, headroom: Headroom) -> None:
        self._headroom = headroom
        self._arenas: dict[int, Arena] = {}
        self._shortage = ""  # why memory is short now, empty while it is not

    def adopt(self, guest: int, fd: int, slabs: int) -> None:
        """Keep the descriptor of a guest that has none here."""
        assert guest not in self._arenas
        self._arenas[guest] = Arena(fd, slabs, memfds.identity(fd))

    def get(self, guest: int) -> Arena | None:
        """Give the arena of a guest, None when there is none here."""
        return self._arenas.get(guest)

    def owner(self, identity: tuple[int, int]) -> int | None:
        """Tell whose a memfd is."""
        return next((guest for guest, arena in self._arenas.items() if arena.identity == identity), None)

    def release(self, guest: int) -> Arena | None:
        """Hand over a guest's arena, to be freed."""
        return self._arenas.pop(guest, None)

    def real_bytes(self) -> Iterator[tuple[int, int]]:
        """Give each guest with what is real of its arena."""
        for guest, arena in self._arenas.items():
            yield guest, memfds.real_bytes(arena.fd)

    def work(self, works: list[Work]) -> list[Found]:
        """Carry out decisions in order and give what was found; a guest that has no memfd here has nothing real."""
        found = []
        for work in works:
            arena = self._arenas.get(work.guest)
            if isinstance(work, MakeReal):
                found.append(Found(work, self._make_real(arena, work.runs) if arena else ()))
            elif isinstance(work, FindHoles):
                found.append(Found(work, _holes(arena, work.runs) if arena else work.runs))
            elif arena is not None:
                _punch(arena, work.runs)
        return found

    def close(self) -> None:
        """Close every descriptor; guests keep their memory."""
        for arena in self._arenas.values():
            os.close(arena.fd)
        self._arenas.clear()

    def _make_real(self, arena: Arena, runs: Runs) -> Runs:
        """Make slabs real step by step, each within the headroom; punch what a step that failed left."""
        made: list[tuple[int, int]] = []
        steps = list(in_steps(runs, memfds.STEP_SLABS))
        for number, step in enumerate(steps):
            shortage = self._step(arena.fd, step)
            if shortage and not self._shortage:
                log.warning("slabs are not lent: %s", shortage)
            self._shortage = shortage
            if shortage:
                for rest in steps[number:]:
                    _punch(arena, rest)
                break
            made += step
        return joined(made)

    def _step(self, fd: int, runs: Runs) -> str:
        """Make at most 1 MiB real; give the reason why it could not be, empty when it could."""
        reason = self._headroom.refusal(count(runs) * SLAB_SIZE)
        if reason is None:
            try:
                for first, length in runs:
                    memfds.make_real(fd, first, length)
            except OSError as error:
                reason = f"the kernel has no memory for a slab: {error.strerror}"
        return reason or ""


def joined(runs: list[tuple[int, int]]) -> Runs:
    """Join runs that follow each other."""
    whole: list[tuple[int, int]] = []
    for first, length in runs:
        if whole and sum(whole[-1]) == first:
            whole[-1] = (whole[-1][0], whole[-1][1] + length)
        else:
            whole.append((first, length))
    return tuple(whole)


def _punch(arena: Arena, runs: Runs) -> None:
    for first, length in runs:
        with contextlib.suppress(OSError):  # the audit sees what stays, and says so
            punch(arena.fd, first, length)


def _holes(arena: Arena, runs: Runs) -> Runs:
    """Find which slabs are not wholly real; nothing is looked at slab by slab when all of it must be."""
    if memfds.real_bytes(arena.fd) == count(runs) * SLAB_SIZE:
        return ()
    slabs = (slab for first, length in runs for slab in range(first, first + length))
    return joined([(slab, 1) for slab in slabs if not memfds.is_whole(arena.fd, slab)])
