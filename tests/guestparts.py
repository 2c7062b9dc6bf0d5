"""The parts of a guest without a mount, over a backing whose calls the test controls."""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from tests.consistency import check_content
from tests.heldbacking import HeldBacking
from tests.pagebytes import MIB, pages_of
from tmem import PAGE_SIZE, CacheFrames, EmbeddedArena, Tmem
from tmem.engine import lib
from tmemfs.backing import Backing
from tmemfs.cache.memory import Memory
from tmemfs.config import VersionBy
from tmemfs.datapath import DataPath
from tmemfs.inodes.inode import Inode
from tmemfs.inodes.stamps import Stamps
from tmemfs.io.files import OpenFile
from tmemfs.kernel.kernelcache import KernelCache


@dataclass(frozen=True)
class Caller:
    uid: int = 12_001
    gid: int = 13_001
    pid: int = 0  # in another namespace: neither its groups nor its capabilities can be seen
    umask: int = 0o022


class Settled(Stamps):
    """Stamps of a backing whose versions are settled at once."""

    def settles_at(self, device: int, stamp: int, now: float, wall: int) -> float:
        return now

    def tells_apart(self, device: int) -> bool:
        return True


class SilentKernel(KernelCache):
    """A kernel that holds nothing, so nothing has to be invalidated."""

    def __init__(self, backing: Backing) -> None:
        super().__init__(backing)
        self.invalidated: list[int] = []  # node numbers

    def invalidate_attributes(self, number: int) -> None:
        self.invalidated.append(number)

    def invalidate_pages(self, number: int) -> None:
        pass

    def invalidate_name(self, number: int, name: bytes) -> None:
        pass


