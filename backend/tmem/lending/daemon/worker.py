"""The process that makes all calls on guests' memfds, one after the other: python -m tmem.lending.daemon.worker.

Such a call may never return: a guest that writes from a mapping of a file on a hanging FUSE filesystem holds the
inode's lock meanwhile, and who waits for that lock cannot be killed. So the calls are made where nothing else is
held: a worker has no descriptor but its socket and the memfd at hand, and tmemd abandons it and starts another. It ends
when tmemd does, before its next job.
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

import msgspec

from tmem.arena import SLAB_SIZE, punch
from tmem.lending.daemon import memfds
from tmem.lending.daemon.jobs import Job, Kind, Result
from tmem.lending.daemon.processes import make_undumpable
from tmem.lending.protocol.runs import Runs, count, merge, split_by_slabs
from tmemcommon.headroom import Headroom

PUNCH_SLABS = 1024  # 64 MiB: what is freed between two signs of life
LARGEST = 1 << 17  # bytes of a job or a result
_BEAT = 0.1  # seconds between two signs of life


class Worker:
    """Carries out jobs. `beat` is called between two steps of a long one."""

    def __init__(self, headroom: Headroom, beat: Callable[[], None]) -> None:
        self._headroom = headroom
        self._beat = beat

    def do(self, fd: int, job: Job) -> Result:
        """Do one job to a memfd."""
        if job.kind == Kind.MAKE_REAL:
            return self._make_real(fd, job.runs)
        if job.kind == Kind.FIND_HOLES:
            return Result(self._holes(fd, job.runs, job.whole))
        if job.kind == Kind.COUNT_REAL:
            return Result(populated_bytes=memfds.populated_bytes(fd))
        self._punch(fd, job.runs)
        return Result()

    def _make_real(self, fd: int, runs: Runs) -> Result:
        """Make slabs real step by step, each within the headroom; punch what a step that failed left."""
        made: list[tuple[int, int]] = []
        steps = list(split_by_slabs(runs, memfds.STEP_SLABS))
        for number, step in enumerate(steps):
            self._beat()
            shortage = self._step(fd, step)
            if shortage:
                for rest in steps[number:]:
                    self._punch(fd, rest)
                return Result(merge(made), shortage=shortage)
            made += step
        return Result(merge(made))

    def _step(self, fd: int, runs: Runs) -> str:
        """Make at most 1 MiB real; give the reason why it could not be, empty when it could."""
        reason = self._headroom.refusal(count(runs) * SLAB_SIZE)
        if reason is None:
            try:
                for first, length in runs:
                    memfds.populate(fd, first, length)
            except OSError as error:
                reason = f"the kernel has no memory for a slab: {error.strerror}"
        return reason or ""

    def _punch(self, fd: int, runs: Runs) -> None:
        for first, length in runs:
            for start in range(first, first + length, PUNCH_SLABS):
                self._beat()
                with contextlib.suppress(OSError):  # the audit sees what stays, and says so
                    punch(fd, start, min(PUNCH_SLABS, first + length - start))

    def _holes(self, fd: int, runs: Runs, whole: int) -> Runs:
        """Find which slabs are not wholly real; nothing is looked at slab by slab when all of it must be."""
        if memfds.populated_bytes(fd) == whole * SLAB_SIZE:
            return ()
        holes = []
        for first, length in runs:
            for slab in range(first, first + length):
                self._beat()
                if not memfds.is_whole(fd, slab):
                    holes.append((slab, 1))
        return merge(holes)


class Service:
    """Take jobs from a socket and answer each, until the other end is closed."""

    def __init__(self, connection: socket.socket, headroom: Headroom) -> None:
        self._connection = connection
        self._worker = Worker(headroom, self._beat)
        self._spoke = time.monotonic()

    def run(self) -> None:
        """Serve to the end."""
        decoder, poll = msgspec.msgpack.Decoder(Job), select.poll()
        poll.register(self._connection, select.POLLIN)
        self._say(Result(finished=False))
        # A job that a tmemd left behind is not done: the next one may have lent its slabs already.
        while not poll.poll()[0][1] & select.POLLHUP:
            data, fds, _, _ = socket.recv_fds(self._connection, LARGEST, 1)
            self._spoke = time.monotonic()
            try:
                result = self._worker.do(fds[0], decoder.decode(data))
            finally:
                os.close(fds[0])
            self._say(result)

    def _say(self, result: Result) -> None:
        self._connection.sendall(msgspec.msgpack.encode(result))

    def _beat(self) -> None:
        now = time.monotonic()
        if now - self._spoke > _BEAT:
            self._spoke = now
            self._say(Result(finished=False))


def main() -> None:
    """Run a worker: the arguments are the number of its socket and the machine's reserve in bytes."""
    make_undumpable()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # they mean tmemd, and its end is ours
    with (
        socket.socket(fileno=int(sys.argv[1])) as connection,
        contextlib.suppress(BrokenPipeError, ConnectionResetError),
    ):
        Service(connection, Headroom(int(sys.argv[2]))).run()


if __name__ == "__main__":
    main()
