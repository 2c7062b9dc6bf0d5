"""The kernel's side of a mount: mount(2), umount2(2), fusermount3, the mount table, and abort.

Root talks to the kernel itself; anybody else goes through the setuid helper fusermount3, which is also what
decides what such a user may do.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tmemcommon import libc
from tmemfs.options import SUBTYPE, MountOptions

DEVICE = Path("/dev/fuse")
CONNECTIONS = Path("/sys/fs/fuse/connections")
HELPER_SECONDS = 30.0

_OCTAL = re.compile(rb"\\([0-7]{3})")


# Filesystems whose metadata calls return in microseconds unless the disk itself is dead.
LOCAL_FILESYSTEMS = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "tmpfs", "zfs", "bcachefs"})


@dataclass(frozen=True, slots=True)
class MountEntry:
    """Hold one line of the mount table."""

    device: str  # "major:minor"
    mountpoint: Path
    fstype: str
    fsname: str
    number: int = 0  # of this mount; a copy has another one
    parent: int = 0  # number of the mount that it is mounted on
    owner: int = 0  # uid of who mounted it, for a FUSE mount

    @property
    def is_tmemfs(self) -> bool:
        """Tell whether this mount is one of ours."""
        return self.fstype == f"fuse.{SUBTYPE}"


def _unescape(field: bytes) -> str:
    """Undo the octal escapes of mountinfo (blank, tab, newline, backslash)."""
    return os.fsdecode(_OCTAL.sub(lambda match: bytes([int(match[1], 8)]), field))


def mount_table(pid: int | None = None) -> list[MountEntry]:
    """Read the mount table of this process or another one, oldest mount first. OSError when it has ended."""
    return parse_mount_table(Path(f"/proc/{pid or 'self'}/mountinfo").read_bytes())


def parse_mount_table(text: bytes) -> list[MountEntry]:
    """Return what a mountinfo file says, oldest mount first."""
    entries = []
    for line in text.split(b"\n")[:-1]:  # a path may have \r in it
        left, _, right = line.partition(b" - ")
        fields, tail = left.split(b" "), right.split(b" ")
        mountpoint = Path(_unescape(fields[4]))
        device, fstype = fields[2].decode(), tail[0].decode()
        owner = next((int(word[8:]) for word in tail[2].split(b",") if word.startswith(b"user_id=")), 0)
        numbers = int(fields[0]), int(fields[1])
        entries.append(MountEntry(device, mountpoint, fstype, _unescape(tail[1]), *numbers, owner))
    return entries


def top_mount(mountpoint: Path) -> MountEntry | None:
    """Find the uppermost mount at exactly this path."""
    found = [entry for entry in mount_table() if entry.mountpoint == mountpoint]
    return found[-1] if found else None


@dataclass(frozen=True, slots=True)
class MountCopy:
    """Hold where a mount can be seen: one process of a mount namespace, and the path there."""

    pid: int
    command: str
    mountpoint: Path


def copies_of(mount: MountEntry) -> list[MountCopy]:
    """Find where a mount, or a copy of it, is mounted: in this mount namespace and in all others that can be seen.

    A namespace that no process is in (a file or a descriptor holds it) cannot be seen.
    """
    found: dict[int, MountCopy] = {}  # by number, which no other namespace uses
    namespaces: set[str] = set()
    others = sorted(int(name) for name in os.listdir("/proc") if name.isdecimal())
    for pid in (os.getpid(), *others):
        try:
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
        except PermissionError:
            namespace = f"of {pid}"  # another user's process: its table can be read all the same
        except OSError:
            continue  # it has ended
        if namespace in namespaces:
            continue
        namespaces.add(namespace)
        with contextlib.suppress(OSError):
            for entry in mount_table(pid):
                # The number of a mount that has ended may be another's by now.
                if (entry.device, entry.fstype, entry.fsname) == (mount.device, mount.fstype, mount.fsname):
                    command = Path(f"/proc/{pid}/comm").read_bytes()
                    found.setdefault(entry.number, MountCopy(pid, os.fsdecode(command).strip(), entry.mountpoint))
    return list(found.values())


def is_local(fd: int) -> bool:
    """Tell whether a directory, and all that is mounted below it, is on filesystems that do not wait for a network."""
    device, path = os.fstat(fd).st_dev, Path(os.readlink(f"/proc/self/fd/{fd}"))
    own = f"{os.major(device)}:{os.minor(device)}"
    kinds = {entry.fstype for entry in mount_table() if entry.device == own or path in entry.mountpoint.parents}
    return bool(kinds) and kinds <= LOCAL_FILESYSTEMS


def filesystem_of(path: Path) -> str:
    """Give the type of the filesystem that a path is on; empty where the mount table does not show it."""
    device = os.stat(path).st_dev
    own = f"{os.major(device)}:{os.minor(device)}"
    return next((entry.fstype for entry in mount_table() if entry.device == own), "")


def resolve_mountpoint(path: str | os.PathLike[str]) -> Path:
    """Make a mountpoint's path absolute, as the mount table has it.

    A mount that hangs must not be touched for that, so its last component is looked up only if the table has
    no such mount.
    """
    absolute = Path(os.path.abspath(path))
    resolved = Path(os.path.realpath(absolute.parent)) / absolute.name
    return resolved if top_mount(resolved) else Path(os.path.realpath(absolute))


def mount_fuse(fsname: str, mountpoint: Path, options: MountOptions) -> int:
    """Mount a fresh FUSE connection and return its /dev/fuse descriptor.

    Raises OSError. The kernel queues INIT on the descriptor before this returns.
    """
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
    """Mount with fusermount3, which hands the descriptor back over a socket."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        done = _run_helper(
            ["-o", ",".join(options.words(fsname)), "--", os.fspath(mountpoint)],
            pass_fds=(theirs.fileno(),),
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
        )
        if done.returncode != 0:
            raise OSError(errno.EPERM, _helper_says(done), os.fspath(mountpoint))
        ours.settimeout(HELPER_SECONDS)
        _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    if not fds:
        raise OSError(errno.EPROTO, "fusermount3 returned no descriptor", os.fspath(mountpoint))
    os.set_inheritable(fds[0], False)
    return fds[0]


