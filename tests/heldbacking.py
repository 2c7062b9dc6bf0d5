"""A backing whose calls a test can hold before and after their effect, shorten, or fail.

Calls run in place instead of in a thread, unless a test asks for `threads` (under a real clock).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import trio
import trio.testing

from tmemfs.backing import Backing, SlottedFile

P = ParamSpec("P")
T = TypeVar("T")


class Latch:
    """Hold calls while shut, and release them one by one."""

    def __init__(self) -> None:
        self.shut = False
        self._held: list[trio.Event] = []

    async def pass_through(self) -> None:
        """Return at once when open; wait for the release when shut."""
        if self.shut:
            held = trio.Event()
            self._held.append(held)
            await held.wait()

    async def wait_held(self, count: int) -> None:
        """Wait until no task can run; assert that `count` calls are held then."""
        await trio.testing.wait_all_tasks_blocked()
        assert len(self._held) == count, (len(self._held), count)

    def release(self, position: int = 0) -> None:
        """Release one call, by default the one that is held longest."""
        self._held.pop(position).set()

    def open(self) -> None:
        """Release all calls, and hold none from now on."""
        self.shut = False
        while self._held:
            self.release()


class HeldBacking(Backing):
    """The backing, with latches around every call and errors that a test sets."""

    def __init__(self, *, threads: bool, drop: bool) -> None:
        super().__init__(None, local=True, drop=drop)
        self._threads = threads
        self.before_read, self.after_read = Latch(), Latch()
        self.before_write, self.after_write = Latch(), Latch()
        self.after_meta = Latch()
        self.read_error: OSError | None = None
        self.data_error: OSError | None = None
        self.short_write: int | None = None  # the next write writes only so many bytes
        self.jitter: random.Random | None = None
        self.read_calls: list[tuple[int, int]] = []  # (offset, size)

    async def _let_others_run(self) -> None:
        """Run other tasks, up to six times with `jitter`."""
        await trio.lowlevel.checkpoint()
        if self.jitter is not None:
            for _ in range(self.jitter.randrange(6)):
                await trio.lowlevel.checkpoint()

    async def _in_thread(self, call: Callable[[], T], threads: trio.CapacityLimiter) -> T:
        return await super()._in_thread(call, threads) if self._threads else call()

    async def _for_file(self, file: SlottedFile, call: Callable[[], T]) -> T:
        if self._threads:
            return await super()._for_file(file, call)
        try:
            return call()
        except OSError:
            self.errors += 1
            raise

    async def meta(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a metadata call; hold its return."""
        result = await super().meta(call, *args, **kwargs)
        await self.after_meta.pass_through()
        return result

    async def read(self, file: SlottedFile, fd: int, offset: int, size: int) -> bytearray:
        """Read between the two latches."""
        self.read_calls.append((offset, size))
        await self.before_read.pass_through()
        await self._let_others_run()
        if self.read_error is not None:
            self.errors += 1
            raise self.read_error
        data = await super().read(file, fd, offset, size)
        await self.after_read.pass_through()
        await self._let_others_run()
        return data

    async def data(self, file: SlottedFile, size: int, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a call that changes or syncs the file, between the two latches."""
        await self.before_write.pass_through()
        await self._let_others_run()
        if self.data_error is not None:
            self.errors += 1
            raise self.data_error
        if self.short_write is not None and size:
            fd, data, *rest = args
            args = (fd, data[: self.short_write], *rest)  # type: ignore[index, assignment]
            self.short_write = None
        result = await super().data(file, size, call, *args, **kwargs)
        await self.after_write.pass_through()
        await self._let_others_run()
        return result
