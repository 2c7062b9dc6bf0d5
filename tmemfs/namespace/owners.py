"""Make new nodes in the name of who asks for them, where the mount is root's.

The thread that makes a node has the caller's ids for the time of that call (setfsuid(2), setfsgid(2) and setgroups(2)
are a thread's own in the kernel): so the node belongs to the caller from its first moment, in the way in which the
backing gives owners and groups, and a permission that the backing has withdrawn counts at once.

Only what the caller may do by a capability of its own (a device node, a directory of somebody else's), or where its
groups cannot be known, is made by root and then given away: the kernel has checked that it may (default_permissions).
Such a node belongs to root for that moment, without set-ID bits. Where it cannot be given away it is removed, unless
its name leads elsewhere by then; between this look and the removal somebody could still put another node there.
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
# Capabilities by which the kernel lets somebody make a node: DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, MKNOD.
_MAKING = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 27
_FSETID = 1 << 4


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


class Credentials(NamedTuple):
    """What a process has beside its ids."""

    groups: tuple[int, ...]
    capabilities: int


def credentials_of(caller: Caller) -> Credentials | None:
    """Return the supplementary groups and effective capabilities of who asks; None where it cannot be seen."""
    try:
        lines = Path(f"/proc/{caller.pid}/status").read_bytes().splitlines()
    except OSError:
        return None  # it has ended, or is in another pid namespace (pid 0)
    fields = dict(line.split(b":", 1) for line in lines if b":" in line)
    return Credentials(tuple(map(int, fields[b"Groups"].split())), int(fields[b"CapEff"], 16))


def may_keep_set_group_id(gid: int, caller: Caller) -> bool:
    """Tell whether the set-group-ID bit of a group stays when the caller changes the permissions of a file."""
    if caller.uid == 0 or caller.gid == gid:
        return True
    known = credentials_of(caller)
    return known is not None and bool(gid in known.groups or known.capabilities & _FSETID)


def make_node(dir_fd: int, name: bytes, mode: int, caller: Caller, make: Callable[[int], None]) -> None:
    """Call `make` with the mode, so that the node which it makes belongs to the caller."""
    if not _AS_ROOT or (caller.uid == 0 and caller.gid == 0):
        make(mode)
        return
    if not mode & stat.S_ISGID:  # which goes where the caller is not in the group
        try:
            with _ids(caller, None):
                make(mode)
            return
        except PermissionError:
            pass
    known = credentials_of(caller)
    if known is not None and libc.HAS_THREAD_GROUPS:
        try:
            with _ids(caller, known.groups):
                make(mode)
            return
        except PermissionError:
            if not known.capabilities & _MAKING:
                raise
    make(mode & ~_SET_ID)
    _give_away(dir_fd, name, mode, caller)


@contextmanager
def _ids(caller: Caller, groups: tuple[int, ...] | None) -> Iterator[None]:
    """Have this thread act on files as the caller for the block. Raise PermissionError where it cannot."""
    own_gid, own_groups = os.getegid(), os.getgroups() if groups is not None else []
    try:
        if groups is not None:
            libc.set_thread_groups(groups)
        if not libc.set_thread_ids(caller.uid, caller.gid):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        yield
    finally:
        libc.set_thread_ids(0, own_gid)
        if groups is not None:
            libc.set_thread_groups(own_groups)


def _give_away(dir_fd: int, name: bytes, mode: int, caller: Caller) -> None:
    """Let a node of root's belong to the caller: its group is the directory's where that has the set-group-ID bit."""
    inherits = os.fstat(dir_fd).st_mode & stat.S_ISGID
    fd = os.open(name, PATH_FLAGS, dir_fd=dir_fd)
    try:
        made = os.fstat(fd)
        try:
            os.chown(f"/proc/self/fd/{fd}", caller.uid, -1 if inherits else caller.gid)
        except OSError:  # who is told that it failed must not find it there, as root's
            there = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
            if (there.st_dev, there.st_ino) == (made.st_dev, made.st_ino):
                (os.rmdir if stat.S_ISDIR(made.st_mode) else os.unlink)(name, dir_fd=dir_fd)
            raise
        if mode & _SET_ID and not stat.S_ISLNK(made.st_mode):
            os.chmod(f"/proc/self/fd/{fd}", stat.S_IMODE(os.fstat(fd).st_mode) | (mode & _SET_ID))
    finally:
        os.close(fd)
