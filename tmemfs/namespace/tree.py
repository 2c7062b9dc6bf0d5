"""Change and read the names of the backing directory: lookup, create, remove, rename, link.

Calls are relative to O_PATH descriptors, so nothing depends on paths that others may move, and SOURCE itself may be
the mountpoint. One operation is one call into a thread, with every stat that it needs: what a call did and what it
found cannot be told apart by somebody else's change in between.

Mounted by root, a new node belongs to whoever asks for it (`owners.py`). The umask is applied here, because a
directory with a default ACL must not have it applied at all.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from tmemcommon import libc
from tmemfs.backing import Backing
from tmemfs.inodes.cachedstats import CachedStats
from tmemfs.inodes.descriptors import PATH_FLAGS, Descriptors, stat_or_close
from tmemfs.inodes.inode import Inode
from tmemfs.inodes.inodes import InodeTable
from tmemfs.namespace.owners import Caller, make_node
from tmemfs.namespace.removals import Removals, Removed


class Moved(NamedTuple):
    """An inode that got another name, and its stats before and after; None where somebody took that name away."""

    inode: Inode
    before: os.stat_result
    after: os.stat_result | None


class Tree:
    """The namespace of one guest."""

    def __init__(self, backing: Backing, inodes: InodeTable, descriptors: Descriptors) -> None:
        self._backing = backing
        self._inodes = inodes
        self._descriptors = descriptors
        self._removals = Removals(inodes, descriptors)
        self._stats = CachedStats(inodes)

    async def lookup(self, parent: Inode, name: bytes) -> Inode | None:
        """Find a name; None where there is none."""
        if self._inodes.on_first_look is not None:
            await self._inodes.ensure_watched(parent)
        started = self._inodes.start()
        st = await self._backing.ask(self._stats.cached_name, self._stats.name, parent, name)
        return None if st is None else self._inodes.get_or_create_if_linked(parent, name, st, started)

    async def hold(self, parent: Inode, name: bytes) -> Inode | None:
        """Find a name, and have a descriptor of what was found, whatever follows; None where there is none."""

        def call(dir_fd: int) -> tuple[os.stat_result, int] | None:
            try:
                fd = os.open(name, PATH_FLAGS, dir_fd=dir_fd)
            except FileNotFoundError:
                os.fstat(dir_fd)  # fails where it is the directory that is missing
                return None
            return stat_or_close(fd), fd

        if self._inodes.on_first_look is not None:
            await self._inodes.ensure_watched(parent)
        started = self._inodes.start()
        found = await self._backing.meta(self._descriptors.call, parent, call)
        if found is None:
            return None
        st, fd = found
        inode = self._inodes.get_or_create_if_linked(parent, name, st, started)
        if inode is None:
            self._descriptors.closer.close(fd)
        else:
            self._descriptors.add(inode, fd)
        return inode

    # -- making nodes --------------------------------------------------------------------------------------------

    async def mknod(self, parent: Inode, name: bytes, mode: int, device: int, caller: Caller) -> Inode:
        """Make a file, FIFO, socket or device node."""

        def make(fd: int, masked: int) -> None:
            os.mknod(name, masked, device, dir_fd=fd)

        return await self._make(parent, name, mode, caller, make)

    async def mkdir(self, parent: Inode, name: bytes, mode: int, caller: Caller) -> Inode:
        """Make a directory."""

        def make(fd: int, masked: int) -> None:
            os.mkdir(name, stat.S_IMODE(masked), dir_fd=fd)

        return await self._make(parent, name, mode, caller, make)

    async def symlink(self, parent: Inode, name: bytes, target: bytes, caller: Caller) -> Inode:
        """Make a symbolic link."""

        def make(fd: int, masked: int) -> None:
            os.symlink(target, name, dir_fd=fd)

        return await self._make(parent, name, stat.S_IFLNK | 0o777, caller, make)

    async def _make(
        self, parent: Inode, name: bytes, mode: int, caller: Caller, make: Callable[[int, int], None]
    ) -> Inode:
        def call() -> tuple[os.stat_result, os.stat_result]:
            with self._descriptors.use(parent) as fd:
                make_node(fd, name, self._masked(parent, fd, mode, caller), caller, partial(make, fd))
                return os.stat(name, dir_fd=fd, follow_symlinks=False), os.fstat(fd)

        started = self._inodes.start()
        st, directory = await self._backing.meta(call)
        self._changed(parent, started, directory)
        return self._inodes.get_or_create(parent, name, st, started)

    async def create(self, parent: Inode, name: bytes, mode: int, flags: int, caller: Caller) -> tuple[Inode, int]:
        """Make and open a file. Return the inode and a descriptor that belongs to the caller."""
        opening = flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

        def call() -> tuple[int, os.stat_result, os.stat_result]:
            with self._descriptors.use(parent) as dir_fd:
                opened: list[int] = []
                try:
                    masked = self._masked(parent, dir_fd, mode, caller)
                    make_node(
                        dir_fd,
                        name,
                        masked,
                        caller,
                        lambda mode: opened.append(os.open(name, opening, mode, dir_fd=dir_fd)),
                    )
                    return opened[0], os.fstat(opened[0]), os.fstat(dir_fd)
                except OSError:
                    for fd in opened:
                        os.close(fd)
                    raise

        started = self._inodes.start()
        try:
            fd, st, directory = await self._backing.meta(call)
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
            # Somebody was faster. The kernel knew of no such file, so it has not checked who may open it: have it look
            # the name up again, and open what it finds by its rules.
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE)) from None
        self._changed(parent, started, directory)
        return self._inodes.get_or_create(parent, name, st, started), fd

    def _masked(self, parent: Inode, dir_fd: int, mode: int, caller: Caller) -> int:
        """Apply the caller's umask, unless the directory's default ACL is to decide (acl(5))."""
        now = time.monotonic()
        if now >= parent.no_default_acl_until:
            try:
                os.getxattr(f"/proc/self/fd/{dir_fd}", "system.posix_acl_default")
            except OSError as error:
                if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
                    raise
            else:
                return mode
            parent.no_default_acl_until = now + self._inodes.attr_timeout
        return mode & ~caller.umask

    async def link(self, inode: Inode, parent: Inode, name: bytes) -> None:
        """Give an inode one more name."""

        def call() -> tuple[os.stat_result, os.stat_result, os.stat_result]:
            with self._descriptors.use(parent) as dir_fd:
                before, after = self._descriptors.call(inode, partial(_link, name, dir_fd))
                return before, after, os.fstat(dir_fd)

        started = self._inodes.start()
        with self._inodes.renaming() as involved:
            involved.add(inode)
            before, after, directory = await self._backing.meta(call)
        self._changed(parent, started, directory)
        self._inodes.observe(inode, before, started)
        inode.add_location(parent, name)
        self._inodes.record(inode, after, started)

    # -- removing and renaming -----------------------------------------------------------------------------------

    async def unlink(self, parent: Inode, name: bytes, *, directory: bool = False) -> None:
        """Remove a name; `directory` tells rmdir from unlink."""

        def call() -> tuple[Removed | None, os.stat_result | None, os.stat_result]:
            with self._descriptors.use(parent) as dir_fd:
                going = self._removals.going(name, dir_fd, involved)
                try:
                    (os.rmdir if directory else os.unlink)(name, dir_fd=dir_fd)
                    return going, self._removals.stat_after(going, parent, name) if going else None, os.fstat(dir_fd)
                except OSError:
                    if going:
                        os.close(going.fd)
                    raise

        started = self._inodes.start()
        with self._inodes.renaming() as involved:
            gone, after, changed = await self._backing.meta(call)
        self._changed(parent, started, changed)
        self._inodes.on_name_removed(parent, name)
        if gone is not None and after is not None:
            self._removals.settle(gone, after, parent, name, started)

    async def rename(self, parent: Inode, name: bytes, new_parent: Inode, new_name: bytes, flags: int) -> None:
        """Rename with the flags of renameat2(2)."""

        exchange = bool(flags & libc.RENAME_EXCHANGE)

        def call() -> tuple[Removed | None, os.stat_result | None, Moved | None, Moved | None]:
            with self._descriptors.use(parent) as old_fd, self._descriptors.use(new_parent) as new_fd:
                moving = self._known(name, old_fd, involved)
                other = self._known(new_name, new_fd, involved) if exchange else None
                going = None if exchange else self._removals.going(new_name, new_fd, involved)
                try:
                    _renameat2(old_fd, name, new_fd, new_name, flags)
                except OSError:
                    if going:
                        os.close(going.fd)
                    raise
                after = self._removals.stat_after(going, new_parent, new_name) if going else None
                return going, after, _moved(moving, new_name, new_fd), _moved(other, name, old_fd)

        started = self._inodes.start()
        with self._inodes.renaming() as involved:
            gone, after, moved, other = await self._backing.meta(call)
        self._changed(parent, started)
        self._changed(new_parent, started)
        if gone is not None and after is not None:
            if moved is not None and gone.inode is moved.inode:  # two names of one file: rename does nothing
                self._descriptors.closer.close(gone.fd)
                return
            self._removals.settle(gone, after, new_parent, new_name, started)
        if not exchange:
            self._inodes.on_name_removed(parent, name)
        for found, old, new in (
            (moved, (parent, name), (new_parent, new_name)),
            (other, (new_parent, new_name), (parent, name)),
        ):
            if found is not None:
                self._relocate(found, old, new, started)

    def _known(self, name: bytes, dir_fd: int, involved: set[Inode]) -> tuple[Inode, os.stat_result] | None:
        """Return what a name leads to, if the kernel knows it, with its stat of after it became `involved`."""
        try:
            inode = self._inodes.find(os.stat(name, dir_fd=dir_fd, follow_symlinks=False))
            if inode is None:
                return None
            involved.add(inode)
            return inode, os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        except OSError:
            return None  # the rename itself will say so

    def _relocate(self, moved: Moved, old: tuple[Inode, bytes], new: tuple[Inode, bytes], started: int) -> None:
        """Take in that a known inode has another name."""
        inode = moved.inode
        inode.remove_location(*old)
        inode.add_location(*new)
        self._inodes.observe(inode, moved.before, started)
        if moved.after is None:
            self._inodes.expire(inode)
        else:
            self._inodes.record(inode, moved.after, started)

    def _changed(self, parent: Inode, started: int, st: os.stat_result | None = None) -> None:
        """Take in that a directory's entries changed; `st` is its stat just after."""
        parent.listing = None
        if st is not None:
            self._inodes.record(parent, st, started)
        else:
            self._inodes.expire(parent)


def _moved(known: tuple[Inode, os.stat_result] | None, name: bytes, dir_fd: int) -> Moved | None:
    if known is None:
        return None
    try:
        return Moved(*known, os.stat(name, dir_fd=dir_fd, follow_symlinks=False))
    except OSError:
        return Moved(*known, None)


def _link(name: bytes, dir_fd: int, fd: int) -> tuple[os.stat_result, os.stat_result]:
    before = os.fstat(fd)
    os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=dir_fd, follow_symlinks=True)
    return before, os.fstat(fd)


def _renameat2(old_fd: int, name: bytes, new_fd: int, new_name: bytes, flags: int) -> None:
    if not flags:
        os.rename(name, new_name, src_dir_fd=old_fd, dst_dir_fd=new_fd)
    else:
        libc.renameat2(old_fd, name, new_fd, new_name, flags)
