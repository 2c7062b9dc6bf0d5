"""Read and change attributes and extended attributes, open files, tell the free space."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

import trio

from tmemfs.backing import Backing
from tmemfs.inodes.cachedstats import CachedStats
from tmemfs.inodes.descriptors import Descriptors, stat_or_close
from tmemfs.inodes.inode import Absent, Inode
from tmemfs.inodes.inodes import InodeTable
from tmemfs.io.writer import Writer
from tmemfs.namespace.changes import Changes
from tmemfs.namespace.owners import Caller, may_keep_set_group_id
from tmemfs.namespace.revalidate import Revalidator

# What the kernel has done already when a request arrives, or what is ours to do.
_NOT_FOR_BACKING = os.O_DIRECT | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_NOCTTY | os.O_TRUNC
_ANY = b""  # stands for every name
_ACCESS_ACL = b"system.posix_acl_access"
_OFTEN_ABSENT = frozenset({b"security.selinux", _ACCESS_ACL, b"system.posix_acl_default", _ANY})
CAPABILITY = b"security.capability"


class Attributes:
    """Attributes of the inodes of one guest."""

    def __init__(
        self, backing: Backing, inodes: InodeTable, descriptors: Descriptors, writer: Writer, names: Revalidator
    ) -> None:
        self._backing = backing
        self._inodes = inodes
        self._descriptors = descriptors
        self._stats = CachedStats(inodes)
        self._writer = writer
        self._names = names
        self._absent: dict[Absent, Absent] = {}

    async def get(self, inode: Inode) -> os.stat_result:
        """Return the attributes, from memory within the attribute time-out."""
        if inode.attr is not None and trio.current_time() < inode.attr_until:
            return inode.attr
        return await self.stat(inode)

    async def stat(self, inode: Inode) -> os.stat_result:
        """Return the attributes as the backing has them now."""
        started = self._inodes.start()
        st = await self._backing.ask(self._stats.cached_inode, self._stats.inode, inode)
        self._inodes.observe(inode, st, started)
        return st

    async def set(self, inode: Inode, changes: Changes) -> None:
        """Change mode, owner or times."""

        def call() -> None:
            self._descriptors.call(inode, lambda fd: changes.apply(f"/proc/self/fd/{fd}"))

        await self._writer.change(inode, call, lambda: self._stats.inode(inode))

    async def truncate(self, inode: Inode, size: int, fd: int | None) -> None:
        """Set a file's size, through an open descriptor where there is one."""

        def call() -> None:
            if fd is not None:
                os.ftruncate(fd, size)
                return
            self._descriptors.call(inode, lambda path_fd: os.truncate(f"/proc/self/fd/{path_fd}", size))

        await self._writer.truncate(inode, size, call, lambda: self._stats.inode(inode))

    async def readlink(self, inode: Inode, thread: int) -> bytes:
        """Return a symbolic link's target. Raise ESTALE where no name leads to the link any more."""

        def call() -> bytes:
            return self._descriptors.call(inode, lambda fd: os.readlink(b"", dir_fd=fd))

        return await self._names.run(inode, thread, call, ends_walk=False)

    async def check_directory(self, inode: Inode, thread: int) -> os.stat_result:
        """Return the attributes as they are now. Raise ESTALE where no name leads to the directory any more."""
        started = self._inodes.start()
        st = await self._names.run(inode, thread, lambda: self._stats.inode(inode))
        self._inodes.observe(inode, st, started)
        gone = self._inodes.links_are_counted and not st.st_nlink and not inode.unlinked
        if gone:  # found by the first read, glibc would make it an empty directory
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return st

    # -- opening -------------------------------------------------------------------------------------------------

    async def open(self, inode: Inode, flags: int, thread: int, *, may_read_too: bool) -> tuple[int, int]:
        """Open the backing file and compare its version. Return a descriptor and the flags that it was opened with.

        Raise ESTALE where the names lead elsewhere by now and `thread` has to look them up again.
        `may_read_too`: open for reading what was to be written only (write-back has to fill pages), if allowed.
        """

        def call() -> tuple[int, int, os.stat_result]:
            wanted = (flags & ~_NOT_FOR_BACKING) | os.O_CLOEXEC
            if may_read_too and wanted & os.O_ACCMODE == os.O_WRONLY:
                try:
                    both = wanted & ~os.O_WRONLY | os.O_RDWR
                    fd = self._reopen(inode, both)
                    return fd, both, stat_or_close(fd)
                except PermissionError:
                    pass
            fd = self._reopen(inode, wanted)
            return fd, wanted, stat_or_close(fd)

        started = self._inodes.start()
        fd, opened, st = await self._names.run(inode, thread, call)
        if inode.writers and self._inodes.changed_since_recorded(inode, st):
            try:
                async with inode.lock():  # whoever is changing it finds out whether others did before
                    started = self._inodes.start()
                    st = await self._backing.meta(os.fstat, fd)
            except BaseException:
                self._descriptors.closer.close(fd)
                raise
        self._inodes.observe_at_open(inode, st, started)
        prepare_descriptor(fd)
        return fd, opened

    def _reopen(self, inode: Inode, flags: int) -> int:
        return self._descriptors.call(inode, lambda path_fd: os.open(f"/proc/self/fd/{path_fd}", flags))

    async def last_byte(self, inode: Inode) -> bytes:
        """Return the last byte that the backing has of a file; a zero where it may not be read."""

        def call() -> bytes:
            try:
                fd = self._reopen(inode, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    return os.pread(fd, 1, max(0, os.fstat(fd).st_size - 1)) or b"\0"
                finally:
                    os.close(fd)
            except OSError:
                return b"\0"

        return await self._backing.meta(call)

    # -- extended attributes -------------------------------------------------------------------------------------

    async def getxattr(self, inode: Inode, name: bytes) -> bytes:
        """Return an attribute's value. Raise OSError (ENODATA) where there is none."""
        if name == CAPABILITY and inode.no_capability_xattr:
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))  # the kernel asks around every write
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
        """Return the errno that says that an attribute is not there, if that is known."""
        if inode.absent_xattrs and trio.current_time() < inode.absent_xattrs_until:
            for known, code in inode.absent_xattrs:
                if known == name:
                    return code
        return None

    def _remember_absent(self, inode: Inode, name: bytes, code: int, started: int) -> None:
        """Believe for the attribute time-out that an attribute is not there: `ls -l` asks for two of each file."""
        if inode.writers or started < inode.seen_at:
            return  # it may have been set meanwhile
        if name == CAPABILITY and code == errno.ENODATA and trio.current_time() >= inode.settles_at:
            inode.no_capability_xattr = True
        if name in _OFTEN_ABSENT:
            now = trio.current_time()
            kept = inode.absent_xattrs if now < inode.absent_xattrs_until else ()
            if not kept:
                inode.absent_xattrs_until = now + self._inodes.attr_timeout
            absent = tuple(sorted({*kept, (name, code)}))
            inode.absent_xattrs = self._absent.setdefault(absent, absent)  # the same few for all inodes

    async def setxattr(self, inode: Inode, name: bytes, value: bytes, caller: Caller) -> None:
        """Set an attribute.

        Setting an ACL takes the set-group-ID bit away, unless the caller is in the file's group: the backing does not
        do it where it is root who sets it.
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
        """Remove an attribute."""

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
        """Return the names of all attributes."""
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
        """Make a directory's entries survive a crash."""

        def call() -> None:
            fd = self._reopen(inode, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

        await self._backing.data(inode, 0, call)

    async def statfs(self) -> os.statvfs_result:
        """Return the backing's size and free space."""

        def call() -> os.statvfs_result:
            with self._descriptors.use(self._inodes.root) as fd:
                return os.statvfs(f"/proc/self/fd/{fd}")

        return await self._backing.meta(call)


def prepare_descriptor(fd: int) -> None:
    """Keep the kernel from reading ahead on its own: tmemfs does, and what it does not ask for would stay twice."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
