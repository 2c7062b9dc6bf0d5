"""Let new nodes belong to who asked for them.

Mounted by root, a node is made by root, then given away, in the same call. The kernel has checked the permission
(default_permissions).
"""

from __future__ import annotations

import os
import stat
from typing import Protocol

_AS_ROOT = os.geteuid() == 0


class Caller(Protocol):
    """Who asks."""

    @property
    def uid(self) -> int: ...
    @property
    def gid(self) -> int: ...
    @property
    def pid(self) -> int: ...
    @property
    def umask(self) -> int: ...


def give_away(dir_fd: int, name: bytes, mode: int, caller: Caller) -> None:
    """Let a new node belong to the caller: its group is the directory's where that has the set-group-ID bit."""
    if not _AS_ROOT or (caller.uid == 0 and caller.gid == 0):
        return
    inherits = os.fstat(dir_fd).st_mode & stat.S_ISGID
    try:
        os.chown(name, caller.uid, -1 if inherits else caller.gid, dir_fd=dir_fd, follow_symlinks=False)
    except OSError:  # who is told that it failed must not find it there, as root's
        made = os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode
        (os.rmdir if stat.S_ISDIR(made) else os.unlink)(name, dir_fd=dir_fd)
        raise
    lost = stat.S_ISUID | stat.S_ISGID  # chown(2) clears these
    if mode & lost and not stat.S_ISLNK(mode):
        made = os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode
        os.chmod(name, stat.S_IMODE(made) | (mode & lost), dir_fd=dir_fd)
