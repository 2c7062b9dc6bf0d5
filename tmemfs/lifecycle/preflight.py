"""The checks before a mount: each failure is one line that names the thing and the remedy."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

from tmemfs.config import ConfigError, MountConfig
from tmemfs.kernel.kernelmount import DEVICE, helper_path, unmount
from tmemfs.kernel.mounttable import is_tmemfs, top_mount

FUSE_CONF = Path("/etc/fuse.conf")
_ANSWER_SECONDS = 5.0


def prepare(config: MountConfig) -> int:
    """Check everything that can be known before mounting; return a descriptor of SOURCE.

    The descriptor is opened before the mount, so that SOURCE and MOUNTPOINT may be the same directory. A dead
    tmemfs mount at MOUNTPOINT is detached. Raises ConfigError.
    """
    check_device()
    if os.geteuid() != 0:
        check_user(config)
    clear_mountpoint(config.mountpoint)
    source_fd = open_source(config.source)
    try:
        check_mountpoint(config)
    except ConfigError:
        os.close(source_fd)
        raise
    return source_fd


def check_device() -> None:
    """Check that /dev/fuse is there and may be opened."""
    if not DEVICE.exists():
        raise ConfigError(f"{DEVICE} is missing: load the module (modprobe fuse) or give the container {DEVICE}")
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        raise ConfigError(f"{DEVICE} may not be opened by you: run as root, or have root run chmod 666 {DEVICE}")


def check_user(config: MountConfig) -> None:
    """Check what an ordinary user needs besides."""
    if helper_path() is None:
        raise ConfigError("fusermount3 is missing: install the package fuse3 (apt install fuse3), or run as root")
    if config.options.allow_other or config.options.allow_root:
        try:
            lines = FUSE_CONF.read_text(errors="replace").splitlines()
        except OSError:
            lines = []
        if "user_allow_other" not in (line.strip() for line in lines):
            raise ConfigError(
                f"-o allow_other is not allowed to users: have root put user_allow_other into {FUSE_CONF}"
            )


def clear_mountpoint(mountpoint: Path) -> None:
    """Detach a dead tmemfs mount (its process was killed); refuse a live one."""
    # Bounded: several dead mounts may be stacked, but the table is finite and each round takes one away.
    while (entry := top_mount(mountpoint)) is not None and is_tmemfs(entry):
        if not is_dead(mountpoint):
            raise ConfigError(
                f"mountpoint '{mountpoint}' is already a tmemfs mount: umount it or choose another directory"
            )
        try:
            unmount(mountpoint, lazy=True)
        except OSError as error:
            raise ConfigError(
                f"mountpoint '{mountpoint}' is a dead mount that cannot be detached ({error.strerror}): "
                f"have root run umount -l on it"
            ) from error


def is_dead(mountpoint: Path, seconds: float = _ANSWER_SECONDS) -> bool:
    """Tell whether the process behind a mount is gone. One that does not answer in time is not.

    The question is put from a thread, because it hangs as long as the process behind the mount does.
    """
    dead = threading.Event()

    def ask() -> None:
        try:
            # Not stat: the kernel may have the attributes of a mount whose process is gone.
            os.statvfs(mountpoint)
        except OSError as error:
            if error.errno in (errno.ENOTCONN, errno.ECONNABORTED):
                dead.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return dead.is_set()


def open_source(source: Path) -> int:
    """Open SOURCE as a place to start paths from."""
    try:
        fd = os.open(source, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ConfigError(f"source '{source}' does not exist: create it or give another directory") from None
    except NotADirectoryError:
        raise ConfigError(f"source '{source}' is not a directory: give the directory to cache") from None
    except OSError as error:
        raise ConfigError(f"source '{source}' cannot be opened: {error.strerror}; check its permissions") from None
    if not os.access(source, os.R_OK | os.X_OK):
        os.close(fd)
        raise ConfigError(f"source '{source}' may not be read by you: ask its owner for read and search permission")
    return fd


def check_mountpoint(config: MountConfig) -> None:
    """Check that MOUNTPOINT is a directory to mount on."""
    mountpoint = config.mountpoint
    try:
        os.close(os.open(mountpoint, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    except FileNotFoundError:
        raise ConfigError(f"mountpoint '{mountpoint}' does not exist: create it with mkdir") from None
    except NotADirectoryError:
        raise ConfigError(f"mountpoint '{mountpoint}' is not a directory: give an empty directory") from None
    except OSError as error:
        raise ConfigError(
            f"mountpoint '{mountpoint}' cannot be used: {error.strerror}; choose another directory"
        ) from None
    # The guest would walk into its own mount and wait for itself.
    if config.source in mountpoint.parents:
        raise ConfigError(f"mountpoint '{mountpoint}' lies inside source '{config.source}': choose one outside")
