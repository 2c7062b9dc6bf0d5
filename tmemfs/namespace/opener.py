"""Open, create and close files: where a descriptor, an inode and the kernel's copy of a file come and go together."""

from __future__ import annotations

import os

from tmemfs.backing import Backing
from tmemfs.cache.content import Content
from tmemfs.inodes.inode import Inode
from tmemfs.inodes.inodes import InodeTable
from tmemfs.io.files import OpenFile, OpenFiles
from tmemfs.io.writer import Writer
from tmemfs.kernel.kernelcache import KernelCache
from tmemfs.namespace.attributes import Attributes, prepare_descriptor
from tmemfs.namespace.owners import Caller
from tmemfs.namespace.tree import Tree


class Opener:
    """The opens and closes of one guest."""

    def __init__(
        self,
        *,
        attributes: Attributes,
        backing: Backing,
        content: Content,
        files: OpenFiles,
        inodes: InodeTable,
        kernel: KernelCache,
        tree: Tree,
        writer: Writer,
        synchronous: bool,
    ) -> None:
        self._attributes = attributes
        self._backing = backing
        self._content = content
        self._files = files
        self._inodes = inodes
        self._kernel = kernel
        self._tree = tree
        self._writer = writer
        self._always = os.O_SYNC if synchronous else 0  # flags of every open

    async def open(self, inode: Inode, flags: int, caller: Caller) -> OpenFile:
        """Open a file of the backing; truncate it where O_TRUNC asks for that."""
        may_read_too = self._writer.writeback is not None and not flags & os.O_APPEND
        fd, opened = await self._attributes.open(inode, flags | self._always, caller.pid, may_read_too=may_read_too)
        file = self._files.add(inode, fd, opened, caller.uid)
        try:
            with file.borrowed():
                if flags & os.O_TRUNC:
                    await self._attributes.truncate(inode, 0, fd if file.writable else None)
                if inode.changed_by_others:
                    await self.tell_size(inode)
                await self._kernel.finish_invalidations(inode.number)
        except BaseException:
            await self.close(file)
            raise
        return file

    async def tell_size(self, inode: Inode) -> None:
        """Have the kernel know the size of a file that others made larger, before it is used."""
        if inode.size_in_doubt and inode.size and not inode.virtual:
            inode.size_in_doubt = False
            await self._kernel.update_size(inode.number, inode.size, await self._attributes.last_byte(inode))
            if not inode.size_in_doubt:
                inode.former_sizes = ()

    async def create(self, parent: Inode, name: bytes, mode: int, flags: int, caller: Caller) -> OpenFile:
        """Make and open a file."""
        if self._writer.writeback is not None and flags & (os.O_ACCMODE | os.O_APPEND) == os.O_WRONLY:
            flags = flags & ~os.O_ACCMODE | os.O_RDWR  # pages written in part have to be filled
        flags = flags & ~(os.O_DIRECT | os.O_NOCTTY) | self._always
        inode, fd = await self._tree.create(parent, name, mode, flags, caller)
        prepare_descriptor(fd)
        return self._files.add(inode, fd, flags, caller.uid)

    async def flush(self, file: OpenFile) -> None:
        """Do what a close(2) waits for; raise what a write-back owes."""
        if not file.writable:
            return
        if self._writer.writeback is not None:
            await self._writer.writeback.sync(file, closing=True)
        if not self._backing.local:  # a network filesystem reports at close what it could not write
            with file.borrowed() as fd:
                await self._backing.meta(_close_copy, fd)

    async def close(self, file: OpenFile) -> None:
        """Close an open file.

        With the last one of an inode go the pages that the kernel holds of its mappings and, when it has no name any
        more, everything that is cached of it.
        """
        inode, writeback = file.inode, self._writer.writeback
        if writeback is not None and inode.dirty and not (inode.unlinked and inode.opens == 1):
            async with inode.lock():
                await writeback.flush(inode)
        file.acquire()  # what follows may end the last other use: the descriptor is to be closed once
        self._files.remove(file.number)
        if not inode.opens and inode.unlinked:
            self._content.forget(inode)
            if writeback is not None:
                writeback.forget(inode)
        if not inode.opens and inode.readable_opens:
            inode.readable_opens = 0
            self._kernel.invalidate_pages(inode.number)
        if not inode.opens and inode.lookups <= 0:
            self._inodes.forget(inode.number, 0)
        file.users -= 1
        if not file.users:  # else a fill or a write-back that failed still needs the descriptor
            await self._backing.meta(os.close, file.fd)


def _close_copy(fd: int) -> None:
    """Have the filesystem report what it could not write, by closing a copy of a descriptor."""
    try:
        copy = os.dup(fd)
    except OSError:
        return  # no descriptor to spare is no trouble of the file's, and close(2) must not fail for that
    os.close(copy)
