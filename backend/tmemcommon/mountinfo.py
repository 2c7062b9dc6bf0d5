"""Parse the mount table as the kernel shows it (/proc/PID/mountinfo, proc(5))."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

_OCTAL = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class MountEntry:
    """One line of the mount table."""

    device: str  # "major:minor"
    mountpoint: Path
    fstype: str
    fsname: str
    mount_id: int = 0  # unique in the machine: a copy in another mount namespace has another one
    parent_id: int = 0  # mount_id of the mount that holds the mountpoint
    root: str = "/"  # the directory of the filesystem that is mounted here
    options: tuple[str, ...] = ()  # of the filesystem, not of this mount of it

    @property
    def owner(self) -> int:
        """The uid of the user who mounted a FUSE filesystem; 0 for others."""
        return next((int(option[8:]) for option in self.options if option.startswith("user_id=")), 0)


def parse_mountinfo(text: bytes) -> list[MountEntry]:
    """Return the mounts of a mountinfo file, the oldest first."""
    entries = []
    for line in filter(None, text.split(b"\n")):  # not splitlines: a path may contain \r
        left, _, right = line.partition(b" - ")
        fields, tail = left.split(b" "), right.split(b" ")
        entries.append(
            MountEntry(
                device=fields[2].decode(),
                mountpoint=Path(_unescape(fields[4])),
                fstype=tail[0].decode(),
                fsname=_unescape(tail[1]),
                mount_id=int(fields[0]),
                parent_id=int(fields[1]),
                root=_unescape(fields[3]),
                options=tuple(os.fsdecode(tail[2]).split(",")),
            )
        )
    return entries


def _unescape(field: bytes) -> str:
    """Replace the octal escapes of mountinfo (space, tab, newline, backslash)."""
    return os.fsdecode(_OCTAL.sub(lambda match: bytes([int(match[1], 8)]), field))
