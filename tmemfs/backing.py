"""Run calls on the slow directory in threads, so that none of them can block the mount.

Three kinds of calls have threads of their own, so that one kind cannot starve another: `data` (reads, writes, fsync; at
most FILE_THREADS for one file), `meta` (names and attributes) and `control` (calls into the kernel's FUSE side). Local
disks block, too: for 10 ms when cold, for seconds when busy. A hop into a thread costs 100-225 µs, so on a local
filesystem the kernel is first asked for what it has in memory, without waiting (`nowait.py`).

Rejected: one pool of threads for everything. With 99 readers stuck on a dead server, `stat` would block as well.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from typing import ParamSpec, Protocol, TypeVar

import trio

from tmemfs import nowait
from tmemfs.throttle import ThrottleGate

P = ParamSpec("P")
T = TypeVar("T")

FILE_THREADS = 8
DATA_THREADS = 256
META_THREADS = 64
CONTROL_THREADS = 8
MAX_READ_IN_PLACE = 131_072  # bytes; copying more takes as long as a hop into a thread

# Results that a healthy filesystem returns for a name or an attribute. They are not counted as errors: the kernel asks
# for security.capability at the first write to every file.
NOT_COUNTED = frozenset(
    {errno.ENOENT, errno.ENODATA, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.EOPNOTSUPP, errno.ERANGE}
)


class SlottedFile(Protocol):
    """A file with a limit on its concurrent calls."""

    io_slots: trio.CapacityLimiter | None


class Backing:
    """Count, delay and dispatch the calls on the backing directory."""

    def __init__(self, gate: ThrottleGate | None, *, local: bool, drop: bool) -> None:
        self._gate = gate
        self.local = local and gate is None  # cached data may be read without a thread
        self._drop = drop
        self._data = trio.CapacityLimiter(DATA_THREADS)
        self._meta = trio.CapacityLimiter(META_THREADS)
        self._control = trio.CapacityLimiter(CONTROL_THREADS)
        self.reads = 0
        self.pages = 0  # pages read, read-ahead included
        self.readahead_pages = 0
        self.read_bytes = 0
        self.read_seconds = 0.0
        self.writes = 0
        self.write_bytes = 0
        self.calls = 0  # metadata calls
        self.errors = 0

    async def meta(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a metadata call in a thread. OSError is counted, unless it is in NOT_COUNTED, and raised."""
        self.calls += 1
        if self._gate is not None:
            await self._gate.delay(0)
        try:
            return await self._in_thread(lambda: call(*args, **kwargs), self._meta)
        except OSError as error:
            self.errors += error.errno not in NOT_COUNTED
            raise

    async def ask(self, cached: Callable[P, T], call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return the result of `cached`, which must not wait; if it raises BlockingIOError, run `call` in a thread."""
        if self.local:
            try:
                answer = cached(*args, **kwargs)
            except BlockingIOError:
                pass
            else:
                self.calls += 1
                return answer
        return await self.meta(call, *args, **kwargs)

    async def data(self, file: SlottedFile, size: int, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a call that moves `size` bytes of a file, in a thread."""
        if self._gate is not None:
            await self._gate.delay(size)
        return await self._for_file(file, lambda: call(*args, **kwargs))

    async def _for_file(self, file: SlottedFile, call: Callable[[], T]) -> T:
        if file.io_slots is None:
            file.io_slots = trio.CapacityLimiter(FILE_THREADS)
        try:
            async with file.io_slots:
                return await self._in_thread(call, self._data)
        except OSError:
            self.errors += 1
            raise

    async def _in_thread(self, call: Callable[[], T], threads: trio.CapacityLimiter) -> T:
        return await trio.to_thread.run_sync(call, limiter=threads, abandon_on_cancel=True)

    async def control(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a call that may wait for the kernel, which in turn may wait for this mount."""
        return await self._in_thread(lambda: call(*args, **kwargs), self._control)

    async def read(self, file: SlottedFile, fd: int, offset: int, size: int) -> bytearray:
        """Read up to `size` bytes; fewer only at the end of the file."""
        started = time.perf_counter()
        self.reads += 1
        buffer = bytearray(size)
        if self._gate is not None:
            await self._gate.delay(size)
        if not self._read_in_place(fd, buffer, offset):
            done = await self._for_file(file, lambda: _read_whole(fd, buffer, offset, self._drop))
            del buffer[done:]
        self.read_bytes += len(buffer)
        self.read_seconds += time.perf_counter() - started
        return buffer

    def _read_in_place(self, fd: int, buffer: bytearray, offset: int) -> bool:
        """Fill the buffer without waiting. False if not all bytes are in memory, or if they are to be dropped after."""
        if self._drop or not self.local or len(buffer) > MAX_READ_IN_PLACE:
            return False
        try:
            nowait.read(fd, buffer, offset)
        except BlockingIOError:
            return False
        return True

    async def write(self, file: SlottedFile, size: int, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a call that writes `size` bytes."""
        self.writes += 1
        self.write_bytes += size
        return await self.data(file, size, call, *args, **kwargs)


def write_some(fd: int, data: memoryview, offset: int) -> int:
    """Write at least one byte. EIO if the backing writes none without an error: a loop would never end."""
    written = os.pwrite(fd, data, offset)
    if not written:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return written


def _read_whole(fd: int, buffer: bytearray, offset: int, drop: bool) -> int:
    """Fill `buffer` from `offset` on. Return the number of bytes, fewer only at the end of the file."""
    with memoryview(buffer) as view:
        done = 0
        while done < len(buffer):
            count = os.preadv(fd, [view[done:]], offset + done)
            if count == 0:
                break
            done += count
    if drop and done:
        os.posix_fadvise(fd, offset, done, os.POSIX_FADV_DONTNEED)
    return done
