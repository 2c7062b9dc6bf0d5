"""What is done to arenas: in order, in steps, within the headroom, and nothing left behind by a step that failed."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.lending.fakeguest import make_arena
from tmem.arena import SLAB_SIZE
from tmem.headroom import Headroom
from tmem.lending.daemon import memfds
from tmem.lending.daemon.arenas import Arenas
from tmem.lending.lender.actions import FindHoles, MakeReal, Punch

SLABS = 256


class Room(Headroom):
    """So many bytes of room; each question is written down."""

    def __init__(self, room: int = 1 << 40) -> None:
        self.room = room
        self.asked: list[int] = []

    def refusal(self, wanted: int) -> str | None:
        self.asked.append(wanted)
        if wanted > self.room:
            return "no room"
        self.room -= wanted
        return None


@pytest.fixture
def room() -> Room:
    return Room()


@pytest.fixture
def arenas(room: Room) -> Iterator[Arenas]:
    made = Arenas(room)
    made.adopt(1, make_arena(SLABS), SLABS)
    made.adopt(2, make_arena(SLABS), SLABS)
    yield made
    made.close()


def real(arenas: Arenas) -> list[int]:
    return [size // SLAB_SIZE for _, size in arenas.real_bytes()]


def test_slabs_are_made_real_in_steps_of_a_mebibyte(arenas: Arenas, room: Room) -> None:
    runs = ((0, 40), (50, 1), (60, 3), (100, 20))
    (found,) = arenas.work([MakeReal(1, 7, runs, False)])
    assert found.runs == runs
    assert real(arenas) == [64, 0]
    assert room.asked == [16 * SLAB_SIZE] * 4
    assert [offset // SLAB_SIZE for offset in room.asked] == [memfds.STEP_SLABS] * 4


def test_single_slabs_share_a_step(arenas: Arenas, room: Room) -> None:
    runs = tuple((slab, 1) for slab in range(0, 40, 2))
    (found,) = arenas.work([MakeReal(1, 7, runs, False)])
    assert found.runs == runs
    assert room.asked == [16 * SLAB_SIZE, 4 * SLAB_SIZE]


def test_what_there_is_no_room_for_is_not_made_and_not_left(
    arenas: Arenas, room: Room, caplog: pytest.LogCaptureFixture
) -> None:
    room.room = 40 * SLAB_SIZE
    (found,) = arenas.work([MakeReal(1, 7, ((10, 64),), False)])
    assert found.runs == ((10, 32),)
    assert real(arenas) == [32, 0]
    arenas.work([MakeReal(2, 8, ((0, 64),), False)])
    assert caplog.text.count("no room") == 1, "said once, not for every guest"
    room.room = 1 << 30
    (found,) = arenas.work([MakeReal(2, 9, ((0, 1),), False)])
    assert found.runs == ((0, 1),)


def test_decisions_are_carried_out_in_order(arenas: Arenas) -> None:
    found = arenas.work(
        [
            MakeReal(1, 1, ((0, 9),), False),
            Punch(1, ((0, 5), (7, 1))),
            MakeReal(1, 2, ((1, 1),), True),
            Punch(2, ((0, 9),)),
        ]
    )
    assert [one.runs for one in found] == [((0, 9),), ((1, 1),)]
    assert real(arenas) == [4, 0]


def test_holes_are_found(arenas: Arenas) -> None:
    arenas.work([MakeReal(1, 1, ((0, 9),), False), Punch(1, ((3, 2),))])
    (found,) = arenas.work([FindHoles(1, ((0, 3), (5, 4)))])
    assert found.runs == ()
    (found,) = arenas.work([FindHoles(1, ((1, 6), (20, 2)))])
    assert found.runs == ((3, 2), (20, 2))
    assert real(arenas) == [7, 0], "looking makes nothing real"


def test_a_guest_without_an_arena_here_has_nothing(arenas: Arenas) -> None:
    found = arenas.work([MakeReal(9, 1, ((0, 9),), False), Punch(9, ((0, 9),)), FindHoles(9, ((0, 9),))])
    assert [one.runs for one in found] == [(), ((0, 9),)]
    assert arenas.release(9) is None


def test_an_arena_is_found_by_its_memfd_and_released_once(arenas: Arenas) -> None:
    arena = arenas.get(1)
    assert arena is not None
    assert arenas.owner(arena.identity) == 1
    assert arenas.release(1) == arena
    assert arenas.owner(arena.identity) is None
    assert arenas.get(1) is None
    os.close(arena.fd)
