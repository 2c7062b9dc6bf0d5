"""One worker process at a time, and the tasks that it does in order; a worker that stands still is abandoned.

A worker is killed then, and dies once its call returns; nothing that it was told to do and had not begun is done by it.
So all of its unanswered tasks may be given to another. The one whose call hangs is the first of them.
"""

from __future__ import annotations

import array
import contextlib
import logging
import math
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import msgspec
import trio

from tmem.lending.daemon import processes
from tmem.lending.daemon.jobs import Job, Result
from tmem.lending.daemon.worker import LARGEST

log = logging.getLogger(__name__)

PATIENCE = 0.5  # seconds without a sign of life after which a worker that does not run is abandoned
_LOOKS = 2  # within these: one that waits for a core is no worse for it
_AHEAD = 16  # tasks that a worker has at once, so that it need not wait for the next one
_RESTART = 0.2  # seconds between two workers that end by themselves


@dataclass(slots=True, eq=False)
class Task:
    """A job on a guest's memfd, and who is told what came of it."""

    guest: int
    uid: int
    fd: int
    job: Job
    done: Callable[[Result], None]


class WorkerProcess:
    """A worker and our end of its socket."""

    def __init__(self, process: subprocess.Popen[bytes], connection: socket.socket) -> None:
        self._process = process
        self.socket = connection
        self.ready = False  # it said that it has started

    @classmethod
    def start(cls, reserve: int) -> Self:
        """Start a worker that has nothing of ours but its socket."""
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            ours.setblocking(False)
            words = [sys.executable, "-m", "tmem.lending.daemon.worker", str(its.fileno()), str(reserve)]
            return cls(subprocess.Popen(words, stdin=subprocess.DEVNULL, pass_fds=[its.fileno()]), ours)

    def send(self, task: Task) -> bool:
        """Hand over a task; False when the worker's queue is full."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [task.fd]))]
        with contextlib.suppress(OSError):  # that it has ended is seen by who reads
            return self.socket.sendmsg([msgspec.msgpack.encode(task.job)], rights, socket.MSG_NOSIGNAL) > 0
        return False

    def waits(self) -> bool:
        """Tell whether it waits for something other than a core."""
        return processes.state(self._process.pid) not in ("R", None)

    def kill(self) -> None:
        """Kill it: it ends when the call that it is in returns."""
        self._process.send_signal(signal.SIGKILL)
        self.socket.close()

    async def end(self) -> None:
        """Wait until it has ended."""
        pidfd = os.pidfd_open(self._process.pid)
        try:
            await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)
        self._process.wait()


class Lane:
    """Does tasks in order. `hung` takes a killed worker and all tasks that are not done, the hanging one first."""

    def __init__(self, reserve: int, hung: Callable[[WorkerProcess, list[Task]], None]) -> None:
        self._reserve = reserve
        self._hung = hung
        self._waiting: deque[Task] = deque()
        self._sent: deque[Task] = deque()
        self._worker: WorkerProcess | None = None
        self._wanted = trio.Event()
        self._patience = trio.CancelScope()
        self._looks = 0
        self._results = msgspec.msgpack.Decoder(Result)

    def submit(self, task: Task) -> None:
        """Queue a task, and hand it over if the worker has room for it."""
        self._waiting.append(task)
        self._wanted.set()
        self._send()

    async def run(self) -> None:
        """Do what is submitted, until cancelled."""
        while True:
            await self._wanted.wait()
            try:
                # In a thread: starting a program may wait for a disk.
                self._worker = worker = await trio.to_thread.run_sync(WorkerProcess.start, self._reserve)
                with worker.socket:
                    await self._serve(worker)
            except OSError as error:
                log.error("a worker cannot be started: %s", error)
            self._worker = None
            self._waiting.extendleft(reversed(self._sent))
            self._sent.clear()
            if not self._waiting:
                self._wanted = trio.Event()
            await trio.sleep(0 if self._looks >= _LOOKS else _RESTART)

    async def _serve(self, worker: WorkerProcess) -> None:
        """Exchange tasks for results until the worker hangs or ends."""
        self._looks = 0
        while True:
            with trio.CancelScope(deadline=self._deadline()) as self._patience:
                await trio.lowlevel.wait_readable(worker.socket)
                if not self._receive(worker):
                    log.error("a worker has ended")
                    await worker.end()
                    return
            if self._patience.cancelled_caught and worker.ready and self._sent:
                self._looks = self._looks + 1 if worker.waits() else 0
                if self._looks >= _LOOKS:
                    self._abandon(worker)
                    return
            self._send()

    def _deadline(self) -> float:
        """Give the time of the next look at the worker: none while it has nothing to do."""
        return trio.current_time() + PATIENCE / _LOOKS if self._sent or self._waiting else math.inf

    def _send(self) -> None:
        if self._worker is None:
            return
        while self._waiting and len(self._sent) < _AHEAD and self._worker.send(self._waiting[0]):
            self._sent.append(self._waiting.popleft())
        if self._patience.deadline == math.inf:
            self._patience.deadline = self._deadline()

    def _receive(self, worker: WorkerProcess) -> bool:
        """Take in what the worker says; False at its end."""
        while True:
            try:
                data = worker.socket.recv(LARGEST)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not data:
                return False
            self._looks, worker.ready = 0, True
            result = self._results.decode(data)
            if result.finished:
                self._sent.popleft().done(result)

    def _abandon(self, worker: WorkerProcess) -> None:
        tasks = [*self._sent, *self._waiting]
        self._sent.clear()
        self._waiting.clear()
        worker.kill()
        self._worker = None
        self._hung(worker, tasks)
