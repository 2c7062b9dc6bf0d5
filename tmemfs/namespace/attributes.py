"""Read and change attributes and extended attributes; report the free space."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass

import trio

from tmemcommon import libc
from tmemfs.backing import Backing
from tmemfs.inodes.cachedstats import CachedStats
from tmemfs.inodes.inode import Absent, Inode
from tmemfs.inodes.inodes import InodeTable
from tmemfs.io.writer import Writer
from tmemfs.namespace.owners import Caller, may_keep_set_group_id

_ANY = b""  # stands for all extended attributes
_ACCESS_ACL = b"system.posix_acl_access"
_OFTEN_ABSENT = frozenset({b"security.selinux", _ACCESS_ACL, b"system.posix_acl_default", _ANY})
CAPABILITY = b"security.capability"
_BILLION = 1_000_000_000
_NOW = (0, libc.UTIME_NOW)
_OMIT = (0, libc.UTIME_OMIT)


@dataclass(frozen=True, slots=True)
class AttributeChanges:
    """The changes of one setattr; None leaves a field as it is. Times are in nanoseconds."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None

    def apply(self, path: str) -> None:
        """Apply the changes to the node at `path`, which is not a link. Without any change, only the ctime changes.

        The kernel has checked the permission. It sends "now" as its current time. Only the owner may set any other
        time, so if the backing answers EPERM, because there we are not the owner, both times are set to now.
        """
        if self.uid is not None or self.gid is not None or self == AttributeChanges():
            os.chown(path, -1 if self.uid is None else self.uid, -1 if self.gid is None else self.gid)
        if self.mode is not None:
            os.chmod(path, stat.S_IMODE(self.mode))
        if self.atime_ns is not None or self.mtime_ns is not None:
            try:
                libc.utimensat(path, _timespec(self.atime_ns), _timespec(self.mtime_ns))
            except OSError as error:
                if error.errno != errno.EPERM or self.atime_ns is None or self.mtime_ns is None:
                    raise
                libc.utimensat(path, _NOW, _NOW)


