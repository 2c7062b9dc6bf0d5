"""The process that makes all calls on arenas, one at a time: python -m tmem.lending.daemon.worker.

Such a call may never return: a guest that writes to its memfd from a mapping of a file on a hanging FUSE filesystem
holds the inode's lock, and a process that waits for this lock cannot be killed. So a worker holds nothing but its
socket and the memfd of its current job; tmemd abandons it if it hangs and starts another. A worker exits before its
next job if tmemd has exited.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from enum import IntEnum

import msgspec

from tmem.arena import SLAB_SIZE, punch
from tmem.lending.daemon import arenas
from tmem.lending.daemon.processes import make_undumpable
from tmem.lending.protocol.runs import Runs, count, merge, split_by_slabs
from tmemcommon.headroom import Headroom

MAX_MESSAGE = 1 << 17  # bytes of a job or a result
POPULATE_SLABS = 16  # 1 MiB: populated between two checks of the headroom
PUNCH_SLABS = 1024  # 64 MiB: punched between two signs of life
_HEARTBEAT = 0.1  # seconds between two signs of life


class Operation(IntEnum):
    """What a job does."""

    POPULATE = 0
    PUNCH = 1
    FIND_HOLES = 2
    COUNT_POPULATED = 3


class Job(msgspec.Struct, frozen=True, array_like=True):
    """One operation on the memfd that is sent with it."""

    operation: Operation
    runs: Runs = ()
    all_slabs: int = 0  # slabs of the whole search, of which this FIND_HOLES may be a part


class Result(msgspec.Struct, frozen=True, array_like=True):
    """The result of a job. If it is not `finished`, it is a sign of life: the worker has started or makes progress."""

    runs: Runs = ()  # the slabs that were populated, or that have holes
    populated_bytes: int = 0
    shortage: str = ""  # why not all slabs were populated
    finished: bool = True


class Worker:
    """Does jobs. `heartbeat` is called between two steps of a long one."""

    def __init__(self, headroom: Headroom, heartbeat: Callable[[], None]) -> None:
        self._headroom = headroom
        self._heartbeat = heartbeat

    def do(self, fd: int, job: Job) -> Result:
        """Do one job on a memfd."""
        if job.operation == Operation.POPULATE:
            return self._populate(fd, job.runs)
        if job.operation == Operation.FIND_HOLES:
            return Result(self._find_holes(fd, job.runs, job.all_slabs))
        if job.operation == Operation.COUNT_POPULATED:
            return Result(populated_bytes=arenas.populated_bytes(fd))
        self._punch(fd, job.runs)
        return Result()

    def _populate(self, fd: int, runs: Runs) -> Result:
        """Populate slabs in steps, each within the headroom. If a step fails, punch it and the rest."""
        populated: list[tuple[int, int]] = []
        steps = list(split_by_slabs(runs, POPULATE_SLABS))
        for number, step in enumerate(steps):
            self._heartbeat()
            shortage = self._populate_step(fd, step)
            if shortage:
                for rest in steps[number:]:
                    self._punch(fd, rest)
                return Result(merge(populated), shortage=shortage)
            populated += step
        return Result(merge(populated))

    def _populate_step(self, fd: int, runs: Runs) -> str:
        """Populate at most 1 MiB; return why it failed, empty if it did not."""
        reason = self._headroom.refusal(count(runs) * SLAB_SIZE)
        if reason is None:
            try:
                for first, length in runs:
                    arenas.populate(fd, first, length)
            except OSError as error:
                reason = f"the kernel has no memory for a slab: {error.strerror}"
        return reason or ""

    def _punch(self, fd: int, runs: Runs) -> None:
        for first, length in runs:
            for start in range(first, first + length, PUNCH_SLABS):
                self._heartbeat()
                with contextlib.suppress(OSError):  # the audit finds and reports what stays populated
                    punch(fd, start, min(PUNCH_SLABS, first + length - start))

    def _find_holes(self, fd: int, runs: Runs, all_slabs: int) -> Runs:
        """Return the slabs that are not fully populated; check each slab only if the total shows that some are not."""
        if arenas.populated_bytes(fd) == all_slabs * SLAB_SIZE:
            return ()
        holes = []
        for first, length in runs:
            for slab in range(first, first + length):
                self._heartbeat()
                if not arenas.is_populated(fd, slab):
                    holes.append((slab, 1))
        return merge(holes)


class Service:
    """Receives jobs from a socket and sends their results, until the other end is closed."""

    def __init__(self, connection: socket.socket, headroom: Headroom) -> None:
        self._connection = connection
        self._worker = Worker(headroom, self._heartbeat)
        self._last_sign = time.monotonic()

    def run(self) -> None:
        """Serve until the other end is closed."""
        decoder, poll = msgspec.msgpack.Decoder(Job), select.poll()
        poll.register(self._connection, select.POLLIN)
        self._send(Result(finished=False))
        # Jobs that an ended tmemd left in the socket are dropped: the next tmemd may have lent their slabs already.
        while not poll.poll()[0][1] & select.POLLHUP:
            data, fds, _, _ = socket.recv_fds(self._connection, MAX_MESSAGE, 1)
            self._last_sign = time.monotonic()
            try:
                result = self._worker.do(fds[0], decoder.decode(data))
            finally:
                os.close(fds[0])
            self._send(result)

    def _send(self, result: Result) -> None:
        self._connection.sendall(msgspec.msgpack.encode(result))

    def _heartbeat(self) -> None:
        now = time.monotonic()
        if now - self._last_sign > _HEARTBEAT:
            self._last_sign = now
            self._send(Result(finished=False))


def main() -> None:
    """Run a worker. The arguments are the descriptor of its socket and the machine's reserve in bytes."""
    make_undumpable()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # they are meant for tmemd; a worker exits after it
    with (
        socket.socket(fileno=int(sys.argv[1])) as connection,
        contextlib.suppress(BrokenPipeError, ConnectionResetError),
    ):
        Service(connection, Headroom(int(sys.argv[2]))).run()


if __name__ == "__main__":
    main()
