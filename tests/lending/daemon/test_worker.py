"""A worker works on arenas in steps within the headroom, and a failed step leaves nothing populated."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import msgspec
import pytest

from tests.lending.fakeguest import make_arena
from tmem.arena import SLAB_SIZE
from tmem.lending.daemon.worker import POPULATE_SLABS, PUNCH_SLABS, Job, Operation, Result, Service, Worker
from tmem.lending.protocol.runs import Runs
from tmemcommon.headroom import Headroom

SLABS = 256


class FakeHeadroom(Headroom):
    """A fixed number of bytes; records each request."""

    def __init__(self, spare: int = 1 << 40) -> None:
        self.spare = spare
        self.asked: list[int] = []

    def refusal(self, wanted: int) -> str | None:
        self.asked.append(wanted)
        if wanted > self.spare:
            return "no room"
        self.spare -= wanted
        return None


class WorkerFixture:
    """A worker, an arena, and the number of its heartheartbeats."""

    def __init__(self, slabs: int = SLABS) -> None:
        self.headroom = FakeHeadroom()
        self.heartbeats = 0
        self.fd = make_arena(slabs)
        self._worker = Worker(self.headroom, self._heartbeat)

    def _heartbeat(self) -> None:
        self.heartbeats += 1

    def do(self, operation: Operation, *runs: tuple[int, int], all_slabs: int = 0) -> Result:
        return self._worker.do(self.fd, Job(operation, runs, all_slabs))

    def find_holes(self, *runs: tuple[int, int]) -> Runs:
        return self.do(Operation.FIND_HOLES, *runs, all_slabs=sum(count for _, count in runs)).runs

    @property
    def populated(self) -> int:
        return self.do(Operation.COUNT_POPULATED).populated_bytes // SLAB_SIZE


@pytest.fixture
def fixture() -> Iterator[WorkerFixture]:
    made = WorkerFixture()
    yield made
    os.close(made.fd)


def test_slabs_are_populated_in_steps_of_1_mib(fixture: WorkerFixture) -> None:
    runs = ((0, 40), (50, 1), (60, 3), (100, 20))
    assert fixture.do(Operation.POPULATE, *runs).runs == runs
    assert fixture.populated == 64
    assert fixture.headroom.asked == [16 * SLAB_SIZE] * 4
    assert [offset // SLAB_SIZE for offset in fixture.headroom.asked] == [POPULATE_SLABS] * 4


def test_single_slabs_share_a_step(fixture: WorkerFixture) -> None:
    runs = tuple((slab, 1) for slab in range(0, 40, 2))
    assert fixture.do(Operation.POPULATE, *runs).runs == runs
    assert fixture.headroom.asked == [16 * SLAB_SIZE, 4 * SLAB_SIZE]


def test_a_failed_step_and_the_rest_are_left_unpopulated(fixture: WorkerFixture) -> None:
    fixture.headroom.spare = 40 * SLAB_SIZE
    assert fixture.do(Operation.POPULATE, (10, 64)) == Result(((10, 32),), shortage="no room")
    assert fixture.populated == 32
    fixture.headroom.spare = 1 << 30
    assert fixture.do(Operation.POPULATE, (0, 1)) == Result(((0, 1),))


def test_a_long_punch_has_heartbeats() -> None:
    fixture = WorkerFixture(3 * PUNCH_SLABS)
    try:
        fixture.do(Operation.POPULATE, (0, 9))
        fixture.do(Operation.PUNCH, (0, 5), (7, 1))
        assert fixture.populated == 3
        fixture.heartbeats = 0
        fixture.do(Operation.PUNCH, (0, 3 * PUNCH_SLABS))
        assert (fixture.populated, fixture.heartbeats) == (0, 3)
    finally:
        os.close(fixture.fd)


def test_holes_are_found(fixture: WorkerFixture) -> None:
    fixture.do(Operation.POPULATE, (0, 9))
    fixture.do(Operation.PUNCH, (3, 2))
    assert fixture.find_holes((0, 3), (5, 4)) == ()
    assert fixture.find_holes((1, 6), (20, 2)) == ((3, 2), (20, 2))
    assert fixture.populated == 7, "the search leaves nothing populated"


def test_a_job_of_an_ended_tmemd_is_not_done(fixture: WorkerFixture) -> None:
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with its:
        socket.send_fds(ours, [msgspec.msgpack.encode(Job(Operation.POPULATE, ((0, 4),)))], [fixture.fd])
        ours.close()
        with pytest.raises(BrokenPipeError):
            Service(its, fixture.headroom).run()
    assert fixture.populated == 0
