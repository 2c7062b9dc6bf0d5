"""Set up the swap-like file of one guest and its overflow file, and release slabs when tmemd wants them back."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from tmem import PAGE_SIZE
from tmemcommon.sizes import ConfigError
from tmemcommon.wakeup import Wakeup
from tmemfs.config import MountConfig
from tmemfs.hswap import overflow
from tmemfs.hswap.hswap import Hswap
from tmemfs.statefiles import make_private, mount_name, state_directory

if TYPE_CHECKING:
    from tmem import Tmem

log = logging.getLogger(__name__)

CLOSE_SECONDS = 8.0  # that `clear` waits for the last close


def default_overflow(mountpoint: Path) -> Path:
    """Return the path of a mount's overflow file without --hswap-overflow."""
    directory = Path("/var/lib/tmemfs") if os.geteuid() == 0 else state_directory()
    return directory / f"{mount_name(mountpoint)}.overflow"


class SwapArea:
    """The swap-like file of one guest, its overflow file, and a task that releases slabs.

    `wait_for_stock` is passed on to `Hswap`. Raises ConfigError if the files cannot be set up.
    """

    def __init__(
        self,
        config: MountConfig,
        tmem: Tmem,
        pool_bytes: int,
        wait_for_stock: Callable[[int], Awaitable[None]],
    ) -> None:
        size = config.hswap_bytes // PAGE_SIZE * PAGE_SIZE
        self._pool_bytes = pool_bytes
        self.overflow_path = self._choose_path(config)
        self._check_size(size, self.overflow_path)
        self._overflow = overflow.create(self.overflow_path)
        self.hswap = Hswap(tmem, self._overflow, size, time.monotonic, wait_for_stock)
        self._wake = Wakeup()
        self._slabs_to_release = 0
        self._evicted = False

    @staticmethod
    def _choose_path(config: MountConfig) -> Path:
        """Return the real path of the overflow file. Raises ConfigError for a path inside the mount."""
        path = config.hswap_overflow or default_overflow(config.mountpoint)
        if config.hswap_overflow is None:
            try:
                make_private(path.parent)
            except OSError as error:
                raise ConfigError(f"overflow file '{path}': {error.strerror}; give another --hswap-overflow") from None
        real = Path(os.path.realpath(path.parent)) / path.name
        for directory in (config.source, config.mountpoint):
            if directory == real or directory in real.parents:
                raise ConfigError(
                    f"overflow file '{path}' would be visible in the mount: give --hswap-overflow outside '{directory}'"
                )
        return real

    def _check_size(self, size: int, path: Path) -> None:
        """Raise ConfigError if the pool and the disk together cannot hold the file."""
        try:
            disk = os.statvfs(path.parent)
        except OSError as error:
            raise ConfigError(
                f"overflow file '{path}': {error.strerror}; create its directory or give another --hswap-overflow"
            ) from None
        free = disk.f_bavail * disk.f_frsize
        if size > self._pool_bytes + free:
            raise ConfigError(
                f"hswap of {size} bytes is larger than the pool ({self._pool_bytes}) and the free disk space for its "
                f"overflow file ({free}) together: give a smaller --hswap, or --hswap-overflow on a larger disk"
            )

    async def reserve(self) -> None:
        """Reserve disk space for all pages, before the file is used for swap."""
        try:
            await self.hswap.reserve(self._pool_bytes)
        except OSError as error:
            raise OSError(
                error.errno,
                f"overflow file '{self.overflow_path}' cannot get its disk space: {error.strerror}; "
                "give --hswap-overflow on a local disk with room for all pages",
            ) from error

    async def clear(self) -> None:
        """Make every page a hole, after swapoff. Raises OSError if the file is still open."""
        # The kernel may report a close only after close(2) has returned.
        with trio.move_on_after(CLOSE_SECONDS):
            await self.hswap.wait_until_closed()
        await self.hswap.clear()

    def request_release(self, slabs: int) -> None:
        """Request that `run` releases so many slabs; their pages move to the overflow file."""
        self._slabs_to_release = max(self._slabs_to_release, slabs)
        self._wake.set()

    def note_eviction(self) -> None:
        """Request that `run` marks all pages of the pool as lost: tmemd has taken their memory."""
        self._evicted = True
        self._wake.set()

    async def run(self) -> None:
        """Carry out these requests until cancelled."""
        while True:
            await self._wake.wait()
            if self._evicted:
                lost = await self.hswap.lose_pool_pages()
                log.error("%d pages of the swap-like file are lost: tmemd took their memory", lost)
                return
            wanted, self._slabs_to_release = self._slabs_to_release, 0
            released = await self.hswap.release_slabs(wanted)
            log.info("released %d of %d persistent slabs that tmemd wants back", released, wanted)

    def close(self) -> None:
        """Remove the overflow file: the content ends with the mount."""
        self._overflow.close()
