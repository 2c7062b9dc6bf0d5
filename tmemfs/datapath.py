"""Assemble the parts of one guest that read and write files. Tests use them without a mount.

The DataPath is also the observer of its inode table: the events of the table are passed on to the other parts here.
"""

from __future__ import annotations

import trio

from tmem.arena import PAGE_SHIFT
from tmemfs.backing import Backing
from tmemfs.balloon import Balloon, Signals
from tmemfs.cache.memory import Memory
from tmemfs.inodes.descriptors import Descriptors
from tmemfs.inodes.inode import Inode
from tmemfs.inodes.inodes import InodeTable
from tmemfs.inodes.observer import InodeObserver
from tmemfs.inodes.stamps import Stamps
from tmemfs.io.files import OpenFiles
from tmemfs.io.reader import Reader
from tmemfs.io.writeback import Writeback
from tmemfs.io.writer import Writer
from tmemfs.kernel.kernelcache import KernelCache
from tmemfs.watching.watch import Watch

READAHEAD_DIVISOR = 16  # the largest read-ahead window is 1/16 of the cache


class DataPath(InodeObserver):
    """Cache and pool, inodes, reader and writer over a backing directory."""

    def __init__(
        self,
        root_fd: int,
        memory: Memory,
        *,
        backing: Backing,
        kernel: KernelCache,
        max_descriptors: int,
        stamps: Stamps,
        version_by: str,
        attr_timeout: float,
        writeback: bool,
        watch: bool,
    ) -> None:
        """Take over `root_fd`, an O_PATH descriptor."""
        self.memory = memory
        self.backing = backing
        self.kernel = kernel
        self.watches_directories = watch
        self.descriptors = Descriptors(max_descriptors)
        self.inodes = InodeTable(
            root_fd, self.descriptors, self.memory, stamps, self, version_by=version_by, attr_timeout=attr_timeout
        )
        self.watch = Watch(self.inodes, self.descriptors, backing, kernel) if watch else None
        self.reader = Reader(self.memory, backing, self.inodes)
        self.writeback = Writeback(self.memory, backing, self.inodes, self.reader.read) if writeback else None
        self.writer = Writer(backing, self.inodes, self.writeback)
        self.files = OpenFiles(readahead_pages=self.memory.frames // READAHEAD_DIVISOR)

    # -- events of the inode table -------------------------------------------------------------------------------

    def invalidate(self, inode: Inode) -> None:
        """Drop the kernel's attributes and pages of a file that others changed."""
        self.kernel.invalidate(inode.number)

    def orphaned(self, inode: Inode) -> None:
        """Release the write-back's descriptor of an unlinked file: it would keep the disk space in use."""
        if self.writeback is not None:
            self.writeback.forget(inode)

    def evicted(self, directory: Inode) -> None:
        """Stop watching a directory that was removed from the table."""
        if self.watch is not None:
            self.watch.remove(directory)

    async def before_lookup(self, directory: Inode) -> None:
        """Start to watch a directory before the kernel learns of a name in it."""
        if self.watch is not None:
            await self.watch.add(directory)

    def name_removed(self, directory: Inode, name: bytes) -> None:
        """Record a removal of our own, so that the watch ignores its event."""
        if self.watch is not None:
            self.watch.record_own_removal(directory, name)

    # -- running -------------------------------------------------------------------------------------------------

    async def resize(self, capacity: int) -> None:
        """Resize the cache. `capacity`: bytes, accepted by `check_cache_bytes`."""
        await self.memory.resize(capacity)
        self.files.readahead_pages = self.memory.frames // READAHEAD_DIVISOR
        if self.writeback is not None and not self.memory.settled:
            await self.writeback.finish()  # dirty pages block the shrink

    def signals(self) -> Signals:
        """Return the present counters that the balloon decides by."""
        memory = self.memory
        returns = memory.misses  # without a pool there are no ghosts: every miss counts
        if memory.has_pool:
            stats = memory.pool.stats
            returns = stats.succ_gets + stats.reads + stats.ghost_hits
        return Signals(
            requested=memory.hits + memory.misses + (self.backing.write_bytes >> PAGE_SHIFT),
            returns=returns,
            full=memory.resident + 2 * memory.reserve_frames >= memory.frames,
        )

    async def follow_demand(self, balloon: Balloon) -> None:
        """Resize the cache as the balloon decides, until cancelled."""
        while True:
            await trio.sleep(balloon.allowed.tick)
            capacity = self.memory.capacity
            wanted = balloon.decide(trio.current_time(), self.signals(), capacity)
            if wanted != capacity:
                await self.resize(wanted)

    async def run(self) -> None:
        """Run the background tasks until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.memory.run)
            nursery.start_soon(self.reader.run)
            nursery.start_soon(self.kernel.run)
            if self.writeback is not None:
                nursery.start_soon(self.writeback.run)
            if self.watch is not None:
                nursery.start_soon(self.watch.run)

    def check(self) -> None:
        """Raise AssertionError unless every part is consistent."""
        self.memory.check()
        self.inodes.check()
        self.descriptors.check()
        if self.watch is not None:
            self.watch.check()
