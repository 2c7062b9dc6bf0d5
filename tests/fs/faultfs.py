"""A backing that fails on command: a small pyfuse3 filesystem over a directory, run as a program.

    python faultfs.py DIRECTORY MOUNTPOINT FAULTS

FAULTS is a file with one fault a line, `operation name effect`: the operation is read, write, open,
stat, fsync, flush or any; the name is a file's, or *; the effect is an errno, `hang`, `slow`, or `seconds` (as
`stat * seconds`: all times are whole seconds). The file is read before every request. A hanging request goes on when
its line is removed. The program prints `ready` once it is mounted.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Sequence

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileHandleT, FileInfo, FUSEError, InodeT, ModeT

CHANGES = ("mode", "uid", "gid", "size", "atime", "mtime")


class FaultFs(pyfuse3.Operations):
    """Serve one flat directory, with the faults of the file."""

    def __init__(self, directory: str, faults: str) -> None:
        super().__init__()
        self.directory = directory
        self.faults = faults
        self.names: dict[int, str] = {pyfuse3.ROOT_INODE: "."}
        self.open_names: dict[int, str] = {}

    def _read_faults(self) -> list[list[str]]:
        with open(self.faults) as file:
            return [line.split() for line in file if line.strip()]

    async def _apply_faults(self, operation: str, name: str) -> None:
        while True:
            found = [
                effect
                for faulty, target, effect in self._read_faults()
                if faulty in (operation, "any") and target in (name, "*") and effect != "seconds"
            ]
            if not found:
                return
            if found[0] == "slow":
                await trio.sleep(0.02)
                return
            if found[0] != "hang":
                raise FUSEError(getattr(errno, found[0]))
            await trio.sleep(0.02)

    def _path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def _stat(self, name: str) -> os.stat_result:
        try:
            return os.lstat(self._path(name))
        except FileNotFoundError:
            for fd, opened in self.open_names.items():  # unlinked while open
                if opened == name and os.fstat(fd).st_nlink == 0:
                    return os.fstat(fd)
            raise

    def _describe(self, name: str) -> EntryAttributes:
        try:
            st = self._stat(name)
        except OSError as error:
            raise FUSEError(error.errno or errno.EIO) from None
        entry = EntryAttributes()
        root = name == "."
        coarse = ["stat", "*", "seconds"] in self._read_faults()
        entry.st_ino = InodeT(pyfuse3.ROOT_INODE if root else st.st_ino)
        if not root:
            self.names[st.st_ino] = name
        entry.st_mode = ModeT(st.st_mode)
        for field in ("nlink", "uid", "gid", "size", "blksize", "blocks", "atime_ns", "mtime_ns", "ctime_ns"):
            value = getattr(st, f"st_{field}")
            setattr(entry, f"st_{field}", value - value % 1_000_000_000 if coarse and field.endswith("_ns") else value)
        entry.attr_timeout = entry.entry_timeout = 0
        return entry

    async def lookup(self, parent_inode: InodeT, name: bytes, ctx: pyfuse3.RequestContext) -> EntryAttributes:
        await self._apply_faults("stat", os.fsdecode(name))
        if not os.path.lexists(self._path(os.fsdecode(name))):  # it may still be open, until its release arrives
            raise FUSEError(errno.ENOENT)
        return self._describe(os.fsdecode(name))

    async def getattr(self, inode: InodeT, ctx: pyfuse3.RequestContext | None = None) -> EntryAttributes:
        await self._apply_faults("stat", self.names[inode])
        return self._describe(self.names[inode])

    async def setattr(
        self,
        inode: InodeT,
        attr: EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: FileHandleT | None,
        ctx: pyfuse3.RequestContext,
    ) -> EntryAttributes:
        path = self._path(self.names[inode])
        await self._apply_faults("write", self.names[inode])
        if fields.update_size:
            os.truncate(path, attr.st_size)
        if fields.update_mode:
            os.chmod(path, stat.S_IMODE(attr.st_mode))
        if fields.update_mtime or fields.update_atime:
            st = os.stat(path)
            times = (
                attr.st_atime_ns if fields.update_atime else st.st_atime_ns,
                attr.st_mtime_ns if fields.update_mtime else st.st_mtime_ns,
            )
            os.utime(path, ns=times)
        return self._describe(self.names[inode])

    async def open(self, inode: InodeT, flags: int, ctx: pyfuse3.RequestContext) -> FileInfo:
        await self._apply_faults("open", self.names[inode])
        fd = os.open(self._path(self.names[inode]), flags & ~(os.O_CREAT | os.O_EXCL | os.O_TRUNC))
        self.open_names[fd] = self.names[inode]
        return FileInfo(fh=FileHandleT(fd), direct_io=True)

    async def create(
        self, parent_inode: InodeT, name: bytes, mode: ModeT, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        await self._apply_faults("open", os.fsdecode(name))
        fd = os.open(self._path(os.fsdecode(name)), flags | os.O_CREAT, mode)
        self.open_names[fd] = os.fsdecode(name)
        return FileInfo(fh=FileHandleT(fd), direct_io=True), self._describe(os.fsdecode(name))

    async def unlink(self, parent_inode: InodeT, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        os.unlink(self._path(os.fsdecode(name)))

    async def rename(
        self,
        parent_inode_old: InodeT,
        name_old: bytes,
        parent_inode_new: InodeT,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        old, new = os.fsdecode(name_old), os.fsdecode(name_new)
        os.rename(self._path(old), self._path(new))
        self._describe(new)

    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        await self._apply_faults("read", self.open_names[fh])
        return os.pread(fh, size, off)

    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        await self._apply_faults("write", self.open_names[fh])
        return os.pwrite(fh, buf, off)

    async def flush(self, fh: FileHandleT) -> None:
        await self._apply_faults("flush", self.open_names[fh])

    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        await self._apply_faults("fsync", self.open_names[fh])

    async def release(self, fh: FileHandleT) -> None:
        self.open_names.pop(fh, None)
        os.close(fh)

    async def opendir(self, inode: InodeT, ctx: pyfuse3.RequestContext) -> FileHandleT:
        return FileHandleT(inode)

    async def readdir(self, fh: FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        await self._apply_faults("stat", ".")
        for position, name in enumerate(sorted(os.listdir(self.directory))[start_id:], start_id + 1):
            if not pyfuse3.readdir_reply(token, os.fsencode(name), self._describe(name), position):
                return

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        """Do nothing: there are few names."""

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        reply = pyfuse3.StatvfsData()
        reply.f_bsize = reply.f_frsize = 4096
        reply.f_namemax = 255
        return reply


def run() -> None:
    directory, mountpoint, faults = sys.argv[1:]
    options = set(pyfuse3.default_options) | {"fsname=faultfs"}
    pyfuse3.init(FaultFs(directory, faults), mountpoint, options)
    print("ready", flush=True)
    try:
        trio.run(pyfuse3.main, 50, 600)
    finally:
        pyfuse3.close()


if __name__ == "__main__":
    run()
