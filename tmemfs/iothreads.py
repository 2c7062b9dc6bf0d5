"""Run disk calls in threads that exist beforehand, each with an aligned buffer.

Writes to the overflow file may be needed because the machine has no memory left. Starting a thread or allocating a
buffer at that moment could wait for this very write. So trio's threads do not fit: they end after ten idle seconds, and
have no buffers.
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
    """A job and its result."""

    def __init__(self, job: Job[T]) -> None:
        self.job = job
        self.token = trio.lowlevel.current_trio_token()
        self.done = trio.Event()
        self.result: list[T] = []
        self.error: BaseException | None = None

    def run(self, buffer: memoryview) -> None:
        """Run the job and wake its task in the event loop."""
        try:
            self.result.append(self.job(buffer))
        except BaseException as error:
            self.error = error
        try:
            self.token.run_sync_soon(self.done.set)
        except trio.RunFinishedError:
            return  # the event loop has ended


class IoThreads:
    """A fixed number of threads that wait for jobs."""

    def __init__(self, name: str, count: int) -> None:
        self._queue: SimpleQueue[_Call[object] | None] = SimpleQueue()
        self._count = count
        for number in range(count):
            threading.Thread(target=self._serve, name=f"{name}-{number}", daemon=True).start()

    def _serve(self) -> None:
        # Anonymous memory is page-aligned, as O_DIRECT requires.
        buffer = memoryview(mmap.mmap(-1, BUFFER_BYTES))
        buffer[:] = bytes(BUFFER_BYTES)  # allocates the pages now
        while (call := self._queue.get()) is not None:
            call.run(buffer)

    async def run(self, job: Job[T]) -> T:
        """Run a job in the next free thread. Wait for its end even if cancelled, because it uses the caller's data."""
        call = _Call(job)
        self._queue.put(call)  # type: ignore[arg-type]
        with trio.CancelScope(shield=True):
            await call.done.wait()
        if call.error is not None:
            raise call.error
        return call.result[0]

    def stop(self) -> None:
        """End the threads after the queued jobs."""
        for _ in range(self._count):
            self._queue.put(None)
