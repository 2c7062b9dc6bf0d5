"""Answer the kernel: pyfuse3's operations, translated into calls on the guest's parts.

The only file that knows FUSEError. Handlers raise what the parts raise; `answered` turns an OSError into its errno
and anything unforeseen into a logged EIO, because an exception that leaves a handler ends pyfuse3's main loop and
with it the mount. It also measures: every operation has a latency histogram.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import stat
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext, StatvfsData

from tmemfs.attributes import Attributes, Changes, prepare_descriptor
from tmemfs.backing import Backing
from tmemfs.content import Content
from tmemfs.control import BadControlInput, Control, Node
from tmemfs.descriptors import Descriptors
from tmemfs.files import OpenFile, OpenFiles
from tmemfs.inodes import Inode, InodeTable
from tmemfs.kernelcache import KernelCache
from tmemfs.listing import Listing, Listings
from tmemfs.reader import Reader
from tmemfs.stats import Stats
from tmemfs.tree import Tree
from tmemfs.writer import Writer

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")
Handler = Callable[Concatenate["Operations", P], Coroutine[Any, Any, R]]


def answered(handler: Handler[P, R]) -> Handler[P, R]:
    """Let a handler end in a reply whatever happens, and measure how long that took."""
    name = handler.__name__.lstrip("_")

    @functools.wraps(handler)
    async def wrapper(self: Operations, /, *args: P.args, **kwargs: P.kwargs) -> R:
        started = time.perf_counter_ns()
        try:
            return await handler(self, *args, **kwargs)
        except OSError as error:
            raise FUSEError(error.errno or errno.EIO) from None
        except Exception:
            log.exception("%s failed unexpectedly; the caller got EIO", name)
            raise FUSEError(errno.EIO) from None
        finally:
            self.stats.latency(name).add(time.perf_counter_ns() - started)

    return wrapper


class OpenDirectory:
    """One open of a directory."""

    __slots__ = ("inode", "listing", "started")

    def __init__(self, inode: Inode, listing: Listing) -> None:
        self.inode = inode
        self.listing = listing
        self.started = False


class OpenControl:
    """One open of a virtual file."""

    __slots__ = ("data", "node")

    def __init__(self, node: Node, data: bytes) -> None:
        self.node = node
        self.data = data


class Parts:
    """What the operations work on."""

    def __init__(
        self,
        *,
        content: Content,
        backing: Backing,
        inodes: InodeTable,
        descriptors: Descriptors,
        files: OpenFiles,
        reader: Reader,
        writer: Writer,
        kernel: KernelCache,
        control: Control,
    ) -> None:
        self.content = content
        self.backing = backing
        self.inodes = inodes
        self.files = files
        self.reader = reader
        self.writer = writer
        self.kernel = kernel
        self.control = control
        self.tree = Tree(backing, inodes, descriptors)
        self.attributes = Attributes(backing, inodes, descriptors, writer)
        self.listings = Listings(backing, inodes, descriptors)


class Operations(pyfuse3.Operations):
    """The filesystem as pyfuse3 sees it."""

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = True  # without it, default_permissions reads the ACL mask as group bits and lets denied groups in

    def __init__(self, parts: Parts, stats: Stats, *, attr_timeout: float, negative_timeout: float) -> None:
        super().__init__()
        self.parts = parts
        self.stats = stats
        self._attr_timeout = attr_timeout
        self._negative_timeout = negative_timeout
        self._files = parts.files.by_number
        self._hit = parts.reader.hit
        self._read_latency = stats.latency("read")
        self._directories: dict[int, OpenDirectory] = {}
        self._controls: dict[int, OpenControl] = {}

    # -- replies -------------------------------------------------------------------------------------------------

    def _inode(self, number: int) -> Inode:
        inode = self.parts.inodes.get(number)
        if inode is None:
            raise OSError(errno.EPERM if self.parts.control.get(number) else errno.ESTALE, "")
        return inode

    def _entry(self, inode: Inode, st: os.stat_result | None = None) -> EntryAttributes:
        """Make the reply that describes an inode; `st` where the inode's own attributes are not known."""
        known = inode.attr or st
        assert known is not None
        entry = _attributes(known, inode.number)
        entry.generation = inode.generation
        entry.entry_timeout = self._attr_timeout
        entry.attr_timeout = self._attr_timeout
        writeback = self.parts.writer.writeback
        if inode.dirty and writeback is not None:
            entry.st_size = inode.size
            entry.st_mtime_ns = entry.st_ctime_ns = writeback.touched_ns.get(inode, known.st_mtime_ns)
        return entry

    def _remembered(self, inode: Inode) -> EntryAttributes:
        self.parts.inodes.remember(inode)
        return self._entry(inode)

    def _virtual(self, node: Node) -> EntryAttributes:
        entry = _attributes(self.parts.control.attributes(node), node.number)
        entry.entry_timeout = entry.attr_timeout = 0
        return entry

    # -- names ---------------------------------------------------------------------------------------------------

    @answered
    async def lookup(self, parent: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        control = self.parts.control
        node = control.find(parent, name)
        if node is not None:
            return self._virtual(node)
        if parent == control.directory.number:
            raise FileNotFoundError(errno.ENOENT, "")
        try:
            if name in (b".", b".."):
                raise FileNotFoundError(errno.ENOENT, "")
            return self._remembered(await self.parts.tree.lookup(self._inode(parent), name))
        except FileNotFoundError:
            if parent == pyfuse3.ROOT_INODE and name == control.root_stats.name:
                return self._virtual(control.root_stats)
            if not self._negative_timeout:
                raise
            missing = EntryAttributes()
            missing.st_ino = pyfuse3.InodeT(0)
            missing.entry_timeout = self._negative_timeout
            return missing

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for number, count in inode_list:
            self.parts.inodes.forget(number, count)

    @answered
    async def mknod(self, parent: int, name: bytes, mode: int, rdev: int, ctx: RequestContext) -> EntryAttributes:
        return self._remembered(await self.parts.tree.mknod(self._inode(parent), name, mode, rdev, ctx))

    @answered
    async def mkdir(self, parent: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        return self._remembered(await self.parts.tree.mkdir(self._inode(parent), name, mode, ctx))

    @answered
    async def symlink(self, parent: int, name: bytes, target: bytes, ctx: RequestContext) -> EntryAttributes:
        return self._remembered(await self.parts.tree.symlink(self._inode(parent), name, target, ctx))

    @answered
    async def link(self, number: int, parent: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        inode = self._inode(number)
        await self.parts.tree.link(inode, self._inode(parent), name)
        return self._remembered(inode)

    @answered
    async def unlink(self, parent: int, name: bytes, ctx: RequestContext) -> None:
        await self.parts.tree.unlink(self._inode(parent), name)

    @answered
    async def rmdir(self, parent: int, name: bytes, ctx: RequestContext) -> None:
        await self.parts.tree.unlink(self._inode(parent), name, directory=True)

    @answered
    async def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int, ctx: RequestContext
    ) -> None:
        await self.parts.tree.rename(self._inode(parent), name, self._inode(new_parent), new_name, flags)

    @answered
    async def readlink(self, number: int, ctx: RequestContext) -> bytes:
        return await self.parts.attributes.readlink(self._inode(number))

    # -- attributes ----------------------------------------------------------------------------------------------

    @answered
    async def getattr(self, number: int, ctx: RequestContext) -> EntryAttributes:
        node = self.parts.control.get(number)
        if node is not None:
            return self._virtual(node)
        inode = self._inode(number)
        return self._entry(inode, await self.parts.attributes.get(inode))

    @answered
    async def setattr(
        self, number: int, attr: EntryAttributes, fields: Any, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        node = self.parts.control.get(number)
        if node is not None:  # the truncation of `echo 16M > cache_size`
            return self._virtual(node)
        inode, attributes = self._inode(number), self.parts.attributes
        if fields.update_size:
            file = self._files.get(fh) if fh is not None else None
            if file is not None and file.writable:
                with file.borrowed() as fd:
                    await attributes.truncate(inode, attr.st_size, fd)
            else:
                await attributes.truncate(inode, attr.st_size, None)
        changes = Changes(
            mode=attr.st_mode if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
        )
        if changes != Changes():
            await attributes.set(inode, changes)
        return self._entry(inode, await attributes.get(inode))

    @answered
    async def getxattr(self, number: int, name: bytes, ctx: RequestContext) -> bytes:
        if self.parts.control.get(number) is not None:
            raise OSError(errno.ENODATA, "")
        return await self.parts.attributes.getxattr(self._inode(number), name)

    @answered
    async def setxattr(self, number: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        await self.parts.attributes.setxattr(self._inode(number), name, value)

    @answered
    async def listxattr(self, number: int, ctx: RequestContext) -> Sequence[bytes]:
        if self.parts.control.get(number) is not None:
            return []
        return await self.parts.attributes.listxattr(self._inode(number))

    @answered
    async def removexattr(self, number: int, name: bytes, ctx: RequestContext) -> None:
        await self.parts.attributes.removexattr(self._inode(number), name)

    @answered
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        found, reply = await self.parts.attributes.statfs(), StatvfsData()
        for field in ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail"):
            setattr(reply, field, getattr(found, field))
        reply.f_namemax = found.f_namemax
        return reply

    # -- files ---------------------------------------------------------------------------------------------------

    @answered
    async def open(self, number: int, flags: int, ctx: RequestContext) -> FileInfo:
        node = self.parts.control.get(number)
        if node is not None:
            return self._open_control(node, flags)
        inode = self._inode(number)
        fd, opened = await self.parts.attributes.open(
            inode, flags, may_read_too=self.parts.writer.writeback is not None
        )
        file = self.parts.files.add(inode, fd, opened)
        if flags & os.O_TRUNC:
            try:
                with file.borrowed() as fd:
                    await self.parts.attributes.truncate(inode, 0, fd if file.writable else None)
            except OSError:
                await self._close(file.number)
                raise
        return _direct(file.number)

    def _open_control(self, node: Node, flags: int) -> FileInfo:
        writes = flags & os.O_ACCMODE != os.O_RDONLY
        reads = flags & os.O_ACCMODE != os.O_WRONLY
        if (writes and node.write is None) or (reads and node.read is None):
            raise PermissionError(errno.EACCES, "")
        number = self.parts.files.new_number()
        self._controls[number] = OpenControl(node, node.read() if reads and node.read else b"")
        return _direct(number)

    @answered
    async def create(
        self, parent: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        if self.parts.writer.writeback is not None and flags & os.O_ACCMODE == os.O_WRONLY:
            flags = flags & ~os.O_ACCMODE | os.O_RDWR
        flags &= ~(os.O_APPEND | os.O_DIRECT | os.O_NOCTTY)
        inode, fd = await self.parts.tree.create(self._inode(parent), name, mode, flags, ctx)
        prepare_descriptor(fd)
        file = self.parts.files.add(inode, fd, flags)
        return _direct(file.number), self._remembered(inode)

    async def read(self, fh: int, offset: int, size: int) -> bytes:
        # The hit path is written out: a wrapper around it would cost 0.4 µs of the 7 that a hit may.
        started = time.perf_counter_ns()
        file = self._files.get(fh)
        if file is not None:
            data = self._hit(file, offset, size)
            if data is not None:
                self._read_latency.add(time.perf_counter_ns() - started)
                return data  # type: ignore[return-value]
        return await self._read(fh, offset, size)

    @answered
    async def _read(self, fh: int, offset: int, size: int) -> bytes:
        control = self._controls.get(fh)
        if control is not None:
            return control.data[offset : offset + size]
        return await self.parts.reader.read(self._files[fh], offset, size)  # type: ignore[return-value]

    @answered
    async def write(self, fh: int, offset: int, data: bytes) -> int:
        control = self._controls.get(fh)
        if control is not None:
            assert control.node.write is not None
            try:
                await control.node.write(data)
            except BadControlInput as error:
                log.warning("%s: %s", os.fsdecode(control.node.name), error)
                raise OSError(errno.EINVAL, "") from None
            return len(data)
        return await self.parts.writer.write(self._files[fh], offset, data)

    @answered
    async def flush(self, fh: int) -> None:
        file, writeback = self._files.get(fh), self.parts.writer.writeback
        if file is None or not file.writable:
            return
        inode = file.inode
        if writeback is not None:
            async with inode.lock():
                await writeback.flush(inode)
            writeback.raise_owed(inode)
        if not self.parts.backing.local:  # a network filesystem reports at close what it could not write
            with file.borrowed() as fd:
                await self.parts.backing.meta(lambda: os.close(os.dup(fd)))

    @answered
    async def fsync(self, fh: int, datasync: bool) -> None:
        if fh not in self._controls:
            await self.parts.writer.sync(self._files[fh], data_only=datasync)

    @answered
    async def release(self, fh: int) -> None:
        if self._controls.pop(fh, None) is None:
            await self._close(fh)

    async def _close(self, fh: int) -> None:
        """Close an open file; the last one of an inode takes its mapped pages, and the content of an unlinked file."""
        file, writeback = self._files[fh], self.parts.writer.writeback
        inode = file.inode
        if writeback is not None and inode.dirty and not (inode.unlinked and inode.opens == 1):
            async with inode.lock():
                await writeback.flush(inode)
        self.parts.files.remove(fh)
        if not inode.opens and inode.unlinked:
            self.parts.content.forget(inode)
            if writeback is not None:
                writeback.forget(inode)
        if not inode.opens and inode.readable_opens:
            inode.readable_opens = 0
            self.parts.kernel.forget_pages(inode.number)
        if not file.users and (writeback is None or not writeback.holds(file)):
            await self.parts.backing.meta(os.close, file.fd)
        if not inode.opens and inode.lookups <= 0:
            self.parts.inodes.forget(inode.number, 0)

    # -- directories ---------------------------------------------------------------------------------------------

    @answered
    async def opendir(self, number: int, ctx: RequestContext) -> int:
        fh = self.parts.files.new_number()
        if number == self.parts.control.directory.number:
            return fh  # reads as empty
        inode = self._inode(number)
        self._directories[fh] = OpenDirectory(inode, await self.parts.listings.open(inode))
        return fh

    @answered
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        directory = self._directories.get(fh)
        if directory is None:
            return
        if start_id == 0 and directory.started:  # rewound
            directory.listing = await self.parts.listings.open(directory.inode)
        directory.started = True
        names, position = directory.listing.names, start_id
        while position < len(names) + 2:
            inode = await self._member(directory, position)
            name = names[position - 2] if position >= 2 else (b".", b"..")[position]
            position += 1
            if inode is None:
                continue
            if not pyfuse3.readdir_reply(token, name, self._entry(inode), position):
                return
            if position > 2:  # the kernel counts no lookup for . and ..
                self.parts.inodes.remember(inode)

    async def _member(self, directory: OpenDirectory, position: int) -> Inode | None:
        """Return the inode at a position of a directory: 0 is itself, 1 its parent."""
        if position < 2:
            inode = directory.inode
            if position == 1 and inode.locations:
                inode = inode.locations[0][0]
            if inode.attr is None:
                await self.parts.attributes.get(inode)
            return inode
        entry = await self.parts.listings.entry(directory.inode, directory.listing, position - 2)
        if entry is None:
            return None
        return self.parts.inodes.enter(directory.inode, entry.name, entry.st, entry.started)

    @answered
    async def releasedir(self, fh: int) -> None:
        self._directories.pop(fh, None)

    @answered
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        directory = self._directories.get(fh)
        if directory is not None:
            await self.parts.attributes.sync_directory(directory.inode)


def _direct(number: int) -> FileInfo:
    """Describe an open file to the kernel: its reads come here, and nothing mapped earlier is kept."""
    return FileInfo(fh=pyfuse3.FileHandleT(number), direct_io=True, keep_cache=False)


def _attributes(st: os.stat_result, number: int) -> EntryAttributes:
    entry = EntryAttributes()
    entry.st_ino = pyfuse3.InodeT(number)
    entry.st_mode = pyfuse3.ModeT(st.st_mode)
    entry.st_nlink = st.st_nlink
    entry.st_uid = st.st_uid
    entry.st_gid = st.st_gid
    entry.st_rdev = st.st_rdev if stat.S_ISCHR(st.st_mode) or stat.S_ISBLK(st.st_mode) else 0
    entry.st_size = st.st_size
    entry.st_blksize = st.st_blksize
    entry.st_blocks = st.st_blocks
    entry.st_atime_ns = st.st_atime_ns
    entry.st_mtime_ns = st.st_mtime_ns
    entry.st_ctime_ns = st.st_ctime_ns
    return entry
