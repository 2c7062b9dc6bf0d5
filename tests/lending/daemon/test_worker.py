"""What a worker does to arenas: in steps, within the headroom, and nothing left behind by a step that failed."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import msgspec
import pytest

from tests.lending.fakeguest import make_arena
from tmem.arena import SLAB_SIZE
from tmem.lending.daemon import memfds
from tmem.lending.daemon.jobs import Job, Kind, Result
from tmem.lending.daemon.worker import PUNCH_SLABS, Service, Worker
from tmem.lending.protocol.runs import Runs
from tmemcommon.headroom import Headroom

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


class Shop:
    """A worker, an arena, and how often it gave a sign of life."""

    def __init__(self, slabs: int = SLABS) -> None:
        self.room = Room()
        self.beats = 0
        self.fd = make_arena(slabs)
        self._worker = Worker(self.room, self._beat)

    def _beat(self) -> None:
        self.beats += 1

    def do(self, kind: Kind, *runs: tuple[int, int], whole: int = 0) -> Result:
        return self._worker.do(self.fd, Job(kind, runs, whole))

    def find_holes(self, *runs: tuple[int, int]) -> Runs:
        return self.do(Kind.FIND_HOLES, *runs, whole=sum(count for _, count in runs)).runs

    @property
    def real(self) -> int:
        return self.do(Kind.COUNT_REAL).populated_bytes // SLAB_SIZE


@pytest.fixture
def shop() -> Iterator[Shop]:
    made = Shop()
    yield made
    os.close(made.fd)


def test_slabs_are_made_real_in_steps_of_a_mebibyte(shop: Shop) -> None:
    runs = ((0, 40), (50, 1), (60, 3), (100, 20))
    assert shop.do(Kind.MAKE_REAL, *runs).runs == runs
    assert shop.real == 64
    assert shop.room.asked == [16 * SLAB_SIZE] * 4
    assert [offset // SLAB_SIZE for offset in shop.room.asked] == [memfds.STEP_SLABS] * 4


def test_single_slabs_share_a_step(shop: Shop) -> None:
    runs = tuple((slab, 1) for slab in range(0, 40, 2))
    assert shop.do(Kind.MAKE_REAL, *runs).runs == runs
    assert shop.room.asked == [16 * SLAB_SIZE, 4 * SLAB_SIZE]


def test_what_there_is_no_room_for_is_not_made_and_not_left(shop: Shop) -> None:
    shop.room.room = 40 * SLAB_SIZE
    assert shop.do(Kind.MAKE_REAL, (10, 64)) == Result(((10, 32),), shortage="no room")
    assert shop.real == 32
    shop.room.room = 1 << 30
    assert shop.do(Kind.MAKE_REAL, (0, 1)) == Result(((0, 1),))


def test_slabs_are_punched_with_signs_of_life_between() -> None:
    shop = Shop(3 * PUNCH_SLABS)
    try:
        shop.do(Kind.MAKE_REAL, (0, 9))
        shop.do(Kind.PUNCH, (0, 5), (7, 1))
        assert shop.real == 3
        shop.beats = 0
        shop.do(Kind.PUNCH, (0, 3 * PUNCH_SLABS))
        assert (shop.real, shop.beats) == (0, 3)
    finally:
        os.close(shop.fd)


def test_holes_are_found(shop: Shop) -> None:
    shop.do(Kind.MAKE_REAL, (0, 9))
    shop.do(Kind.PUNCH, (3, 2))
    assert shop.find_holes((0, 3), (5, 4)) == ()
    assert shop.find_holes((1, 6), (20, 2)) == ((3, 2), (20, 2))
    assert shop.real == 7, "looking makes nothing real"


def test_a_job_that_a_tmemd_left_behind_is_not_done(shop: Shop) -> None:
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with its:
        socket.send_fds(ours, [msgspec.msgpack.encode(Job(Kind.MAKE_REAL, ((0, 4),)))], [shop.fd])
        ours.close()
        with pytest.raises(BrokenPipeError):
            Service(its, shop.room).run()
    assert shop.real == 0
