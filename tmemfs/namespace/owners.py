"""Create nodes with the owner and group of the caller, where the mount is root's.

The thread takes the caller's ids for the call: setfsuid(2), setfsgid(2) and the setgroups system call affect only the
calling thread. So the node has the right owner from the start, and the backing checks the permission itself: it knows
a change that the kernel has not seen yet.

Some nodes the caller may create only by a capability (a device node, a node in a directory of another user), and
sometimes its groups cannot be read. Then root creates the node and changes its owner; the kernel has checked the
permission (default_permissions). Until then the node belongs to root, without set-ID bits. If the owner cannot be
changed, the node is removed, unless its name leads to another node by then. Between this check and the removal, others
could still replace the node.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

from tmemcommon import libc
from tmemfs.inodes.descriptors import PATH_FLAGS

_AS_ROOT = os.geteuid() == 0
_SET_ID = stat.S_ISUID | stat.S_ISGID
# Capabilities that permit creating nodes: DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, MKNOD.
_CREATION_CAPABILITIES = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 27
_FSETID = 1 << 4


class Caller(Protocol):
    """The process that sent a request."""

    @property
    def uid(self) -> int: ...
    @property
    def gid(self) -> int: ...
    @property
    def pid(self) -> int: ...
    @property
    def umask(self) -> int: ...


class Credentials(NamedTuple):
    """The supplementary groups and effective capabilities of a process."""

    groups: tuple[int, ...]
    capabilities: int


def credentials_of(caller: Caller) -> Credentials | None:
    """Return the credentials of the caller, None if they cannot be read."""
    try:
        lines = Path(f"/proc/{caller.pid}/status").read_bytes().splitlines()
    except OSError:
        return None  # it has ended, or is in another pid namespace (pid 0)
    fields = dict(line.split(b":", 1) for line in lines if b":" in line)
    return Credentials(tuple(map(int, fields[b"Groups"].split())), int(fields[b"CapEff"], 16))


def may_keep_set_group_id(gid: int, caller: Caller) -> bool:
    """Return whether a file of group `gid` keeps its set-group-ID bit when the caller changes its permissions."""
    if caller.uid == 0 or caller.gid == gid:
        return True
    credentials = credentials_of(caller)
    return credentials is not None and bool(gid in credentials.groups or credentials.capabilities & _FSETID)


def make_node(dir_fd: int, name: bytes, mode: int, caller: Caller, make: Callable[[int], None]) -> None:
    """Call `make` with a mode, so that the node that it creates belongs to the caller."""
    if not _AS_ROOT or (caller.uid == 0 and caller.gid == 0):
        make(mode)
        return
    if not mode & stat.S_ISGID:  # without the caller's groups, the kernel would clear that bit
        try:
            with _acting_as(caller, None):
                make(mode)
            return
        except PermissionError:
            pass
    credentials = credentials_of(caller)
    if credentials is not None and libc.HAS_THREAD_GROUPS:
        try:
            with _acting_as(caller, credentials.groups):
                make(mode)
            return
        except PermissionError:
            if not credentials.capabilities & _CREATION_CAPABILITIES:
                raise
    make(mode & ~_SET_ID)
    _chown_or_remove(dir_fd, name, mode, caller)


@contextmanager
def _acting_as(caller: Caller, groups: tuple[int, ...] | None) -> Iterator[None]:
    """Use the caller's ids (and groups) for file access of this thread within the block. Raise PermissionError."""
    own_gid, own_groups = os.getegid(), os.getgroups() if groups is not None else []
    try:
        if groups is not None:
            libc.set_thread_groups(groups)
        libc.set_thread_ids(caller.uid, caller.gid)
        if not libc.has_thread_ids(caller.uid, caller.gid):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        yield
    finally:
        libc.set_thread_ids(0, own_gid)
        if groups is not None:
            libc.set_thread_groups(own_groups)


def _chown_or_remove(dir_fd: int, name: bytes, mode: int, caller: Caller) -> None:
    """Change the owner of a new node to the caller; in a set-group-ID directory, it keeps the directory's group."""
    inherits = os.fstat(dir_fd).st_mode & stat.S_ISGID
    fd = os.open(name, PATH_FLAGS, dir_fd=dir_fd)
    try:
        made = os.fstat(fd)
        try:
            os.chown(f"/proc/self/fd/{fd}", caller.uid, -1 if inherits else caller.gid)
        except OSError:  # the caller sees a failure, so no node of root may stay
            there = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
            if (there.st_dev, there.st_ino) == (made.st_dev, made.st_ino):
                (os.rmdir if stat.S_ISDIR(made.st_mode) else os.unlink)(name, dir_fd=dir_fd)
            raise
        if mode & _SET_ID and not stat.S_ISLNK(made.st_mode):
            os.chmod(f"/proc/self/fd/{fd}", stat.S_IMODE(os.fstat(fd).st_mode) | (mode & _SET_ID))
    finally:
        os.close(fd)
