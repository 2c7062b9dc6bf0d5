"""The parts of a guest without a mount and without threads, for tests that decide who runs when.

The classes are the product's. Only the backing is extended: calls run in place instead of in a thread, unless a test
asks for `threads` (under a real clock), and a test can hold them between their effect and their return, or have them
fail. Under a MockClock time passes when nobody can run, so a deadlock ends in `trio.TooSlowError` at once and an hour
of write-back takes milliseconds.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import pytest
import trio
import trio.testing

from tests.consistency import check_content
from tmem import EmbeddedArena, Tmem
from tmemfs.backing import Backing, SlottedFile
from tmemfs.cache.content import Content
from tmemfs.cache.pagecache import PAGE_SHIFT, PAGE_SIZE, PageCache
from tmemfs.cache.precache import Precache
from tmemfs.cache.stocking import Stocking
from tmemfs.inodes.descriptors import Descriptors
from tmemfs.inodes.inode import Inode
from tmemfs.inodes.inodes import InodeTable
from tmemfs.inodes.stamps import Stamps
from tmemfs.io.files import OpenFile, OpenFiles
from tmemfs.io.reader import Reader
from tmemfs.io.writeback import Writeback
from tmemfs.io.writer import Writer

P = ParamSpec("P")
T = TypeVar("T")
MIB = 1 << 20
_VIRTUAL_SECONDS = 3600.0


def page_of(seed: int, size: int = PAGE_SIZE) -> bytes:
    """Make bytes that are different for every seed and compress to about half."""
    half = random.Random(seed).randbytes(size // 2)
    return half + bytes([seed & 255]) * (size - len(half))


def pages_of(seed: int, count: int) -> bytes:
    """Make that many different pages."""
    return b"".join(page_of(seed * 100_003 + index) for index in range(count))


def pass_ticks() -> None:
    """Let several ticks of a coarse clock pass: before Linux 6.13, two changes within one have the same times."""
    time.sleep(0.02)


def in_trio(test: Callable[P, Awaitable[None]]) -> Callable[P, None]:
    """Run an async test under a clock that jumps, with a scheduler whose choices repeat."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        run_seeded(lambda: test(*args, **kwargs))

    return run


def run_seeded(main: Callable[[], Awaitable[T]], seed: int = 1) -> T:
    """Run `main` in trio; the same seed gives the same order of tasks."""
    scheduler: Any = trio._core._run
    scheduler._ALLOW_DETERMINISTIC_SCHEDULING = True
    scheduler._r.seed(seed)

    async def bounded() -> T:
        with trio.fail_after(_VIRTUAL_SECONDS):
            return await main()

    try:
        return trio.run(bounded, clock=trio.testing.MockClock(autojump_threshold=0))
    finally:
        scheduler._ALLOW_DETERMINISTIC_SCHEDULING = False


class Latch:
    """Let calls pass, or hold them one by one."""

    def __init__(self) -> None:
        self.shut = False
        self._held: list[trio.Event] = []

    async def passing(self) -> None:
        """Pass, or wait to be let go."""
        if self.shut:
            held = trio.Event()
            self._held.append(held)
            await held.wait()

    async def holds(self, count: int) -> None:
        """Wait until nobody can run; `count` calls are held then."""
        await trio.testing.wait_all_tasks_blocked()
        assert len(self._held) == count, (len(self._held), count)

    def let_go(self, position: int = 0) -> None:
        """Let one call go on, the longest held first."""
        self._held.pop(position).set()

    def open(self) -> None:
        """Let everybody go on, now and from now on."""
        self.shut = False
        while self._held:
            self.let_go()


