"""Assemble the parts of one guest, and run what they do in the background."""

from __future__ import annotations

import logging
import os
import resource
from collections.abc import Mapping

import trio

from tmem import SLAB_SIZE, EmbeddedArena, SlabSource, Tmem
from tmem.lending.guest.borrowed import Borrowed
from tmem.lending.guest.borrower import Borrower
from tmem.lending.guest.client import Client
from tmem.lending.guest.handshake import Declined, Unreachable
from tmem.lending.guest.listener import Untrusted
from tmem.lending.protocol.messages import MAX_SLABS
from tmem.resident import ResidentSlabs
from tmem.stock import Stock
from tmemcommon.headroom import Headroom
from tmemcommon.sizes import ram_bytes
from tmemfs import processmemory
from tmemfs.backing import Backing
from tmemfs.cache.content import Content
from tmemfs.cache.pagecache import PAGE_SHIFT, PageCache
from tmemfs.cache.precache import Precache
from tmemfs.cache.stocking import Stocking
from tmemfs.config import MIB, ConfigError, MountConfig
from tmemfs.counters import register
from tmemfs.fuse.directories import Directories
from tmemfs.fuse.fs import Operations, Parts
from tmemfs.fuse.replies import Replies
from tmemfs.hswap.swaparea import SwapArea
from tmemfs.inodes.descriptors import Descriptors
from tmemfs.inodes.inodes import InodeTable
from tmemfs.inodes.stamps import Stamps
from tmemfs.io.ballooning import Ballooning
from tmemfs.io.files import OpenFiles
from tmemfs.io.reader import Reader
from tmemfs.io.writeback import Writeback
from tmemfs.io.writer import Writer
from tmemfs.kernel.kernelcache import KernelCache
from tmemfs.kernel.mounttable import is_local
from tmemfs.namespace.attributes import Attributes
from tmemfs.namespace.listing import Listings
from tmemfs.namespace.opener import Opener
from tmemfs.namespace.revalidate import Revalidator
from tmemfs.namespace.tree import Tree
from tmemfs.stats import Stats, Value
from tmemfs.throttle import ThrottleGate
from tmemfs.virtual.cachecontrols import CacheControls
from tmemfs.virtual.controlfiles import ControlFiles
from tmemfs.virtual.swapcontrols import SwapControls
from tmemfs.virtual.writebackcontrol import WritebackControl
from tmemfs.watching.source import SourceMount
from tmemfs.watching.watch import Watch

log = logging.getLogger(__name__)

REQUESTS_BYTES = 32 * MIB  # what the buffers of many large requests take at once: 25 MiB seen while it was swapped to
MAX_DESCRIPTORS = 4096  # O_PATH ones; half of what the process may have, if that is less


