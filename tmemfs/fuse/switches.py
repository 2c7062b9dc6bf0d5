"""What control files and control socket change and ask of a running guest: resize, drop, freeze, what is held."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Awaitable, Callable

import trio

from tmem import Tmem
from tmemfs.cache.content import Content
from tmemfs.config import ConfigError, check_cache_bytes, parse_size
from tmemfs.fuse.control import BadControlInput, Control
from tmemfs.inodes.inode import Inode
from tmemfs.inodes.inodes import InodeTable
from tmemfs.namespace.tree import Tree

INODES = 1024  # looked at in one stretch
LOOKUP_SECONDS = 10.0  # that somebody waits for a name of a backing that hangs


class Switches:
    """The verbs of one guest; each raises BadControlInput for what it does not take."""

    def __init__(
        self,
        control: Control,
        content: Content,
        inodes: InodeTable,
        tree: Tree,
        tmem: Tmem | None,
        resize: Callable[[int], Awaitable[None]],
    ) -> None:
        self._content = content
        self._inodes = inodes
        self._tree = tree
        self._tmem = tmem
        self._resize = resize
        control.add_switch("cache_size", lambda: str(content.cache.capacity), self._resize_to)
        control.add_switch("drop_caches", None, self._drop)
        control.add_switch("freeze", lambda: str(int(tmem is not None and tmem.frozen)), self._freeze)
        control.add_query("held_pages", self._held_pages)

    async def _resize_to(self, data: bytes) -> None:
        """Give the cache another size."""
        try:
            size = parse_size(data.decode(errors="replace"))
            check_cache_bytes(size)
        except ConfigError as error:
            raise BadControlInput(str(error)) from None
        await self._resize(size)

    async def _freeze(self, data: bytes) -> None:
        """Freeze the pools (`1`) or thaw them (`0`): what is evicted meanwhile is read from the backing again."""
        word = data.strip()
        if word not in (b"0", b"1"):
            raise BadControlInput("the digit to write is 1 (freeze) or 0 (thaw)")
        if self._tmem is None:
            raise BadControlInput("it has no pool to freeze: mount it with --pool SIZE")
        (self._tmem.freeze if word == b"1" else self._tmem.thaw)()

    async def _drop(self, data: bytes) -> None:
        """Drop the clean pages of everything (`1` or an empty line) or of one file, by its path in the mount."""
        path = data.removesuffix(b"\n")
        if path == b"1" or path.strip(b"/") in (b"", b"."):
            for count, inode in enumerate(self._inodes.known(), 1):
                self._content.renew(inode)
                if count % INODES == 0:
                    await trio.lowlevel.checkpoint()
        else:
            found = await self._find(path)
            if found is None:
                raise BadControlInput(f"there is no file '{os.fsdecode(path)}'")
            self._content.renew(found)
            self._inodes.forget(found.number, 0)  # the kernel may never have asked for it
        await self._content.precache.discards.finish()

    async def _held_pages(self, data: bytes) -> bytes:
        """Count the pages in memory of files, whose paths in the mount end in a NUL each; one that is gone has none."""
        pages = 0
        for path in data.split(b"\0")[:-1]:
            inode = await self._find(path)
            if inode is not None:
                pages += self._content.held_pages(inode)
                self._inodes.forget(inode.number, 0)
        return b"%d" % pages

    async def _find(self, path: bytes) -> Inode | None:
        """Look a path of the mount up, without following links. TimeoutError when the backing does not answer."""
        inode = self._inodes.root
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
