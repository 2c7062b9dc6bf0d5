"""The descriptors of guests' memfds."""

from __future__ import annotations

import contextlib

from tests.lending.fakeguest import make_arena
from tmem.lending.daemon.arenas import Arenas


def test_an_arena_is_found_by_its_memfd_and_released_once() -> None:
    with contextlib.closing(Arenas()) as arenas:
        for guest in (1, 2):
            arenas.adopt(guest, make_arena(64), 64, 1000)
        arena = arenas.get(1)
        assert arena is not None
        assert arenas.owner(arena.identity) == 1
        arenas.release(1)
        assert arenas.owner(arena.identity) is None
        assert arenas.get(1) is None
        assert arenas.get(2) is not None
