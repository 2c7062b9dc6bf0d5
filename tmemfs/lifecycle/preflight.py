"""The checks before a mount. Each failure is one line that names the thing and the remedy."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

from tmemcommon.sizes import ConfigError
from tmemfs.config import MountConfig
from tmemfs.kernel.kernelmount import DEVICE, helper_path, unmount
from tmemfs.kernel.mounttable import is_tmemfs, top_mount

FUSE_CONF = Path("/etc/fuse.conf")
_ANSWER_SECONDS = 5.0


def prepare(config: MountConfig) -> int:
    """Check all that can be checked before mounting, and detach a dead tmemfs mount at MOUNTPOINT. Raises ConfigError.

    Returns a descriptor of SOURCE. It is opened before the mount, so that SOURCE and MOUNTPOINT may be the same
    directory.
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
    """Check that /dev/fuse exists and may be opened."""
    if not DEVICE.exists():
        raise ConfigError(f"{DEVICE} is missing: load the module (modprobe fuse) or give the container {DEVICE}")
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        raise ConfigError(f"{DEVICE} may not be opened by you: run as root, or let root run chmod 666 {DEVICE}")


def check_user(config: MountConfig) -> None:
    """Check what a user other than root needs: fusermount3, and user_allow_other for -o allow_other."""
    if helper_path() is None:
        raise ConfigError("fusermount3 is missing: install the package fuse3 (apt install fuse3), or run as root")
    if config.options.allow_other or config.options.allow_root:
        try:
            lines = FUSE_CONF.read_text(errors="replace").splitlines()
        except OSError:
            lines = []
        if "user_allow_other" not in (line.strip() for line in lines):
            raise ConfigError(f"-o allow_other is not allowed to users: let root add user_allow_other to {FUSE_CONF}")


def clear_mountpoint(mountpoint: Path) -> None:
    """Detach dead tmemfs mounts, whose process was killed. Raises ConfigError for a live one."""
    # Dead mounts may be stacked. Each iteration removes one, so the loop ends.
    while (entry := top_mount(mountpoint)) is not None and is_tmemfs(entry):
        if not is_dead(mountpoint):
            raise ConfigError(
                f"mountpoint '{mountpoint}' is already a tmemfs mount: unmount it or choose another directory"
            )
        try:
            unmount(mountpoint, lazy=True)
        except OSError as error:
            raise ConfigError(
                f"mountpoint '{mountpoint}' is a dead mount that cannot be detached ({error.strerror}): "
                f"let root run umount -l {mountpoint}"
            ) from error


def is_dead(mountpoint: Path, seconds: float = _ANSWER_SECONDS) -> bool:
    """Return whether the process of a mount has ended. A process that only hangs has not.

    The system call is made in a thread, because it hangs as long as the process does.
    """
    dead = threading.Event()

    def ask() -> None:
        try:
            # Not stat(2): the kernel may answer it from its cache.
            os.statvfs(mountpoint)
        except OSError as error:
            if error.errno in (errno.ENOTCONN, errno.ECONNABORTED):
                dead.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return dead.is_set()


def open_source(source: Path) -> int:
    """Open SOURCE as the directory of relative paths. Raises ConfigError."""
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
    """Check that MOUNTPOINT is a directory outside of SOURCE. Raises ConfigError."""
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
    # A guest that reads its own mount would wait for itself.
    if config.source in mountpoint.parents:
        raise ConfigError(f"mountpoint '{mountpoint}' lies inside source '{config.source}': choose one outside")
