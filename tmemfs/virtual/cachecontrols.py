"""Controls of the cache and the pool of a running guest: resize, drop, freeze, and count the pages in memory."""

from __future__ import annotations

import contextlib
import errno
import os

import trio

from tmem import Tmem
from tmemcommon.sizes import ConfigError, parse_size
from tmemfs.config import check_cache_bytes
from tmemfs.datapath import DataPath
from tmemfs.fuse.virtualfiles import InvalidInput
from tmemfs.inodes.inode import Inode
from tmemfs.namespace.tree import Tree
from tmemfs.virtual.controlfiles import ControlFiles

INODES_PER_STEP = 1024  # files dropped between two checkpoints
LOOKUP_SECONDS = 10.0  # the longest wait for one lookup, for a backing that hangs


class CacheControls:
    """The control files `cache_size`, `drop_caches`, `freeze` and the query `held_pages` of one guest."""

    def __init__(self, files: ControlFiles, data: DataPath, tree: Tree, tmem: Tmem) -> None:
        self._data = data
        self._tree = tree
        self._tmem = tmem
        files.add_control("cache_size", lambda: str(data.memory.capacity), self._resize)
        files.add_control("drop_caches", None, self._drop)
        files.add_control("freeze", lambda: str(int(tmem.frozen)), self._freeze)
        files.add_query("held_pages", self._held_pages)

    async def _resize(self, data: bytes) -> None:
        """Set the cache's size."""
        try:
            size = parse_size(data.decode(errors="replace"))
            check_cache_bytes(size)
        except ConfigError as error:
            raise InvalidInput(str(error)) from None
        await self._data.resize(size)

    async def _freeze(self, data: bytes) -> None:
        """Freeze the pools (`1`) or thaw them (`0`). A frozen pool accepts no new pages."""
        word = data.strip()
        if word not in (b"0", b"1"):
            raise InvalidInput("the digit to write is 1 (freeze) or 0 (thaw)")
        if not self._tmem.has_pool:
            raise InvalidInput("it has no pool to freeze: mount it with --pool SIZE")
        (self._tmem.freeze if word == b"1" else self._tmem.thaw)()

    async def _drop(self, data: bytes) -> None:
        """Drop the clean pages of all files (`1` or an empty line), or of one file by its path in the mount."""
        path = data.removesuffix(b"\n")
        if path == b"1" or path.strip(b"/") in (b"", b"."):
            for count, inode in enumerate(self._data.inodes.all(), 1):
                inode.file.drop_clean()
                if count % INODES_PER_STEP == 0:
                    await trio.lowlevel.checkpoint()
        else:
            found = await self._find(path)
            if found is None:
                raise InvalidInput(f"there is no file '{os.fsdecode(path)}'")
            found.file.drop_clean()
            self._data.inodes.forget(found.number, 0)  # frees the inode if the kernel does not know it
        await self._data.memory.free_dropped()

    async def _held_pages(self, data: bytes) -> bytes:
        """Return how many pages of some files are in memory. `data`: their paths in the mount, each ended by a NUL."""
        pages = 0
        for path in data.split(b"\0")[:-1]:
            inode = await self._find(path)
            if inode is not None:
                pages += inode.file.held_pages()
                self._data.inodes.forget(inode.number, 0)
        return b"%d" % pages

    async def _find(self, path: bytes) -> Inode | None:
        """Return the inode of a path in the mount; links are not followed. Raise TimeoutError if the backing hangs."""
        inode = self._data.inodes.root
        for name in path.strip(b"/").split(b"/"):
            if name in (b"", b".", b"..") or b"\0" in name:
                return None
            found = None
            with trio.move_on_after(LOOKUP_SECONDS) as looking, contextlib.suppress(OSError):
                found = await self._tree.lookup(inode, name)
            if looking.cancelled_caught:
                raise TimeoutError(errno.ETIMEDOUT, "the backing does not answer")
            if found is None:
                return None
            inode = found
        return inode
