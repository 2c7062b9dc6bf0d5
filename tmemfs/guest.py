"""Assemble one guest: its pool, its data path, its request handlers and its background tasks."""

from __future__ import annotations

import logging
import os
import resource
from collections.abc import Mapping

import trio

from tmem import SLAB_SIZE, CacheFrames, EmbeddedArena, SlabSource, Tmem
from tmem.arena import PAGE_SHIFT
from tmem.engine import MAX_HELD_SLABS, lib
from tmem.lending.guest.borrowedarena import BorrowedArena
from tmem.lending.guest.borrower import Borrower
from tmem.lending.guest.client import Client
from tmem.lending.guest.handshake import Declined, Unreachable
from tmem.lending.guest.trustedsocket import Untrusted
from tmem.lending.protocol.messages import MAX_SLABS
from tmem.resident import ResidentSlabs
from tmemcommon.headroom import Headroom
from tmemcommon.sizes import MIB, ConfigError, ram_bytes
from tmemcommon.wakeup import Wakeup
from tmemfs import processmemory
from tmemfs.backing import Backing
from tmemfs.balloon import Balloon
from tmemfs.cache.memory import Memory
from tmemfs.cache.stocking import Stocking
from tmemfs.config import MountConfig
from tmemfs.counters import register
from tmemfs.datapath import DataPath
from tmemfs.fuse.fs import Operations
from tmemfs.hswap.swaparea import SwapArea
from tmemfs.inodes.stamps import Stamps
from tmemfs.kernel.kernelcache import KernelCache
from tmemfs.kernel.mounttable import is_local
from tmemfs.namespace.namespace import Namespace
from tmemfs.stats import Stats, Value
from tmemfs.throttle import ThrottleGate
from tmemfs.virtual.cachecontrols import CacheControls
from tmemfs.virtual.controlfiles import ControlFiles
from tmemfs.virtual.swapcontrols import SwapControls
from tmemfs.virtual.writebackcontrol import WritebackControl
from tmemfs.watching.source import SourceMount

log = logging.getLogger(__name__)

REQUEST_BUFFER_BYTES = 32 * MIB  # for concurrent large requests: 25 MiB were measured while a guest was swapped to
MAX_DESCRIPTORS = 4096  # O_PATH descriptors; at most half of RLIMIT_NOFILE