class Guest:
    """One mounted directory, without the mount."""

    def __init__(self, config: MountConfig, source_fd: int) -> None:
        self.config = config
        self.stats = Stats()
        self.arena = _arena(config)
        self._headroom = Headroom(None)  # what is swapped comes when the machine has nothing left
        self._locked = bool(config.hswap_bytes) and processmemory.is_locked()
        self.tmem = None
        stock: Stock | None = None
        if self.arena is not None:
            source: SlabSource = ResidentSlabs(self.arena, self._has_room) if self._locked else self.arena
            if isinstance(self.arena, EmbeddedArena):  # what is borrowed has a stock of its own
                source = stock = Stock(source)
            self.tmem = Tmem(source, compress=config.compress)
        self.lender: Client | None = None
        if config.pool_socket is not None and isinstance(self.arena, Borrowed) and self.tmem is not None:
            persistent = None if config.hswap_bytes else 0  # slabs: what fits
            borrower = Borrower(self.arena, self.tmem, os.fspath(config.mountpoint), persistent)
            self.lender = Client(config.pool_socket, borrower, config.pool_owner)
        pool = self.tmem.new_pool(name="precache") if self.tmem is not None else None
        self.cache = PageCache(config.cache_bytes, limit=ram_bytes(), queueing=pool is not None)
        self.stocking = Stocking(stock)
        self.precache = Precache(self.cache, pool, self.stocking)
        self.content = Content(self.cache, self.precache)
        gate = ThrottleGate(config.throttle) if config.throttle else None
        local = is_local(source_fd)
        self.backing = Backing(gate, local=local, drop=config.backing_cache == "drop")
        self.kernel = KernelCache(self.backing)
        self.descriptors = Descriptors(min(MAX_DESCRIPTORS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2))
        self.inodes = InodeTable(
            source_fd,
            self.descriptors,
            self.content,
            Stamps(own_clock=os.fstat(source_fd).st_dev if local else None),
            version_by=config.version_by,
            attr_timeout=config.attr_timeout,
            invalidate_kernel=lambda inode: self.kernel.invalidate(inode.number),
        )
        self.source = SourceMount(source_fd)
        self.watch = (
            Watch(self.inodes, self.descriptors, self.backing, self.content, self.kernel) if config.watch else None
        )
        self.reader = Reader(self.content, self.backing, self.inodes)
        self.writeback = (
            Writeback(self.content, self.backing, self.inodes, self.reader.read) if config.writeback else None
        )
        if self.writeback is not None:
            self.inodes.on_gone = self.writeback.forget  # its descriptor would keep the file's space
        self.writer = Writer(self.content, self.backing, self.inodes, self.writeback)
        self.files = OpenFiles(readahead_pages=self.cache.frames // 16)
        self.ballooning = (
            Ballooning(config.balloon, self.cache, self.reader, self.precache, self.backing, self.resize)
            if config.balloon
            else None
        )
        self.control = ControlFiles(config.control_name, self.stats, self._describe)
        self.swap = (
            SwapArea(
                config,
                self.tmem,
                0 if self.lender else config.pool_bytes,
                self.stocking.ready,
            )
            if config.hswap_bytes and self.tmem is not None
            else None
        )
        if self.lender is not None and self.swap is not None:
            self.lender.borrower.on_persistent_revoke = self.swap.request_release
            self.lender.borrower.on_evicted = self.swap.note_eviction
        if self.swap is not None:
            SwapControls(self.control, self.swap, self.kernel)
        if self.writeback is not None:
            WritebackControl(self.control, self.writeback)
        register(self.stats, self)
        self.operations = Operations(self._parts(), self.stats)

    def _has_room(self, size: int) -> bool:
        """Tell whether so much more may be locked beside what the cache may still take; a loan is tmemd's affair."""
        unfilled = self.cache.capacity - (self.cache.resident << PAGE_SHIFT)
        return self.lender is not None or self._headroom.refusal(size + unfilled + REQUESTS_BYTES) is None

    def connect(self) -> None:
        """Find tmemd, where the pool is borrowed. Raise ConfigError when it cannot be or will not lend."""
        socket = self.config.pool_socket
        try:
            if self.lender is not None:
                self.lender.connect()
        except Unreachable as error:
            match error.__cause__:
                case Untrusted() as untrusted:
                    remedy = untrusted.remedy("--pool-owner")
                case PermissionError():
                    remedy = "its mode and group say who may"
                case FileNotFoundError() | ConnectionRefusedError():
                    remedy = "start tmemd"
                case _:
                    remedy = "look into its log"
            raise ConfigError(f"pool 'unix:{socket}': {error}: {remedy}, or give --pool SIZE for no tmemd") from error
        except Declined as error:
            raise ConfigError(f"pool 'unix:{socket}': tmemd refuses: {error}") from error

    def _parts(self) -> Parts:
        config, backing, inodes = self.config, self.backing, self.inodes
        tree = Tree(backing, inodes)
        CacheControls(self.control, self.content, inodes, tree, self.tmem, self.resize)
        names = Revalidator(backing, inodes)
        attributes = Attributes(backing, inodes, self.writer, names)
        replies = Replies(self.writeback, attr_timeout=config.attr_timeout, negative_timeout=config.negative_timeout)
        return Parts(
            inodes=inodes,
            files=self.files,
            reader=self.reader,
            writer=self.writer,
            virtual=self.control,
            tree=tree,
            attributes=attributes,
            names=names,
            directories=Directories(inodes, attributes, Listings(backing, inodes), replies),
            opener=Opener(
                attributes=attributes,
                backing=backing,
                content=self.content,
                files=self.files,
                inodes=inodes,
                kernel=self.kernel,
                tree=tree,
                writer=self.writer,
                synchronous=config.options.synchronous,
            ),
            replies=replies,
        )

    def _describe(self) -> Mapping[str, Value]:
        config = self.config
        throttle = config.throttle
        return {
            "pid": os.getpid(),
            "source": os.fspath(config.source),
            "mountpoint": os.fspath(config.mountpoint),
            "control_name": config.control_name,
            "cache_bytes": self.cache.capacity,
            "pool_bytes": config.pool_bytes,
            "hswap_bytes": self.swap.hswap.size if self.swap is not None else 0,
            "hswap_overflow": os.fspath(self.swap.overflow_path) if self.swap is not None else "-",
            "memory_locked": int(self._locked),
            "pool_socket": config.pool_socket,
            "balloon_min_bytes": config.balloon.minimum if config.balloon else 0,
            "balloon_max_bytes": config.balloon.maximum if config.balloon else 0,
            "writeback": int(config.writeback),
            "watch": int(config.watch),
            "throttle_latency_seconds": throttle.latency if throttle else 0.0,
            "throttle_bandwidth_bytes": throttle.bandwidth if throttle else 0,
            "throttle_depth": throttle.depth if throttle else 0,
            "attr_timeout_seconds": config.attr_timeout,
            "negative_timeout_seconds": config.negative_timeout,
            "compress": int(config.compress),
            "backing_cache": config.backing_cache,
            "version_by": config.version_by,
        }

    async def resize(self, capacity: int) -> None:
        """Give the cache another size in bytes, of those that `check_cache_bytes` lets pass."""
        await self.precache.resize(capacity)
        self.files.readahead_pages = self.cache.frames // 16
        if self.writeback is not None and not self.cache.settled:
            await self.writeback.finish()  # dirty pages stand in the way

    @property
    def frozen(self) -> bool:
        """True while the pools take no new pages."""
        return self.tmem is not None and self.tmem.frozen

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the background tasks until cancelled."""
        async with trio.open_nursery() as nursery:
            self.reader.nursery = nursery
            nursery.start_soon(self.precache.run)
            nursery.start_soon(self.precache.discards.run)
            nursery.start_soon(self.kernel.run)
            nursery.start_soon(self.source.run)
            nursery.start_soon(self.stocking.run)
            if self.writeback is not None:
                nursery.start_soon(self.writeback.run)
            if self.lender is not None:
                nursery.start_soon(self.lender.run)
            if self.swap is not None:
                nursery.start_soon(self.swap.run)
            if self.ballooning is not None:
                nursery.start_soon(self.ballooning.run)
            if self.watch is not None:
                nursery.start_soon(self.watch.run)
            task_status.started()
            await trio.sleep_forever()

    async def finish(self) -> None:
        """Write back what is dirty. Raise OSError when something could not be, after naming it in the log."""
        left = await self.writeback.finish() if self.writeback is not None else []
        for inode in left:
            reason = inode.errors.last.strerror if inode.errors.last is not None else "given up"
            log.error("%s: %d dirty pages are lost, not written back: %s", inode.display_path, len(inode.dirty), reason)
        if left:
            raise OSError(f"the dirty pages of {len(left)} files could not be written back")

    def close(self) -> None:
        """Remove what is to end with the mount."""
        if self.swap is not None:
            self.swap.close()

    def check(self) -> None:
        """Raise AssertionError unless every part is consistent."""
        self.cache.check()
        self.precache.discards.check()
        self.inodes.check()
        self.descriptors.check()
        if self.ballooning is not None:
            self.ballooning.balloon.check()
        if self.tmem is not None:
            self.tmem.check()
        self.stocking.check()
        if self.swap is not None:
            self.swap.hswap.check()
        if self.lender is not None:
            self.lender.borrower.check()


def _arena(config: MountConfig) -> EmbeddedArena | Borrowed | None:
    """Make what the pool gets its slabs from."""
    if not config.pool_bytes:
        return None
    if config.pool_socket is not None:
        return Borrowed(min(config.pool_bytes // SLAB_SIZE, MAX_SLABS))
    return EmbeddedArena(config.pool_bytes)
