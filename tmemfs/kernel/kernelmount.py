"""Mount and unmount FUSE filesystems, and abort their connections.

Root calls mount(2) and umount2(2). Other users run the setuid helper fusermount3, which decides what they may do.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
from pathlib import Path

from tmemcommon import libc
from tmemfs.options import SUBTYPE, MountOptions

DEVICE = Path("/dev/fuse")
CONNECTIONS = Path("/sys/fs/fuse/connections")
HELPER_SECONDS = 30.0


def mount_fuse(fsname: str, mountpoint: Path, options: MountOptions) -> int:
    """Mount a new FUSE connection and return its /dev/fuse descriptor, on which the kernel has queued INIT."""
    if os.geteuid() == 0:
        return _mount_as_root(fsname, mountpoint, options)
    return _mount_by_helper(fsname, mountpoint, options)


def _mount_as_root(fsname: str, mountpoint: Path, options: MountOptions) -> int:
    """Mount with mount(2)."""
    fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        data = options.kernel_data(fd, os.getuid(), os.getgid())
        libc.mount(fsname, os.fspath(mountpoint), f"fuse.{SUBTYPE}", options.flags, data)
    except OSError:
        os.close(fd)
        raise
    return fd


def _mount_by_helper(fsname: str, mountpoint: Path, options: MountOptions) -> int:
    """Mount with fusermount3, which sends the descriptor over a socket."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        done = _run_helper(
            ["-o", ",".join(options.words(fsname)), "--", os.fspath(mountpoint)],
            pass_fds=(theirs.fileno(),),
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
        )
        if done.returncode != 0:
            raise OSError(errno.EPERM, _helper_error(done), os.fspath(mountpoint))
        ours.settimeout(HELPER_SECONDS)
        _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    if not fds:
        raise OSError(errno.EPROTO, "fusermount3 returned no descriptor", os.fspath(mountpoint))
    os.set_inheritable(fds[0], False)
    return fds[0]


def unmount(mountpoint: Path, *, lazy: bool = False, force: bool = False) -> None:
    """Unmount the uppermost mount at a path. OSError with EBUSY when it is in use.

    `lazy` detaches it now and ends it with its last user. `force` (root only) aborts the connection first, so that
    every request on it fails instead of waiting.
    """
    if os.geteuid() == 0:
        flags = libc.UMOUNT_NOFOLLOW | (libc.MNT_DETACH if lazy else 0) | (libc.MNT_FORCE if force else 0)
        libc.umount2(os.fspath(mountpoint), flags)
        return
    done = _run_helper(["-u", *(["-z"] if lazy or force else []), "--", os.fspath(mountpoint)])
    if done.returncode != 0:
        message = _helper_error(done)
        code = errno.EBUSY if "busy" in message else errno.EPERM
        raise OSError(code, message, os.fspath(mountpoint))


def abort(device: str) -> bool:
    """Abort the connection of a mount, so that every request on it fails. Return whether that was possible.

    It needs fusectl to be mounted, and root or the owner of the connection.
    """
    try:
        (CONNECTIONS / device.partition(":")[2] / "abort").write_bytes(b"1")
    except OSError:
        return False
    return True


def helper_path() -> str | None:
    """Return the path of fusermount3, None where it is missing."""
    return shutil.which("fusermount3")


def _run_helper(
    arguments: list[str], *, pass_fds: tuple[int, ...] = (), env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run fusermount3 for at most HELPER_SECONDS and return its result with what it wrote to stderr."""
    command = [helper_path() or "fusermount3", *arguments]
    try:
        return subprocess.run(
            command,
            pass_fds=pass_fds,
            env=env,
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=HELPER_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(errno.ETIMEDOUT, "fusermount3 does not answer") from error


def _helper_error(done: subprocess.CompletedProcess[bytes]) -> str:
    """Return the line in which fusermount3 reports the error, its last."""
    lines = os.fsdecode(done.stderr).strip().splitlines()
    return lines[-1] if lines else f"fusermount3 failed with status {done.returncode}"
