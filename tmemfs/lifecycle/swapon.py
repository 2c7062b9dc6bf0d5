"""`tmemfs swapon` and `swapoff`: check that a mount can be swapped to, then swap to its hswap file."""

from __future__ import annotations

from pathlib import Path

from tmemcommon.sizes import ConfigError
from tmemfs.kernel.mounttable import filesystem_of
from tmemfs.lifecycle import loopswap
from tmemfs.lifecycle.controlclient import RemoteError
from tmemfs.lifecycle.remotemount import RemoteMount

MEMORY_FILESYSTEMS = frozenset({"tmpfs", "ramfs", "devtmpfs"})
_RESERVE_SECONDS = 120.0  # for the overflow file on a busy disk


def swapon(mount: RemoteMount) -> Path:
    """Swap to the mount's hswap file; return the loop device. After an error nothing is left behind."""
    _check_machine()
    config = mount.config()
    if config.get("hswap_bytes", "0") == "0":
        raise ConfigError(f"'{mount.mountpoint}' has no hswap file: mount it with --hswap SIZE")
    if config.get("memory_locked") != "1":
        raise ConfigError(f"the process of '{mount.mountpoint}' can be swapped out itself: mount it as root")
    overflow = Path(config["hswap_overflow"])
    kind = filesystem_of(overflow)
    if kind in MEMORY_FILESYSTEMS or kind.startswith("fuse"):  # the process behind a FUSE filesystem can be
        raise ConfigError(f"overflow file '{overflow}' can be swapped out itself: give --hswap-overflow on a disk")
    hswap = mount.hswap_file(config)
    if loopswap.swap_devices_of(hswap):
        raise RemoteError(f"'{mount.mountpoint}' is in use as swap already: tmemfs swapoff {mount.mountpoint} ends it")
    mount.write("hswap_reserve", b"1\n", _RESERVE_SECONDS)
    return loopswap.swap_on(hswap)


def swapoff(mount: RemoteMount) -> None:
    """End swapping to the mount's hswap file and empty the file."""
    _check_machine()
    if not loopswap.swap_off(mount.hswap_file(mount.config())):
        raise RemoteError(f"'{mount.mountpoint}' is not in use as swap: swapon --show lists what is")
    mount.write("hswap_clear", b"1\n")


def _check_machine() -> None:
    obstacle = loopswap.obstacle()
    if obstacle is not None:
        raise ConfigError(obstacle)
