"""Look up and change names in the backing directory: lookup, create, remove, rename, link.

Calls are relative to O_PATH descriptors. So nothing depends on paths that others may rename, and SOURCE itself may be
the mountpoint. Each operation is one call in a thread that takes all of its stats, too: so the time in which a change
by others can fall between the operation and its stats is as short as possible.

If the mount is root's, new nodes belong to the caller (`owners.py`). The umask is applied here and not by the kernel,
because it must be ignored in a directory with a default ACL.

A file that is about to lose a name is opened before the removal: without its last name it cannot be opened any more,
and its users need a descriptor of it.
"""

from __future__ import annotations

import contextlib
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
from tmemfs.inodes.descriptors import PATH_FLAGS, stat_or_close
from tmemfs.inodes.inode import Inode
from tmemfs.inodes.inodes import InodeTable
from tmemfs.namespace.owners import Caller, make_node


class RemovedName(NamedTuple):
    """The inode of a name that is being removed, a descriptor of it, and its stat before the removal."""

    inode: Inode
    fd: int
    before: os.stat_result


class RenamedInode(NamedTuple):
    """A renamed inode and its stats before and after; `after` is None if others took the new name away."""

    inode: Inode
    before: os.stat_result
    after: os.stat_result | None


class Tree:
    """The operations on names of one guest."""

    def __init__(self, backing: Backing, inodes: InodeTable) -> None:
        self._backing = backing
        self._inodes = inodes
        self._descriptors = inodes.descriptors
        self._stats = CachedStats(inodes)

    async def lookup(self, parent: Inode, name: bytes) -> Inode | None:
        """Return the inode of a name, None if it does not exist."""
        if self._inodes.watches_directories:
            await self._inodes.ensure_watched(parent)
        started = self._inodes.start()
        st = await self._backing.ask(self._stats.cached_name, self._stats.name, parent, name)
        return None if st is None else self._inodes.get_or_create_if_linked(parent, name, st, started)

    async def lookup_and_open(self, parent: Inode, name: bytes) -> Inode | None:
        """Return the inode of a name, with its descriptor open whatever happens to the name later; None without one."""

        def call(dir_fd: int) -> tuple[os.stat_result, int] | None:
            try:
                fd = os.open(name, PATH_FLAGS, dir_fd=dir_fd)
            except FileNotFoundError:
                os.fstat(dir_fd)  # raises if the directory itself is missing
                return None
            return stat_or_close(fd), fd

        if self._inodes.watches_directories:
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

    # -- creating nodes ------------------------------------------------------------------------------------------

    async def mknod(self, parent: Inode, name: bytes, mode: int, device: int, caller: Caller) -> Inode:
        """Create a file, FIFO, socket or device node."""

        def make(fd: int, masked: int) -> None:
            os.mknod(name, masked, device, dir_fd=fd)

        return await self._make(parent, name, mode, caller, make)

    async def mkdir(self, parent: Inode, name: bytes, mode: int, caller: Caller) -> Inode:
        """Create a directory."""

        def make(fd: int, masked: int) -> None:
            os.mkdir(name, stat.S_IMODE(masked), dir_fd=fd)

        return await self._make(parent, name, mode, caller, make)

    async def symlink(self, parent: Inode, name: bytes, target: bytes, caller: Caller) -> Inode:
        """Create a symbolic link."""

        def make(fd: int, masked: int) -> None:
            os.symlink(target, name, dir_fd=fd)

        return await self._make(parent, name, stat.S_IFLNK | 0o777, caller, make)

    async def _make(
        self, parent: Inode, name: bytes, mode: int, caller: Caller, make: Callable[[int, int], None]
    ) -> Inode:
        def call() -> tuple[os.stat_result, os.stat_result]:
            with self._descriptors.use(parent) as fd:
                make_node(fd, name, self._apply_umask(parent, fd, mode, caller), caller, partial(make, fd))
                return os.stat(name, dir_fd=fd, follow_symlinks=False), os.fstat(fd)

        started = self._inodes.start()
        st, directory = await self._backing.meta(call)
        self._record_directory_change(parent, started, directory)
        return self._inodes.get_or_create(parent, name, st, started)

    async def create(self, parent: Inode, name: bytes, mode: int, flags: int, caller: Caller) -> tuple[Inode, int]:
        """Create and open a file. Return its inode and a descriptor, which the caller must close."""
        opening = flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

        def call() -> tuple[int, os.stat_result, os.stat_result]:
            with self._descriptors.use(parent) as dir_fd:
                opened: list[int] = []
                try:
                    masked = self._apply_umask(parent, dir_fd, mode, caller)
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
            # Others created it first. The kernel did not know the file, so it has not checked the permission to open
            # it. ESTALE makes it look the name up again and open what it finds.
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE)) from None
        self._record_directory_change(parent, started, directory)
        return self._inodes.get_or_create(parent, name, st, started), fd

    def _apply_umask(self, parent: Inode, dir_fd: int, mode: int, caller: Caller) -> int:
        """Return the mode with the umask of the caller applied, unless the directory has a default ACL (acl(5))."""
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
        """Add a name to an inode."""

        def call() -> tuple[os.stat_result, os.stat_result, os.stat_result]:
            with self._descriptors.use(parent) as dir_fd:
                before, after = self._descriptors.call(inode, partial(_link, name, dir_fd))
                return before, after, os.fstat(dir_fd)

        started = self._inodes.start()
        with self._inodes.renaming() as involved:
            involved.add(inode)
            before, after, directory = await self._backing.meta(call)
        self._record_directory_change(parent, started, directory)
        self._inodes.merge_stat(inode, before, started)
        inode.add_location(parent, name)
        self._inodes.record_own_change(inode, after, started)

    # -- removing and renaming -----------------------------------------------------------------------------------

    async def unlink(self, parent: Inode, name: bytes, *, directory: bool = False) -> None:
        """Remove the name of a directory (`directory`) or of any other node."""

        def call() -> tuple[RemovedName | None, os.stat_result | None, os.stat_result]:
            with self._descriptors.use(parent) as dir_fd:
                removed = self._open_before_removal(name, dir_fd, involved)
                try:
                    (os.rmdir if directory else os.unlink)(name, dir_fd=dir_fd)
                    after = self._stat_after(removed, parent, name) if removed else None
                    return removed, after, os.fstat(dir_fd)
                except OSError:
                    if removed:
                        os.close(removed.fd)
                    raise

        started = self._inodes.start()
        with self._inodes.renaming() as involved:
            removed, after, changed = await self._backing.meta(call)
        self._record_directory_change(parent, started, changed)
        self._inodes.observer.name_removed(parent, name)
        if removed is not None and after is not None:
            self._record_removal(removed, after, parent, name, started)

    async def rename(self, parent: Inode, name: bytes, new_parent: Inode, new_name: bytes, flags: int) -> None:
        """Rename, with the flags of renameat2(2)."""

        exchange = bool(flags & libc.RENAME_EXCHANGE)

        def call() -> tuple[RemovedName | None, os.stat_result | None, RenamedInode | None, RenamedInode | None]:
            with self._descriptors.use(parent) as old_fd, self._descriptors.use(new_parent) as new_fd:
                moving = self._find_before_rename(name, old_fd, involved)
                other = self._find_before_rename(new_name, new_fd, involved) if exchange else None
                removed = None if exchange else self._open_before_removal(new_name, new_fd, involved)
                try:
                    _renameat2(old_fd, name, new_fd, new_name, flags)
                except OSError:
                    if removed:
                        os.close(removed.fd)
                    raise
                after = self._stat_after(removed, new_parent, new_name) if removed else None
                return removed, after, _moved(moving, new_name, new_fd), _moved(other, name, old_fd)

        started = self._inodes.start()
        with self._inodes.renaming() as involved:
            removed, after, moved, other = await self._backing.meta(call)
        self._record_directory_change(parent, started)
        self._record_directory_change(new_parent, started)
        if removed is not None and after is not None:
            if moved is not None and removed.inode is moved.inode:  # two names of one file: rename did nothing
                self._descriptors.closer.close(removed.fd)
                return
            self._record_removal(removed, after, new_parent, new_name, started)
        if not exchange:
            self._inodes.observer.name_removed(parent, name)
        for found, old, new in (
            (moved, (parent, name), (new_parent, new_name)),
            (other, (new_parent, new_name), (parent, name)),
        ):
            if found is not None:
                self._record_rename(found, old, new, started)

    def _open_before_removal(self, name: bytes, dir_fd: int, involved: set[Inode]) -> RemovedName | None:
        """Open what a name leads to; None if there is no such name or its inode is not in the table.

        The inode is added to `involved` before its stat is taken.
        """
        try:
            fd = os.open(name, PATH_FLAGS, dir_fd=dir_fd)
        except FileNotFoundError:
            return None
        inode = self._inodes.find(stat_or_close(fd))
        if inode is None:
            os.close(fd)
            return None
        involved.add(inode)
        return RemovedName(inode, fd, stat_or_close(fd))

    def _stat_after(self, removed: RemovedName, parent: Inode, name: bytes) -> os.stat_result:
        """Return the stat of a node just after one of its names was removed.

        Filesystems that address files by name (sshfs, NFS) fail to stat a file without a name. The removal has worked
        all the same, so its stat is derived from the one before. Filesystems with one node for each name (bindfs) count
        links wrongly: at 0 links, other known names are checked.
        """
        try:
            st = os.fstat(removed.fd)
        except OSError:
            st = _without_link(removed.before)
        if st.st_nlink == 0:
            for other in tuple(removed.inode.locations):
                if other != (parent, name):
                    with contextlib.suppress(OSError), self._descriptors.use(other[0]) as dir_fd:
                        found = os.stat(other[1], dir_fd=dir_fd, follow_symlinks=False)
                        if (found.st_dev, found.st_ino) == removed.inode.key:
                            return found
        return st

    def _record_removal(
        self, removed: RemovedName, after: os.stat_result, parent: Inode, name: bytes, started: int
    ) -> None:
        """Record that an inode lost a name."""
        inode = removed.inode
        links_left = 0 if stat.S_ISDIR(removed.before.st_mode) else after.st_nlink
        self._inodes.merge_stat(inode, removed.before, started)
        inode.remove_location(parent, name)
        self._inodes.record_own_change(inode, after, started)
        self._inodes.record_unlink(inode, links_left)
        if links_left == 0 and (inode.lookups or inode.opens):
            self._descriptors.pin(inode, removed.fd)
        else:
            self._descriptors.closer.close(removed.fd)

    def _find_before_rename(
        self, name: bytes, dir_fd: int, involved: set[Inode]
    ) -> tuple[Inode, os.stat_result] | None:
        """Return the inode of a name and its stat, taken after the inode was added to `involved`; None if not known."""
        try:
            inode = self._inodes.find(os.stat(name, dir_fd=dir_fd, follow_symlinks=False))
            if inode is None:
                return None
            involved.add(inode)
            return inode, os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        except OSError:
            return None  # the rename itself will fail

    def _record_rename(
        self, moved: RenamedInode, old: tuple[Inode, bytes], new: tuple[Inode, bytes], started: int
    ) -> None:
        """Record that an inode was renamed."""
        inode = moved.inode
        inode.remove_location(*old)
        inode.add_location(*new)
        self._inodes.merge_stat(inode, moved.before, started)
        if moved.after is None:
            self._inodes.expire(inode)
        else:
            self._inodes.record_own_change(inode, moved.after, started)

    def _record_directory_change(self, parent: Inode, started: int, st: os.stat_result | None = None) -> None:
        """Record that we changed the entries of a directory; `st` is its stat just after."""
        parent.listing = None
        if st is not None:
            self._inodes.record_own_change(parent, st, started)
        else:
            self._inodes.expire(parent)


