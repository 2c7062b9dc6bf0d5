"""Threads for disk calls that were started beforehand, each with an aligned buffer of its own.

What writes to the overflow file may run because the machine has no memory left: starting a thread or allocating a
buffer at that moment could wait for this very write. trio's threads end when they were idle for ten seconds, and their
calls bring their own buffers.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

import trio

T = TypeVar("T")

BUFFER_BYTES = 128 << 10

Job = Callable[[memoryview], T]


class _Call(Generic[T]):
    """One job on its way to a thread and back."""

    def __init__(self, job: Job[T]) -> None:
        self.job = job
        self.token = trio.lowlevel.current_trio_token()
        self.done = trio.Event()
        self.result: list[T] = []
        self.error: BaseException | None = None

    def run(self, buffer: memoryview) -> None:
        """Do the job and report to the event loop."""
        try:
            self.result.append(self.job(buffer))
        except BaseException as error:
            self.error = error
        try:
            self.token.run_sync_soon(self.done.set)
        except trio.RunFinishedError:
            return  # nobody waits any more


class IoThreads:
    """A few threads that wait for jobs."""

    def __init__(self, name: str, count: int) -> None:
        self._queue: SimpleQueue[_Call[object] | None] = SimpleQueue()
        self._count = count
        for number in range(count):
            threading.Thread(target=self._serve, name=f"{name}-{number}", daemon=True).start()

    def _serve(self) -> None:
        # An anonymous mapping begins at a page boundary, as O_DIRECT demands.
        buffer = memoryview(mmap.mmap(-1, BUFFER_BYTES))
        buffer[:] = bytes(BUFFER_BYTES)  # real from the start
        while (call := self._queue.get()) is not None:
            call.run(buffer)

    async def run(self, job: Job[T]) -> T:
        """Run a job in the next free thread, and wait for its end even when cancelled: it uses what we hold."""
        call = _Call(job)
        self._queue.put(call)  # type: ignore[arg-type]
        with trio.CancelScope(shield=True):
            await call.done.wait()
        if call.error is not None:
            raise call.error
        return call.result[0]

    def stop(self) -> None:
        """Let the threads end when they have done what is queued."""
        for _ in range(self._count):
            self._queue.put(None)