class HeldBacking(Backing):
    """The backing, with every call in the hands of the test."""

    def __init__(self, *, threads: bool, drop: bool) -> None:
        super().__init__(None, local=True, drop=drop)
        self._threads = threads
        self.before_read, self.after_read = Latch(), Latch()
        self.before_write, self.after_write = Latch(), Latch()
        self.after_meta = Latch()
        self.read_error: OSError | None = None
        self.data_error: OSError | None = None
        self.short_write: int | None = None  # take only so many bytes of the next write
        self.jitter: random.Random | None = None
        self.read_calls: list[tuple[int, int]] = []  # (offset, size)

    async def _stroll(self) -> None:
        """Let others run a few times."""
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
        """Run a metadata call."""
        result = await super().meta(call, *args, **kwargs)
        await self.after_meta.passing()
        return result

    async def read(self, file: SlottedFile, fd: int, offset: int, size: int) -> bytearray:
        """Read; the bytes are those of a moment between the two latches."""
        self.read_calls.append((offset, size))
        await self.before_read.passing()
        await self._stroll()
        if self.read_error is not None:
            self.errors += 1
            raise self.read_error
        data = await super().read(file, fd, offset, size)
        await self.after_read.passing()
        await self._stroll()
        return data

    async def data(self, file: SlottedFile, size: int, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a call that changes or syncs the file."""
        await self.before_write.passing()
        await self._stroll()
        if self.data_error is not None:
            self.errors += 1
            raise self.data_error
        if self.short_write is not None and size:
            fd, data, *rest = args
            args = (fd, data[: self.short_write], *rest)  # type: ignore[index, assignment]
            self.short_write = None
        result = await super().data(file, size, call, *args, **kwargs)
        await self.after_write.passing()
        await self._stroll()
        return result


class Settled(Stamps):
    """Stamps of a backing whose versions can be believed at once."""

    def settles_at(self, device: int, stamp: int, now: float, wall: int) -> float:
        return now

    def tells_apart(self, device: int) -> bool:
        return True


class Parts:
    """Cache, pool, content, reader and writer over a directory."""

    def __init__(
        self,
        directory: Path,
        *,
        cache: int = MIB,
        pool: int = MIB,
        writeback: bool = False,
        attr_timeout: float = 1.0,
        version_by: str = "all",
        stamps: Stamps | None = None,
        threads: bool = False,
        drop: bool = False,
    ) -> None:
        self.directory = directory
        self.arena = EmbeddedArena(pool) if pool else None
        self.tmem = Tmem(self.arena) if self.arena is not None else None
        self.pool = self.tmem.new_pool(name="precache") if self.tmem is not None else None
        self.cache = PageCache(cache, limit=64 * MIB, queueing=self.pool is not None)
        self.precache = Precache(self.cache, self.pool, Stocking(None))
        self.content = Content(self.cache, self.precache)
        self.backing = HeldBacking(threads=threads, drop=drop)
        self.descriptors = Descriptors(64)
        root = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self.inodes = InodeTable(
            root,
            self.descriptors,
            self.content,
            stamps or Settled(own_clock=None),
            version_by=version_by,
            attr_timeout=attr_timeout,
        )
        self.reader = Reader(self.content, self.backing, self.inodes)
        self.writeback = Writeback(self.content, self.backing, self.inodes, self.reader.read) if writeback else None
        if self.writeback is not None:
            self.inodes.on_gone = self.writeback.forget
        self.writer = Writer(self.content, self.backing, self.inodes, self.writeback)
        self.files = OpenFiles(readahead_pages=self.cache.frames // 8)

    # -- what fs.py does -----------------------------------------------------------------------------------------

    def lookup(self, name: str) -> Inode:
        """Find a name, as the kernel would before it opens."""
        started = self.inodes.start()
        st = os.stat(self.directory / name, follow_symlinks=False)
        inode = self.inodes.enter(self.inodes.root, os.fsencode(name), st, started)
        self.inodes.remember(inode)
        return inode

    def open(self, name: str, flags: int = os.O_RDWR) -> OpenFile:
        """Open a file and compare its version."""
        inode = self.lookup(name)
        started = self.inodes.start()
        fd = os.open(self.directory / name, flags | os.O_CLOEXEC)
        self.inodes.opened(inode, os.fstat(fd), started)
        return self.files.add(inode, fd, flags, os.getuid())

    def make(self, name: str, data: bytes, flags: int = os.O_RDWR) -> OpenFile:
        """Make a file on the backing and open it."""
        (self.directory / name).write_bytes(data)
        return self.open(name, flags)

    async def read(self, file: OpenFile, offset: int, size: int) -> bytes:
        """Read as fs.py does: the hit path first."""
        data = self.reader.hit(file, offset, size)
        return bytes(data if data is not None else await self.reader.read(file, offset, size))

    async def truncate(self, file: OpenFile, size: int) -> None:
        """Set the size through the open file."""
        fd = file.fd
        await self.writer.truncate(file.inode, size, lambda: os.ftruncate(fd, size), lambda: os.fstat(fd))

    # -- background ----------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def running(self, *, readahead: bool = False) -> AsyncIterator[None]:
        """Run the background tasks of a guest for the block."""
        async with trio.open_nursery() as nursery:
            if readahead:
                self.reader.nursery = nursery
            nursery.start_soon(self.precache.run)
            nursery.start_soon(self.precache.discards.run)
            if self.writeback is not None:
                nursery.start_soon(self.writeback.run)
            yield
            nursery.cancel_scope.cancel()

    # -- what is true --------------------------------------------------------------------------------------------

    def bytes_on_disk(self, file: OpenFile) -> bytes:
        """Read the backing, past everything that is tested."""
        return os.pread(file.fd, 1 << 30, 0)

    def cached(self, file: OpenFile, index: int) -> bytes | None:
        """Return a page as the cache holds it."""
        frame = file.inode.pages.get(index)
        return None if frame is None else bytes(self.cache.page(frame))

    def pooled(self, file: OpenFile, index: int) -> bool:
        """Tell whether the pool holds a page."""
        return self.precache.holds(file.inode, index)

    def requested(self) -> int:
        """Return the right side of the equation that counters must satisfy."""
        gets = self.pool.stats.succ_gets if self.pool is not None else 0
        return self.reader.hits + gets + self.reader.waits + self.backing.pages - self.backing.readahead_pages

    def evict_all(self) -> None:
        """Move every clean page out of the cache, into the pool where there is one."""
        while self.cache.queue_victims(64) or self.cache.victims:
            self.precache.drain(1 << 20)

    def check(self) -> None:
        """Raise AssertionError unless every part is consistent, and no page is in two places."""
        self.cache.check()
        self.precache.discards.check()
        self.inodes.check()
        self.descriptors.check()
        if self.tmem is not None:
            self.tmem.check()
        check_content(self.inodes, self.cache, self.precache)
        assert self.cache.resident <= self.cache.frames

    def close(self) -> None:
        """Close every descriptor."""
        for file in list(self.files.by_number.values()):
            os.close(file.fd)
        self.descriptors.close()
        self.cache.close()
        if self.arena is not None:
            self.arena.close()


MakeParts = Callable[..., Parts]


@pytest.fixture
def make_parts(tmp_path: Path) -> Iterator[MakeParts]:
    """Give a maker of guests' parts; each is checked at the end of the test."""
    made: list[Parts] = []
    numbers = itertools.count()

    def make(**settings: Any) -> Parts:
        directory = tmp_path / f"backing{next(numbers)}"
        directory.mkdir()
        made.append(Parts(directory, **settings))
        return made[-1]

    yield make
    for parts in made:
        parts.check()
        parts.close()


def page_range(offset: int, size: int) -> int:
    """Return how many pages a request touches."""
    return ((offset + size - 1) >> PAGE_SHIFT) - (offset >> PAGE_SHIFT) + 1 if size else 0