def unmount(mountpoint: Path, *, lazy: bool = False, force: bool = False) -> None:
    """Unmount what is uppermost at a path.

    `lazy` hides it now and ends it when the last user is gone; `force` (root only) makes the kernel abort the
    connection first, so that nobody waits for it. Raises OSError, EBUSY when it is in use.
    """
    if os.geteuid() == 0:
        flags = libc.UMOUNT_NOFOLLOW | (libc.MNT_DETACH if lazy else 0) | (libc.MNT_FORCE if force else 0)
        libc.umount2(os.fspath(mountpoint), flags)
        return
    done = _run_helper(["-u", *(["-z"] if lazy or force else []), "--", os.fspath(mountpoint)])
    if done.returncode != 0:
        message = _helper_says(done)
        code = errno.EBUSY if "busy" in message else errno.EPERM
        raise OSError(code, message, os.fspath(mountpoint))


def abort(device: str) -> bool:
    """Abort the connection of a mount, so that every request on it fails; tell whether that could be done.

    Only where fusectl is mounted and the connection is ours or we are root.
    """
    try:
        (CONNECTIONS / device.partition(":")[2] / "abort").write_bytes(b"1")
    except OSError:
        return False
    return True


def helper_path() -> str | None:
    """Find fusermount3."""
    return shutil.which("fusermount3")


def _run_helper(
    arguments: list[str], *, pass_fds: tuple[int, ...] = (), env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run fusermount3 for a bounded time and keep what it says."""
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


def _helper_says(done: subprocess.CompletedProcess[bytes]) -> str:
    """Pick the line in which fusermount3 says what went wrong."""
    lines = os.fsdecode(done.stderr).strip().splitlines()
    return lines[-1] if lines else f"fusermount3 failed with status {done.returncode}"
