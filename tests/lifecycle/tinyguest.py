"""A minimal guest: one file in memory, and one whose reads hang.

Run as a program, it is the command line of tmemfs with this guest in place of the real one. So the tests of the
lifecycle do not depend on the rest of the project.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pyfuse3
import trio

import tmemfs.lifecycle.mount
from tmemfs.cli import main
from tmemfs.config import MountConfig
from tmemfs.stats import Stats
from tmemfs.virtual.controlfiles import ControlFiles

FILE_BYTES = 1 << 16
DATA, HANG, CONTROL, CONFIG = 2, 3, 4, 5
_NAMES = {
    (pyfuse3.ROOT_INODE, b"data"): DATA,
    (pyfuse3.ROOT_INODE, b"hang"): HANG,
    (pyfuse3.ROOT_INODE, b".tmemfs"): CONTROL,
    (CONTROL, b"config"): CONFIG,
}


class TinyOperations(pyfuse3.Operations):
    """Serves the two files and a control file with the pid."""

    enable_acl = True

    def __init__(self) -> None:
        super().__init__()
        self.content = bytearray(b"tiny" * (FILE_BYTES // 4))
        self.modes: list[int] = []

    async def getattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext | None = None
    ) -> pyfuse3.EntryAttributes:
        """Return the attributes of an inode."""
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.attr_timeout = entry.entry_timeout = 1
        entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
        if inode in (pyfuse3.ROOT_INODE, CONTROL):
            entry.st_mode = pyfuse3.ModeT(stat.S_IFDIR | 0o755)
            entry.st_nlink = 2
        else:
            entry.st_mode = pyfuse3.ModeT(stat.S_IFREG | 0o644)
            entry.st_size = FILE_BYTES
        return entry

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Find a name."""
        inode = _NAMES.get((parent_inode, name))
        if inode is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(pyfuse3.InodeT(inode), ctx)

    async def open(self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Open with direct I/O, as the real guest does."""
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(inode), direct_io=True, keep_cache=False)

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        """Read, or hang."""
        if fh == HANG:
            await trio.sleep_forever()
        if fh == CONFIG:
            return b"pid   %d\n" % os.getpid() if off == 0 else b""
        return bytes(self.content[off : off + size])

    async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
        """Write into memory."""
        self.content[off : off + len(buf)] = buf
        return len(buf)

    async def forget(self, inode_list: object) -> None:
        """Do nothing: there is no table of inodes."""


class TinyGuest:
    """Assembles the tiny filesystem; `finish` writes the file to SOURCE/written."""

    def __init__(self, config: MountConfig, source_fd: int) -> None:
        self.operations = TinyOperations()
        self.control = ControlFiles(config.control_name, Stats(), lambda: {"pid": os.getpid()})
        self._source_fd = source_fd

    def connect(self) -> None:
        """Do nothing: there is no tmemd."""

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run one background task."""
        task_status.started()
        await trio.sleep_forever()

    def close(self) -> None:
        """Do nothing: there is nothing to close."""

    async def finish(self) -> None:
        """Write back through the descriptor, which also works under a mount over SOURCE."""
        written = Path(f"/proc/self/fd/{self._source_fd}/written")
        written.write_bytes(bytes(self.operations.content))


if __name__ == "__main__":
    vars(tmemfs.lifecycle.mount)["Guest"] = TinyGuest
    main()
