"""A queue of tasks for one worker process, which is killed and replaced if it hangs.

A killed worker exits when its current call returns, and starts no other job. So its unanswered tasks can be given to
another worker. The first of them is the one that hangs.
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
from tmem.lending.daemon.worker import MAX_MESSAGE, Job, Result

log = logging.getLogger(__name__)

HANG_SECONDS = 0.5  # without a sign of life, after which a worker that does not run is killed
_CHECKS = 2  # of the worker's state within this time: a worker that waits for a core in one of them is not killed
_MAX_SENT = 16  # tasks that a worker has at a time, so that it need not wait for the next one
_RESTART_SECONDS = 0.2  # between two workers that end by themselves


@dataclass(slots=True, eq=False)
class Task:
    """A job on a guest's memfd; `done` is called with its result."""

    guest: int
    uid: int
    fd: int
    job: Job
    done: Callable[[Result], None]


class WorkerProcess:
    """A worker and tmemd's end of its socket."""

    def __init__(self, process: subprocess.Popen[bytes], connection: socket.socket) -> None:
        self._process = process
        self.socket = connection
        self.ready = False  # it has reported that it started

    @classmethod
    def start(cls, reserve: int) -> Self:
        """Start a worker that inherits no descriptor but its socket."""
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            ours.setblocking(False)
            words = [sys.executable, "-m", "tmem.lending.daemon.worker", str(its.fileno()), str(reserve)]
            return cls(subprocess.Popen(words, stdin=subprocess.DEVNULL, pass_fds=[its.fileno()]), ours)

    def send(self, task: Task) -> bool:
        """Send a task; return False if the worker's socket is full."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [task.fd]))]
        with contextlib.suppress(OSError):  # if the worker has ended, the reader notices it
            return self.socket.sendmsg([msgspec.msgpack.encode(task.job)], rights, socket.MSG_NOSIGNAL) > 0
        return False

    def is_blocked(self) -> bool:
        """Return whether it waits for something other than a core."""
        return processes.state(self._process.pid) not in ("R", None)

    def kill(self) -> None:
        """Send SIGKILL: it ends when its current call returns."""
        self._process.send_signal(signal.SIGKILL)
        self.socket.close()

    async def wait_ended(self) -> None:
        """Wait until it has ended."""
        pidfd = os.pidfd_open(self._process.pid)
        try:
            await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)
        self._process.wait()


class WorkerQueue:
    """Does tasks in order.

    `on_hang` is called with a killed worker and all tasks that are not done; the first one hangs.
    """

    def __init__(self, reserve: int, on_hang: Callable[[WorkerProcess, list[Task]], None]) -> None:
        self._reserve = reserve
        self._on_hang = on_hang
        self._waiting: deque[Task] = deque()
        self._sent: deque[Task] = deque()
        self._worker: WorkerProcess | None = None
        self._submitted = trio.Event()
        self._check_scope = trio.CancelScope()  # cancelled when the worker is to be checked
        self._blocked_checks = 0
        self._results = msgspec.msgpack.Decoder(Result)

    def submit(self, task: Task) -> None:
        """Queue a task; send it at once if the worker has room."""
        self._waiting.append(task)
        self._submitted.set()
        self._send()

    async def run(self) -> None:
        """Do what is submitted, until cancelled."""
        while True:
            await self._submitted.wait()
            try:
                # In a thread, because starting a program may wait for a disk.
                self._worker = worker = await trio.to_thread.run_sync(WorkerProcess.start, self._reserve)
                with worker.socket:
                    await self._serve(worker)
            except OSError as error:
                log.error("a worker cannot be started: %s", error)
            self._worker = None
            self._waiting.extendleft(reversed(self._sent))
            self._sent.clear()
            if not self._waiting:
                self._submitted = trio.Event()
            await trio.sleep(0 if self._blocked_checks >= _CHECKS else _RESTART_SECONDS)

    async def _serve(self, worker: WorkerProcess) -> None:
        """Send tasks and receive results until the worker hangs or ends."""
        self._blocked_checks = 0
        while True:
            with trio.CancelScope(deadline=self._next_check()) as self._check_scope:
                await trio.lowlevel.wait_readable(worker.socket)
                if not self._receive(worker):
                    log.error("a worker has ended unexpectedly; it is started again")
                    await worker.wait_ended()
                    return
            if self._check_scope.cancelled_caught and worker.ready and self._sent:
                self._blocked_checks = self._blocked_checks + 1 if worker.is_blocked() else 0
                if self._blocked_checks >= _CHECKS:
                    self._abandon(worker)
                    return
            self._send()

    def _next_check(self) -> float:
        """Return the time of the next check of the worker; infinity while it has nothing to do."""
        return trio.current_time() + HANG_SECONDS / _CHECKS if self._sent or self._waiting else math.inf

    def _send(self) -> None:
        if self._worker is None:
            return
        while self._waiting and len(self._sent) < _MAX_SENT and self._worker.send(self._waiting[0]):
            self._sent.append(self._waiting.popleft())
        if self._check_scope.deadline == math.inf:
            self._check_scope.deadline = self._next_check()

    def _receive(self, worker: WorkerProcess) -> bool:
        """Handle what the worker has sent; return False if it has ended."""
        while True:
            try:
                data = worker.socket.recv(MAX_MESSAGE)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not data:
                return False
            self._blocked_checks, worker.ready = 0, True
            result = self._results.decode(data)
            if result.finished:
                self._sent.popleft().done(result)

    def _abandon(self, worker: WorkerProcess) -> None:
        tasks = [*self._sent, *self._waiting]
        self._sent.clear()
        self._waiting.clear()
        worker.kill()
        self._worker = None
        self._on_hang(worker, tasks)
