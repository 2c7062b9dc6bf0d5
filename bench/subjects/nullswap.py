"""The floor of swap through FUSE: a pyfuse3 filesystem with one file that is a piece of memory and nothing else.

python -m bench.subjects.nullswap MOUNTPOINT SIZE
"""

from __future__ import annotations

import argparse
import mmap
import os
import stat

import pyfuse3
import trio

from bench.subjects.nullfs import NullOperations, serve
from tmemfs import processmemory
from tmemfs.kernel import eager

SWAP = 5
NAME = b"swap"


class NullSwap(NullOperations):
    """Answer from a mapping, and write into it."""

    def __init__(self, size: int) -> None:
        super().__init__(0, 0, 0.0)
        self._memory = mmap.mmap(-1, size)
        self._size = size
        self._numbers[NAME] = SWAP

    def _entry(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = super()._entry(inode)
        if inode == SWAP:
            entry.st_size = self._size
            entry.st_mode = pyfuse3.ModeT(stat.S_IFREG | 0o600)
        return entry

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        """Answer with a slice."""
        return self._memory[off : off + size]

    async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
        """Copy."""
        self._memory[off : off + len(buf)] = buf
        return len(buf)

    async def fsync(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        """Hold nothing back."""


def main() -> None:
    """Mount and serve, from memory that is not swapped out to itself."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mountpoint")
    parser.add_argument("size", type=int)
    asked = parser.parse_args()
    processmemory.lock_process_memory()
    eager.install()
    os.umask(0)
    pyfuse3.init(NullSwap(asked.size), asked.mountpoint, {"fsname=nullswap", "default_permissions"})
    try:
        trio.run(serve)
    finally:
        pyfuse3.close()


if __name__ == "__main__":
    main()