def _moved(known: tuple[Inode, os.stat_result] | None, name: bytes, dir_fd: int) -> RenamedInode | None:
    if known is None:
        return None
    try:
        return RenamedInode(*known, os.stat(name, dir_fd=dir_fd, follow_symlinks=False))
    except OSError:
        return RenamedInode(*known, None)


def _link(name: bytes, dir_fd: int, fd: int) -> tuple[os.stat_result, os.stat_result]:
    before = os.fstat(fd)
    os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=dir_fd, follow_symlinks=True)
    return before, os.fstat(fd)


def _renameat2(old_fd: int, name: bytes, new_fd: int, new_name: bytes, flags: int) -> None:
    if not flags:
        os.rename(name, new_name, src_dir_fd=old_fd, dst_dir_fd=new_fd)
    else:
        libc.renameat2(old_fd, name, new_fd, new_name, flags)


def _without_link(before: os.stat_result) -> os.stat_result:
    """Return a copy of a stat with one link less."""
    fields = list(before)
    fields[stat.ST_NLINK] = max(0, before.st_nlink - 1)
    times = {name: getattr(before, name) for name in ("st_atime_ns", "st_mtime_ns", "st_ctime_ns")}
    others = {name: getattr(before, name) for name in ("st_blksize", "st_blocks", "st_rdev")}
    return os.stat_result(fields, times | others)