class Attributes:
    """The operations on attributes of one guest."""

    def __init__(self, backing: Backing, inodes: InodeTable, writer: Writer) -> None:
        self._backing = backing
        self._inodes = inodes
        self._descriptors = inodes.descriptors
        self._stats = CachedStats(inodes)
        self._writer = writer
        self._absent: dict[Absent, Absent] = {}

    async def get(self, inode: Inode) -> os.stat_result:
        """Return the attributes, cached ones within the attribute time-out."""
        if inode.attr is not None and trio.current_time() < inode.attr_until:
            return inode.attr
        return await self.stat(inode)

    async def stat(self, inode: Inode) -> os.stat_result:
        """Return the attributes from the backing."""
        started = self._inodes.start()
        st = await self._backing.ask(self._stats.cached_inode, self._stats.inode, inode)
        self._inodes.merge_stat(inode, st, started)
        return st

    def stat_in_thread(self, inode: Inode) -> os.stat_result:
        """Return the attributes as the backing has them now; called in a thread."""
        return self._stats.inode(inode)

    async def set(self, inode: Inode, changes: AttributeChanges) -> None:
        """Change mode, owner or times."""

        def call() -> None:
            self._descriptors.call(inode, lambda fd: changes.apply(f"/proc/self/fd/{fd}"))

        await self._writer.change(inode, call, lambda: self._stats.inode(inode))

    async def truncate(self, inode: Inode, size: int, fd: int | None) -> None:
        """Set the size of a file, through an open descriptor if there is one."""

        def call() -> None:
            if fd is not None:
                os.ftruncate(fd, size)
                return
            self._descriptors.call(inode, lambda path_fd: os.truncate(f"/proc/self/fd/{path_fd}", size))

        await self._writer.truncate(inode, size, call, lambda: self._stats.inode(inode))

    # -- extended attributes -------------------------------------------------------------------------------------

    async def getxattr(self, inode: Inode, name: bytes) -> bytes:
        """Return the value of an extended attribute. OSError with ENODATA if it does not exist."""
        if name == CAPABILITY and inode.no_capability_xattr:
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))  # the kernel asks for it before writes
        code = self._known_absent(inode, name)
        if code is not None:
            raise OSError(code, os.strerror(code))

        def call() -> bytes:
            return self._descriptors.call(inode, lambda fd: os.getxattr(f"/proc/self/fd/{fd}", name))

        started = self._inodes.start()
        try:
            return await self._backing.meta(call)
        except OSError as error:
            if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
                self._remember_absent(inode, name, error.errno, started)
            raise

    def _known_absent(self, inode: Inode, name: bytes) -> int | None:
        """Return the errno for an attribute that is known not to exist, else None."""
        if inode.absent_xattrs and trio.current_time() < inode.absent_xattrs_until:
            for known, code in inode.absent_xattrs:
                if known == name:
                    return code
        return None

    def _remember_absent(self, inode: Inode, name: bytes, code: int, started: int) -> None:
        """Remember for the attribute time-out that an attribute does not exist: `ls -l` asks for two of each file."""
        if inode.file.is_stale(started):
            return  # it may have been set in between
        if name == CAPABILITY and code == errno.ENODATA and trio.current_time() >= inode.file.settles_at:
            inode.no_capability_xattr = True
        if name in _OFTEN_ABSENT:
            now = trio.current_time()
            kept = inode.absent_xattrs if now < inode.absent_xattrs_until else ()
            if not kept:
                inode.absent_xattrs_until = now + self._inodes.attr_timeout
            absent = tuple(sorted({*kept, (name, code)}))
            inode.absent_xattrs = self._absent.setdefault(absent, absent)  # one object for all inodes with the same set

    async def setxattr(self, inode: Inode, name: bytes, value: bytes, caller: Caller) -> None:
        """Set an extended attribute.

        Setting an ACL clears the set-group-ID bit, unless the caller is in the group of the file. The backing does not
        clear it for us, because we are root.
        """

        def call(fd: int) -> None:
            path = f"/proc/self/fd/{fd}"
            os.setxattr(path, name, value)
            if name == _ACCESS_ACL:
                st = os.fstat(fd)
                if st.st_mode & stat.S_ISGID and not may_keep_set_group_id(st.st_gid, caller):
                    os.chmod(path, stat.S_IMODE(st.st_mode) & ~stat.S_ISGID)

        await self._change_xattr(inode, lambda: self._descriptors.call(inode, call))

    async def removexattr(self, inode: Inode, name: bytes) -> None:
        """Remove an extended attribute."""

        def call() -> None:
            self._descriptors.call(inode, lambda fd: os.removexattr(f"/proc/self/fd/{fd}", name))

        await self._change_xattr(inode, call)

    async def _change_xattr(self, inode: Inode, call: Callable[[], None]) -> None:
        try:
            await self._writer.change(inode, call, lambda: self._stats.inode(inode))
        finally:
            inode.no_capability_xattr = False
            inode.absent_xattrs = ()
            inode.no_default_acl_until = 0.0

    async def listxattr(self, inode: Inode) -> list[bytes]:
        """Return the names of all extended attributes."""
        if self._known_absent(inode, _ANY) is not None:
            return []

        def call() -> list[bytes]:
            found = self._descriptors.call(inode, lambda fd: os.listxattr(f"/proc/self/fd/{fd}"))
            return [os.fsencode(name) for name in found]

        started = self._inodes.start()
        names = await self._backing.meta(call)
        if not names:
            self._remember_absent(inode, _ANY, 0, started)
        return names

    async def sync_directory(self, inode: Inode) -> None:
        """Sync the entries of a directory to the disk."""

        def call() -> None:
            fd = self._descriptors.reopen(inode, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

        await self._backing.data(inode, 0, call)

    async def statfs(self) -> os.statvfs_result:
        """Return the size and free space of the backing."""

        def call() -> os.statvfs_result:
            with self._descriptors.use(self._inodes.root) as fd:
                return os.statvfs(f"/proc/self/fd/{fd}")

        return await self._backing.meta(call)


def _timespec(time_ns: int | None) -> tuple[int, int]:
    return _OMIT if time_ns is None else divmod(time_ns, _BILLION)
