"""Serve a null filesystem: pyfuse3 answers from memory, and nothing else is done. Measures compare with it.

Two files have the same bytes: `view` answers a read with a slice of a memoryview (no copy), `bytes` with a slice of the
bytes object (one copy). They are opened with direct I/O, as in tmemfs. The root lists `--names` further empty files;
attributes may be cached for `--attr-timeout` seconds. `--eager` reads requests as tmemfs does (`tmemfs.kernel.eager`).
`--swap` serves one file in memory, to swap to, instead.

    python -m bench.subjects.nullfs MOUNTPOINT [--size BYTES] [--names N] [--attr-timeout SECONDS] [--eager]
    python -m bench.subjects.nullfs MOUNTPOINT --swap BYTES
"""

from __future__ import annotations

import argparse
import errno
import mmap
import os
import random
import signal
import stat

import pyfuse3
import trio

from tmemfs import processmemory
from tmemfs.kernel import eager

VIEW, BYTES, SWAP, FIRST_NAME = 2, 3, 4, 16
SEED = 1


class NullOperations(pyfuse3.Operations):
    """Answer every request from memory."""

    enable_acl = True

    def __init__(self, size: int, names: int, attr_timeout: float) -> None:
        super().__init__()
        self._bytes = random.Random(SEED).randbytes(size)
        self._view = memoryview(self._bytes)
        self._attr_timeout = attr_timeout
        self._numbers = {b"view": VIEW, b"bytes": BYTES}
        self._numbers |= {b"%06d" % number: FIRST_NAME + number for number in range(names)}
        self._created = 1 << 40  # inode number of the newest created file
        self._listing = [(name, self._entry(number)) for name, number in self._numbers.items()]

    def _entry(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(inode)
        entry.attr_timeout = entry.entry_timeout = self._attr_timeout
        entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
        directory = inode == pyfuse3.ROOT_INODE
        entry.st_mode = pyfuse3.ModeT(stat.S_IFDIR | 0o755 if directory else stat.S_IFREG | 0o644)
        entry.st_nlink = 2 if directory else 1
        entry.st_size = len(self._bytes) if inode in (VIEW, BYTES) else 0
        return entry

    async def getattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext | None = None
    ) -> pyfuse3.EntryAttributes:
        """Return the attributes of an inode."""
        return self._entry(inode)

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Return the attributes of a name in the root."""
        number = self._numbers.get(name)
        if number is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._entry(number)

    async def open(self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Open with direct I/O."""
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(inode), direct_io=True, keep_cache=False)

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        """Return a slice."""
        if fh == VIEW:
            return self._view[off : off + size]  # type: ignore[return-value]  # pyfuse3 takes any buffer
        return self._bytes[off : off + size]

    async def opendir(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileHandleT:
        """Open the root."""
        return pyfuse3.FileHandleT(inode)

    async def readdir(self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """List the root."""
        for number in range(start_id, len(self._listing)):
            name, entry = self._listing[number]
            if not pyfuse3.readdir_reply(token, pyfuse3.FileNameT(name), entry, number + 1):
                return

    async def getxattr(self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, ctx: pyfuse3.RequestContext) -> bytes:
        """Return no attribute: there are none."""
        raise pyfuse3.FUSEError(pyfuse3.ENOATTR)

    async def create(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        mode: pyfuse3.ModeT,
        flags: pyfuse3.FlagT,
        ctx: pyfuse3.RequestContext,
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        """Create an empty file."""
        self._created += 1
        self._numbers[name] = self._created
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(self._created), direct_io=True, keep_cache=False), self._entry(
            self._created
        )

    async def unlink(self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext) -> None:
        """Remove a created file."""
        del self._numbers[name]

    async def flush(self, fh: pyfuse3.FileHandleT) -> None:
        """Do nothing: there is no buffer."""

    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        """Do nothing: a handle has no state."""

    async def releasedir(self, fh: pyfuse3.FileHandleT) -> None:
        """Do nothing: a handle has no state."""

    async def forget(self, inode_list: object) -> None:
        """Do nothing: there is no table of inodes."""


class NullSwap(NullOperations):
    """Serve one file that is a private mapping."""

    def __init__(self, size: int) -> None:
        super().__init__(0, 0, 0.0)
        self._memory = mmap.mmap(-1, size)
        self._size = size
        self._numbers[b"swap"] = SWAP

    def _entry(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = super()._entry(inode)
        if inode == SWAP:
            entry.st_size = self._size
            entry.st_mode = pyfuse3.ModeT(stat.S_IFREG | 0o600)
        return entry

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        """Return a slice."""
        return self._memory[off : off + size]

    async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
        """Copy into the mapping."""
        self._memory[off : off + len(buf)] = buf
        return len(buf)

    async def fsync(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        """Do nothing: there is no buffer."""


async def serve() -> None:
    """Serve until a signal asks for the end or somebody unmounts."""
    async with trio.open_nursery() as nursery:

        async def obey() -> None:
            with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                async for _ in signals:
                    pyfuse3.terminate()
                    return

        nursery.start_soon(obey)
        await pyfuse3.main()
        nursery.cancel_scope.cancel()


def main() -> None:
    """Mount and serve."""
    parser = argparse.ArgumentParser(description="Serve a null filesystem.")
    parser.add_argument("mountpoint")
    parser.add_argument("--size", type=int, default=64 << 20)
    parser.add_argument("--names", type=int, default=0)
    parser.add_argument("--attr-timeout", type=float, default=1.0)
    parser.add_argument("--swap", type=int, default=0, metavar="BYTES", help="serve one file to swap to")
    parser.add_argument("--eager", action="store_true", help="read requests as tmemfs does")
    arguments = parser.parse_args()
    if arguments.eager or arguments.swap:
        eager.install()
    if arguments.swap:
        processmemory.lock_process_memory()
        os.umask(0)
        operations: NullOperations = NullSwap(arguments.swap)
    else:
        operations = NullOperations(arguments.size, arguments.names, arguments.attr_timeout)
    pyfuse3.init(operations, arguments.mountpoint, {"fsname=nullfs", "default_permissions"})
    try:
        trio.run(serve)
    finally:
        pyfuse3.close()


if __name__ == "__main__":
    main()
