"""Open, create and close files and directories.

An open is one thread call: it checks the inode's names, opens the backing file and takes its stat. Then the version is
compared, before the reply to the kernel.
"""

from __future__ import annotations

import errno
import os

from tmemfs.datapath import DataPath
from tmemfs.inodes.descriptors import stat_or_close
from tmemfs.inodes.inode import Inode
from tmemfs.io.files import OpenFile
from tmemfs.namespace.attributes import Attributes
from tmemfs.namespace.owners import Caller
from tmemfs.namespace.revalidate import Revalidator
from tmemfs.namespace.tree import Tree

# Open flags that the kernel has already handled, or that we handle.
_NOT_FOR_BACKING = os.O_DIRECT | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_NOCTTY | os.O_TRUNC


class Opener:
    """The opens and closes of one guest."""

    def __init__(
        self, data: DataPath, attributes: Attributes, tree: Tree, revalidator: Revalidator, *, synchronous: bool
    ) -> None:
        self._data = data
        self._attributes = attributes
        self._tree = tree
        self._revalidator = revalidator
        self._extra_flags = os.O_SYNC if synchronous else 0  # flags of every open

    async def open(self, inode: Inode, flags: int, caller: Caller) -> OpenFile:
        """Open a file of the backing; truncate it for O_TRUNC. Raise ESTALE if a known name does not lead to it."""
        data = self._data
        fd, opened = await self._open_backing(inode, flags | self._extra_flags, caller.pid)
        file = data.files.add(inode, fd, opened, caller.uid)
        try:
            with file.borrowed():
                if flags & os.O_TRUNC:
                    await self._attributes.truncate(inode, 0, fd if file.writable else None)
                if inode.changed_by_others:
                    await self.update_kernel_size(inode)
                await data.kernel.finish_invalidations(inode.number)
        except BaseException:
            await self.close(file)
            raise
        return file

    async def _open_backing(self, inode: Inode, flags: int, thread: int) -> tuple[int, int]:
        """Open the backing file and compare its version. Return a descriptor and its open flags.

        With write-back, O_WRONLY becomes O_RDWR if that is permitted, to read the rest of pages that are written in
        part.
        """
        data = self._data
        read_too = data.writeback is not None and not flags & os.O_APPEND

        def call() -> tuple[int, int, os.stat_result]:
            wanted = (flags & ~_NOT_FOR_BACKING) | os.O_CLOEXEC
            if read_too and wanted & os.O_ACCMODE == os.O_WRONLY:
                try:
                    both = wanted & ~os.O_WRONLY | os.O_RDWR
                    fd = data.descriptors.reopen(inode, both)
                    return fd, both, stat_or_close(fd)
                except PermissionError:
                    pass
            fd = data.descriptors.reopen(inode, wanted)
            return fd, wanted, stat_or_close(fd)

        started = data.inodes.start()
        fd, opened, st = await self._revalidator.run(inode, thread, call)
        if inode.file.own_changes and data.inodes.changed_since_recorded(inode, st):
            try:
                async with inode.lock():  # our change in progress detects changes that others made before it
                    started = data.inodes.start()
                    st = await data.backing.meta(os.fstat, fd)
            except BaseException:
                data.descriptors.closer.close(fd)
                raise
        data.inodes.merge_stat_at_open(inode, st, started)
        _disable_readahead(fd)
        return fd, opened

    async def open_directory(self, inode: Inode, thread: int) -> os.stat_result:
        """Return the current attributes of a directory. ESTALE if a known name no longer leads to it."""
        inodes = self._data.inodes
        started = inodes.start()
        st = await self._revalidator.run(inode, thread, lambda: self._attributes.stat_in_thread(inode))
        inodes.merge_stat(inode, st, started)
        if inodes.links_are_counted and not st.st_nlink and not inode.unlinked:
            # If only the first readdir failed, glibc would show an empty directory.
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return st

    async def readlink(self, inode: Inode, thread: int) -> bytes:
        """Return the target of a symbolic link. ESTALE if a known name no longer leads to it."""

        def call() -> bytes:
            return self._data.descriptors.call(inode, lambda fd: os.readlink(b"", dir_fd=fd))

        return await self._revalidator.run(inode, thread, call, ends_walk=False)

    async def update_kernel_size(self, inode: Inode) -> None:
        """Update the kernel's size of a file that others extended, before the file is used."""
        if inode.size_in_doubt and inode.file.size and not inode.virtual:
            inode.size_in_doubt = False
            await self._data.kernel.update_size(inode.number, inode.file.size, await self._last_byte(inode))
            if not inode.size_in_doubt:
                inode.former_sizes = ()

    async def _last_byte(self, inode: Inode) -> bytes:
        """Return the last byte of a file on the backing; a zero byte if it cannot be read."""

        def call() -> bytes:
            try:
                fd = self._data.descriptors.reopen(inode, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    return os.pread(fd, 1, max(0, os.fstat(fd).st_size - 1)) or b"\0"
                finally:
                    os.close(fd)
            except OSError:
                return b"\0"

        return await self._data.backing.meta(call)

    async def create(self, parent: Inode, name: bytes, mode: int, flags: int, caller: Caller) -> OpenFile:
        """Create and open a file."""
        if self._data.writeback is not None and flags & (os.O_ACCMODE | os.O_APPEND) == os.O_WRONLY:
            flags = flags & ~os.O_ACCMODE | os.O_RDWR  # to read the rest of pages that are written in part
        flags = flags & ~(os.O_DIRECT | os.O_NOCTTY) | self._extra_flags
        inode, fd = await self._tree.create(parent, name, mode, flags, caller)
        _disable_readahead(fd)
        return self._data.files.add(inode, fd, flags, caller.uid)

    async def flush(self, file: OpenFile) -> None:
        """Write back at close(2). Raise OSError for a failed write-back that was not reported yet."""
        if not file.writable:
            return
        if self._data.writeback is not None:
            await self._data.writeback.sync(file, closing=True)
        if not self._data.backing.local:  # a network filesystem reports write errors at close
            with file.borrowed() as fd:
                await self._data.backing.meta(_close_copy, fd)

    async def close(self, file: OpenFile) -> None:
        """Close an open file.

        The last close of an inode invalidates the pages that the kernel holds of its mappings. If the inode has no
        name any more, its cached pages are dropped, too.
        """
        inode, writeback = file.inode, self._data.writeback
        if writeback is not None and inode.file.has_dirty and not (inode.unlinked and inode.opens == 1):
            async with inode.lock():
                await writeback.flush(inode)
        file.acquire()  # so that a last release below does not close the descriptor, which we close at the end
        self._data.files.remove(file.number)
        if not inode.opens and inode.unlinked:
            inode.file.forget()
            if writeback is not None:
                writeback.forget(inode)
        if not inode.opens and inode.readable_opens:
            inode.readable_opens = 0
            self._data.kernel.invalidate_pages(inode.number)
        if not inode.opens and inode.lookups <= 0:
            self._data.inodes.forget(inode.number, 0)
        file.users -= 1
        if not file.users:  # else a fill or a failed write-back still uses it, and closes it
            await self._data.backing.meta(os.close, file.fd)


def _close_copy(fd: int) -> None:
    """Close a copy of a descriptor. Raise OSError if the filesystem reports a write error."""
    try:
        copy = os.dup(fd)
    except OSError:
        return  # no free descriptor: not an error of this file, so close(2) must not fail
    os.close(copy)


def _disable_readahead(fd: int) -> None:
    """Turn off the kernel's read-ahead: tmemfs reads ahead itself, and the kernel would cache pages a second time."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