class Guest:
    """All parts of one mount, except the connection to the kernel."""

    def __init__(self, config: MountConfig, source_fd: int) -> None:
        """Take over `source_fd`, an O_PATH descriptor of SOURCE."""
        self.config = config
        self.stats = Stats()
        self._headroom = Headroom(None)  # keeps no reserve of free memory: swap is used when it runs out
        self._locked = bool(config.hswap_bytes) and processmemory.is_locked()
        slabs_wanted = Wakeup()
        self.arena = _make_arena(config, slabs_wanted)
        self.stocking, self.tmem = self._make_engine()
        local = is_local(source_fd)
        backing = Backing(
            ThrottleGate(config.throttle) if config.throttle else None,
            local=local,
            drop=config.backing_cache == "drop",
        )
        self.data = DataPath(
            source_fd,
            Memory(self.tmem),
            backing=backing,
            kernel=KernelCache(backing),
            max_descriptors=min(MAX_DESCRIPTORS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2),
            stamps=Stamps(own_clock=os.fstat(source_fd).st_dev if local else None),
            version_by=config.version_by,
            attr_timeout=config.attr_timeout,
            writeback=config.writeback,
            watch=config.watch,
        )
        self.source = SourceMount(source_fd)
        self.balloon = Balloon(config.balloon) if config.balloon else None
        self.swap: SwapArea | None = None
        if config.hswap_bytes and self.tmem.has_pool:
            own_pool_bytes = config.pool_bytes if config.pool_socket is None else 0
            self.swap = SwapArea(config, self.tmem, own_pool_bytes, self.stocking.wait_for_stock)
        self.lender: Client | None = None
        if config.pool_socket is not None and isinstance(self.arena, BorrowedArena):
            persistent_slabs = None if self.swap is not None else 0  # None: as many as fit
            borrower = Borrower(self.arena, self.tmem, os.fspath(config.mountpoint), persistent_slabs, self.swap)
            self.lender = Client(config.pool_socket, borrower, slabs_wanted, config.pool_owner)
        self.control = ControlFiles(config.control_name, self.stats, self._describe)
        self.operations = self._make_operations()
        register(self.stats, self)

    def _make_engine(self) -> tuple[Stocking, Tmem]:
        """Return cache and pool, and the stock of slabs ahead of the pool."""
        source: SlabSource | None = self.arena
        if source is not None and self._locked:
            source = ResidentSlabs(source, self._has_room)
        stocking = Stocking(source if isinstance(self.arena, EmbeddedArena) else None)  # a loan has its own
        cache = CacheFrames(self.config.cache_bytes >> PAGE_SHIFT, ram_bytes() >> PAGE_SHIFT)
        return stocking, Tmem(stocking.stock or source, compress=self.config.compress, cache=cache)

    def _has_room(self, size: int) -> bool:
        """Return whether `size` more bytes may be locked in RAM, beside the cache's growth; of a loan, always."""
        memory = self.data.memory
        unfilled = memory.capacity - (memory.resident << PAGE_SHIFT)
        return self.lender is not None or self._headroom.refusal(size + unfilled + REQUEST_BUFFER_BYTES) is None

    def _make_operations(self) -> Operations:
        """Return the request handlers, and register the control files."""
        config, data = self.config, self.data
        namespace = Namespace(data, synchronous=config.options.synchronous)
        CacheControls(self.control, data, namespace.tree, self.tmem)
        if self.swap is not None:
            SwapControls(self.control, self.swap, data.kernel)
        if data.writeback is not None:
            WritebackControl(self.control, data.writeback)
        return Operations(data, namespace, self.control, self.stats, negative_timeout=config.negative_timeout)

    def connect(self) -> None:
        """Register with tmemd, if the pool is borrowed. Raise ConfigError if that fails."""
        socket = self.config.pool_socket
        try:
            if self.lender is not None:
                self.lender.connect()
        except Unreachable as error:
            match error.__cause__:
                case Untrusted() as untrusted:
                    remedy = untrusted.remedy("--pool-owner")
                case PermissionError():
                    remedy = "its mode and group decide who may use it"
                case FileNotFoundError() | ConnectionRefusedError():
                    remedy = "start tmemd"
                case _:
                    remedy = "look into its log"
            raise ConfigError(f"pool 'unix:{socket}': {error}: {remedy}, or give --pool SIZE for no tmemd") from error
        except Declined as error:
            raise ConfigError(f"pool 'unix:{socket}': tmemd refuses: {error}") from error

    def _describe(self) -> Mapping[str, Value]:
        config = self.config
        throttle = config.throttle
        return {
            "pid": os.getpid(),
            "source": os.fspath(config.source),
            "mountpoint": os.fspath(config.mountpoint),
            "control_name": config.control_name,
            "cache_bytes": self.data.memory.capacity,
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

    @property
    def frozen(self) -> bool:
        """True while the pools accept no new pages."""
        return self.tmem.frozen

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the background tasks until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.data.run)
            nursery.start_soon(self.source.run)
            nursery.start_soon(self.stocking.run)
            if self.lender is not None:
                nursery.start_soon(self.lender.run)
            if self.swap is not None:
                nursery.start_soon(self.swap.run)
            if self.balloon is not None:
                nursery.start_soon(self.data.follow_demand, self.balloon)
            task_status.started()
            await trio.sleep_forever()

    async def finish(self) -> None:
        """Write back all dirty pages. If some cannot be written, log their files and raise OSError."""
        unwritten = await self.data.writeback.finish() if self.data.writeback is not None else []
        for inode in unwritten:
            reason = inode.errors.last.strerror if inode.errors.last is not None else "given up"
            pages = len(inode.file.dirty_pages())
            log.error("%s: %d dirty pages are lost, not written back: %s", inode.display_path, pages, reason)
        if unwritten:
            raise OSError(f"the dirty pages of {len(unwritten)} files could not be written back")

    def close(self) -> None:
        """Remove the overflow file, which ends with the mount, and end the engine."""
        if self.swap is not None:
            self.swap.close()
        if lib.tmem_is_debug():
            self.tmem.check()
        self.data.memory.close()

    def check(self) -> None:
        """Raise AssertionError unless every part is consistent."""
        self.data.check()
        self.stocking.check()
        if self.balloon is not None:
            self.balloon.check()
        if self.swap is not None:
            self.swap.hswap.check()
        if self.lender is not None:
            self.lender.borrower.check()


def _make_arena(config: MountConfig, slabs_wanted: Wakeup) -> EmbeddedArena | BorrowedArena | None:
    """Return the source of the pool's slabs; None without a pool."""
    if not config.pool_bytes:
        return None
    if config.pool_socket is not None:
        return BorrowedArena(min(config.pool_bytes // SLAB_SIZE, MAX_SLABS, MAX_HELD_SLABS), slabs_wanted.set)
    return EmbeddedArena(min(config.pool_bytes, MAX_HELD_SLABS * SLAB_SIZE))