class Parts(DataPath):
    """The data path of a guest over a directory, with a pool of its own."""

    backing: HeldBacking
    kernel: SilentKernel

    def __init__(
        self,
        directory: Path,
        *,
        cache: int = MIB,
        pool: int = MIB,
        writeback: bool = False,
        attr_timeout: float = 1.0,
        version_by: VersionBy = "all",
        stamps: Stamps | None = None,
        threads: bool = False,
        drop: bool = False,
        watch: bool = False,
        kernel: Callable[[Backing], SilentKernel] = SilentKernel,
        drain_thread: bool = True,
    ) -> None:
        self.directory = directory
        self.arena = EmbeddedArena(pool) if pool else None
        self.tmem = Tmem(self.arena, cache=CacheFrames(cache // PAGE_SIZE, 64 * MIB // PAGE_SIZE, drain_thread))
        memory = Memory(self.tmem)
        self.pool = memory.pool
        backing = HeldBacking(threads=threads, drop=drop)
        super().__init__(
            os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC),
            memory,
            backing=backing,
            kernel=kernel(backing),
            max_descriptors=64,
            stamps=stamps or Settled(own_clock=None),
            version_by=version_by,
            attr_timeout=attr_timeout,
            writeback=writeback,
            watch=watch,
        )

    # -- what fs.py does -----------------------------------------------------------------------------------------

    def lookup(self, name: str) -> Inode:
        """Look a name up, as the kernel does before an open."""
        started = self.inodes.start()
        st = os.stat(self.directory / name, follow_symlinks=False)
        inode = self.inodes.get_or_create(self.inodes.root, os.fsencode(name), st, started)
        self.inodes.add_lookup(inode)
        return inode

    def open(self, name: str, flags: int = os.O_RDWR) -> OpenFile:
        """Open a file and compare its version."""
        inode = self.lookup(name)
        started = self.inodes.start()
        fd = os.open(self.directory / name, flags | os.O_CLOEXEC)
        self.inodes.merge_stat_at_open(inode, os.fstat(fd), started)
        return self.files.add(inode, fd, flags, os.getuid())

    def make(self, name: str, data: bytes, flags: int = os.O_RDWR) -> OpenFile:
        """Create a file on the backing and open it."""
        (self.directory / name).write_bytes(data)
        return self.open(name, flags)

    async def make_cached(self, pages: int) -> tuple[OpenFile, bytearray]:
        """Create a file of so many pages and read it into the cache; return it with its content."""
        data = pages_of(1, pages)
        file = self.make("f", data)
        await self.read(file, 0, len(data))
        return file, bytearray(data)

    async def read(self, file: OpenFile, offset: int, size: int) -> bytes:
        """Read as fs.py does: the hit path first, then the miss path."""
        data = self.reader.hit(file, offset, size)
        return bytes(data if data is not None else await self.reader.read(file, offset, size))

    async def truncate(self, file: OpenFile, size: int) -> None:
        """Set the size through the open file."""
        fd = file.fd
        await self.writer.truncate(file.inode, size, lambda: os.ftruncate(fd, size), lambda: os.fstat(fd))

    # -- background ----------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def running(self, *, readahead: bool = False) -> AsyncIterator[None]:
        """Run the background tasks of a guest inside the block."""
        async with trio.open_nursery() as nursery:
            if readahead:
                nursery.start_soon(self.reader.run)
                await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(self.memory.run)
            if self.writeback is not None:
                nursery.start_soon(self.writeback.run)
            yield
            nursery.cancel_scope.cancel()

    # -- observing -----------------------------------------------------------------------------------------------

    def bytes_on_disk(self, file: OpenFile) -> bytes:
        """Return the bytes of the backing, bypassing the cache."""
        return os.pread(file.fd, 1 << 30, 0)

    def cached(self, file: OpenFile, index: int) -> bytes | None:
        """Return the bytes of a page in the cache, or None."""
        content = file.inode.file
        return content.copy_out(index, index) if content.is_cached(index) else None

    def cached_pages(self, file: OpenFile) -> set[int]:
        """Return the pages of a file that are in the cache, queued ones included."""
        content = file.inode.file
        return {index for index in range(-(-content.size // PAGE_SIZE)) if content.is_cached(index)}

    def dirty_pages(self, file: OpenFile) -> set[int]:
        """Return the pages of a file that are not written back yet."""
        return set(file.inode.file.dirty_pages())

    def pages_in_flight(self, file: OpenFile) -> set[int]:
        """Return the pages of a file that a backing read is to bring."""
        content = file.inode.file
        return {index for index in range(-(-content.size // PAGE_SIZE)) if content.fill_of(index) is not None}

    def pooled(self, file: OpenFile, index: int) -> bool:
        """Return whether the pool holds a page."""
        return file.inode.file.is_pooled(index)

    def requested(self) -> int:
        """Return the number of pages requested, by the counters: hits + gets + waits + demand fills."""
        gets = self.pool.stats.succ_gets + self.pool.stats.reads
        return self.memory.hits + gets + self.reader.waits + self.backing.pages - self.backing.readahead_pages

    def cache_pages(self, file: OpenFile, first: int, pages: Sequence[bytes]) -> None:
        """Insert pages into the cache without a read of the backing."""
        for index, page in enumerate(pages, first):
            fill = file.inode.file.begin_fill(index, index, ahead=False, unread=index + 1)
            fill.finish(page, bypass=False)
            assert file.inode.file.is_cached(index)

    def pool_pages(self, file: OpenFile, first: int, pages: Sequence[bytes]) -> None:
        """Bring pages into the pool without a read of the backing, and everything else that is in the cache."""
        self.cache_pages(file, first, pages)
        self.evict_all()
        assert all(self.pooled(file, index) for index in range(first, first + len(pages)))

    def mark_dirty(self, file: OpenFile, index: int) -> None:
        """Mark a cached page as not written back."""
        assert file.inode.file.is_cached(index)
        assert file.inode.file.make_dirty(index, index)

    def evict_all(self) -> None:
        """Move every clean page out of the cache, into the pool where there is one."""
        while self.memory.evict(64):
            pass

    def drain(self) -> None:
        """Do what the engine's thread does, in a guest without one."""
        self.tmem.restock()
        lib.tmem_drain(self.tmem.engine, 1 << 20)

    def check(self) -> None:
        """Raise AssertionError unless every part is consistent and no page is in two places."""
        super().check()
        check_content(self.inodes, self.memory)
        assert self.memory.resident <= self.memory.frames

    def close(self) -> None:
        """Close every descriptor."""
        for file in list(self.files.by_number.values()):
            os.close(file.fd)
        self.descriptors.close()
        self.memory.close()
        if self.arena is not None:
            self.arena.close()


MakeParts = Callable[..., Parts]


@pytest.fixture
def make_parts(tmp_path: Path) -> Iterator[MakeParts]:
    """Return a function that makes the parts of a guest; `check()` of each runs at teardown."""
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
