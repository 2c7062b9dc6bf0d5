"""Run calls on the slow directory so that none of them can stop the mount.

Three kinds of work, each with threads of its own, so that one kind cannot starve another: `data` (reads, writes,
fsync; at most FILE_THREADS for one file), `meta` (names and attributes) and `control` (calls into the kernel's FUSE
side). A hop into a thread costs 100-225 µs, so what cannot block for long does not take one: metadata of a local
filesystem runs in place, and reads try RWF_NOWAIT first.

Rejected: one pool of threads for everything. 99 readers stuck on a dead server then stop `stat` as well.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from typing import ParamSpec, Protocol, TypeVar

import trio

from tmemfs.throttle import ThrottleGate

P = ParamSpec("P")
T = TypeVar("T")

FILE_THREADS = 8
DATA_THREADS = 256
META_THREADS = 64
CONTROL_THREADS = 8

# What a healthy filesystem says about a name or an attribute: no trouble, and not counted as such. The kernel asks for
# security.capability at the first write to every file.
ANSWERS = frozenset(
    {errno.ENOENT, errno.ENODATA, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.EOPNOTSUPP, errno.ERANGE}
)


class SlottedFile(Protocol):
    """A file whose calls are limited in number."""

    io_slots: trio.CapacityLimiter | None


class Backing:
    """Count, delay and dispatch the calls on the backing directory."""

    def __init__(self, gate: ThrottleGate | None, *, local: bool, drop: bool) -> None:
        self._gate = gate
        self._inline = local and gate is None
        self._drop = drop
        self._data = trio.CapacityLimiter(DATA_THREADS)
        self._meta = trio.CapacityLimiter(META_THREADS)
        self._control = trio.CapacityLimiter(CONTROL_THREADS)
        self.reads = 0
        self.pages = 0  # read, asked for or ahead
        self.readahead_pages = 0
        self.read_bytes = 0
        self.read_seconds = 0.0
        self.writes = 0
        self.write_bytes = 0
        self.calls = 0  # metadata
        self.errors = 0

    @property
    def local(self) -> bool:
        """True where metadata calls run in place."""
        return self._inline

    async def meta(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a metadata call. OSError passes through, counted unless it is an answer."""
        self.calls += 1
        if self._gate is not None:
            await self._gate.delay(0)
        try:
            if self._inline:
                return call(*args, **kwargs)
            return await trio.to_thread.run_sync(
                lambda: call(*args, **kwargs), limiter=self._meta, abandon_on_cancel=True
            )
        except OSError as error:
            self.errors += error.errno not in ANSWERS
            raise

    async def data(self, file: SlottedFile, size: int, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a call that moves `size` bytes of one file, in a thread."""
        if self._gate is not None:
            await self._gate.delay(size)
        return await self._in_thread(file, lambda: call(*args, **kwargs))

    async def _in_thread(self, file: SlottedFile, call: Callable[[], T]) -> T:
        if file.io_slots is None:
            file.io_slots = trio.CapacityLimiter(FILE_THREADS)
        try:
            async with file.io_slots:
                return await trio.to_thread.run_sync(call, limiter=self._data, abandon_on_cancel=True)
        except OSError:
            self.errors += 1
            raise

    async def control(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a call that may wait for the kernel, which may wait for this mount."""
        return await trio.to_thread.run_sync(
            lambda: call(*args, **kwargs), limiter=self._control, abandon_on_cancel=True
        )

    async def read(self, file: SlottedFile, fd: int, offset: int, size: int) -> bytearray:
        """Read up to `size` bytes; fewer only at the end of the file."""
        started = time.perf_counter()
        self.reads += 1
        buffer = bytearray(size)
        if self._gate is not None:
            await self._gate.delay(size)
        done = _read_cached(fd, buffer, offset)
        if done == size:
            if self._drop:
                os.posix_fadvise(fd, offset, size, os.POSIX_FADV_DONTNEED)
        else:
            done = await self._in_thread(file, lambda: _read_whole(fd, buffer, offset, self._drop))
            del buffer[done:]
        self.read_bytes += done
        self.read_seconds += time.perf_counter() - started
        return buffer

    async def write(self, file: SlottedFile, size: int, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a call that writes `size` bytes."""
        self.writes += 1
        self.write_bytes += size
        return await self.data(file, size, call, *args, **kwargs)


def write_some(fd: int, data: memoryview, offset: int) -> int:
    """Write at least one byte. Raise EIO where the backing takes none without an error: a loop would go on for ever."""
    written = os.pwrite(fd, data, offset)
    if not written:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return written


def _read_cached(fd: int, buffer: bytearray, offset: int) -> int:
    """Read what the kernel has in memory, without waiting; a short count says nothing about the end of the file."""
    try:
        return os.preadv(fd, [buffer], offset, os.RWF_NOWAIT)
    except OSError:  # EAGAIN: not cached; EOPNOTSUPP: not offered; anything else comes again from the real read
        return 0


def _read_whole(fd: int, buffer: bytearray, offset: int, drop: bool) -> int:
    """Fill `buffer` from `offset` on; return fewer bytes only at the end of the file."""
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
