"""Look up mounts in the mount table.

Nothing here touches a mount itself, unless it says so: a mount that hangs would block. Parsing is in
`tmemcommon.mountinfo`.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from tmemcommon.mountinfo import MountEntry, parse_mountinfo
from tmemfs.options import SUBTYPE

# Filesystems whose metadata calls return in microseconds unless the disk itself is dead.
LOCAL_FILESYSTEMS = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "tmpfs", "zfs", "bcachefs"})


def mount_table(pid: int | None = None) -> list[MountEntry]:
    """Return the mounts that this process or another one sees, the oldest first. OSError when the process has ended."""
    return parse_mountinfo(Path(f"/proc/{pid or 'self'}/mountinfo").read_bytes())


def is_tmemfs(entry: MountEntry) -> bool:
    """Return whether a mount is a mount of tmemfs."""
    return entry.fstype == f"fuse.{SUBTYPE}"


def top_mount(mountpoint: Path) -> MountEntry | None:
    """Return the uppermost mount at exactly this path, None without one."""
    found = [entry for entry in mount_table() if entry.mountpoint == mountpoint]
    return found[-1] if found else None


@dataclass(frozen=True, slots=True)
class MountCopy:
    """A place where a mount is visible: a process of one mount namespace, and the path in there."""

    pid: int
    command: str
    mountpoint: Path


def copies_of(mount: MountEntry) -> list[MountCopy]:
    """Return all places where a mount or a copy of it is mounted, in this mount namespace and in all others.

    A namespace without processes, held by a file or a descriptor, cannot be seen and is missing.
    """
    found: dict[int, MountCopy] = {}  # by mount_id
    namespaces: set[str] = set()
    others = sorted(int(name) for name in os.listdir("/proc") if name.isdecimal())
    for pid in (os.getpid(), *others):
        try:
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
        except PermissionError:
            namespace = f"of {pid}"  # a process of another user: its mount table is readable all the same
        except OSError:
            continue  # it has ended
        if namespace in namespaces:
            continue
        namespaces.add(namespace)
        with contextlib.suppress(OSError):
            for entry in mount_table(pid):
                # The device number alone is not enough: once a mount has ended, another may get it.
                if (entry.device, entry.fstype, entry.fsname) == (mount.device, mount.fstype, mount.fsname):
                    command = Path(f"/proc/{pid}/comm").read_bytes()
                    found.setdefault(entry.mount_id, MountCopy(pid, os.fsdecode(command).strip(), entry.mountpoint))
    return list(found.values())


def is_local(fd: int) -> bool:
    """Return whether a directory, and every mount below it, is on a filesystem that never waits for a network."""
    device, path = os.fstat(fd).st_dev, Path(os.readlink(f"/proc/self/fd/{fd}"))
    own = _device_name(device)
    types = {entry.fstype for entry in mount_table() if entry.device == own or path in entry.mountpoint.parents}
    return bool(types) and types <= LOCAL_FILESYSTEMS


def filesystem_of(path: Path) -> str:
    """Stat a path and return the type of its filesystem, empty if the mount table does not show it."""
    own = _device_name(os.stat(path).st_dev)
    return next((entry.fstype for entry in mount_table() if entry.device == own), "")


def _device_name(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"


def resolve_mountpoint(path: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a mountpoint as the mount table spells it.

    The last component is resolved only if no mount is there: a lookup in a mount that hangs would block.
    """
    absolute = Path(os.path.abspath(path))
    resolved = Path(os.path.realpath(absolute.parent)) / absolute.name
    return resolved if top_mount(resolved) else Path(os.path.realpath(absolute))
