"""The parts of a guest with a watch on real inotify, and a kernel that records its invalidations."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from tests.guestparts import Parts, SilentKernel
from tmemfs.backing import Backing
from tmemfs.inodes.inode import Inode
from tmemfs.namespace.namespace import Namespace
from tmemfs.watching.watch import Watch

SECONDS = 30.0


class Kernel(SilentKernel):
    """A kernel that records the invalidations."""

    def __init__(self, backing: Backing) -> None:
        super().__init__(backing)
        self.names: list[tuple[int, bytes]] = []

    def was_told_of(self, inode: Inode) -> bool:
        """Return whether the attributes of an inode were invalidated."""
        return inode.number in self.invalidated

    def invalidate_name(self, number: int, name: bytes) -> None:
        if name != b"/":
            self.names.append((number, name))


class Watched(Parts):
    """A guest's parts with a watch, on real inotify."""

    kernel: Kernel
    watch: Watch

    def __init__(self, directory: Path, **more: Any) -> None:
        super().__init__(directory, attr_timeout=60.0, watch=True, kernel=Kernel, **more)
        namespace = Namespace(self)
        self.tree, self.listings = namespace.tree, namespace.listings

    async def find(self, *names: str) -> Inode:
        """Look a path up, as the kernel does."""
        inode = self.inodes.root
        for name in names:
            found = await self.tree.lookup(inode, os.fsencode(name))
            assert found is not None, name
            inode = found
            self.inodes.add_lookup(inode)
        return inode

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Run the watch for the block."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.watch.run)
            yield
            self.watch.check()
            self.inodes.check()
            nursery.cancel_scope.cancel()

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until a condition holds."""
        with trio.fail_after(SECONDS):
            while not condition():
                await trio.sleep(0.002)

    async def settled(self) -> None:
        """Wait until all earlier events are handled: events of one directory come in order."""
        assert self.inodes.root.watch > 0, "nothing was looked up"
        entry, marker = (self.inodes.root.number, b".marker"), self.directory / ".marker"
        for change in (marker.touch, marker.unlink):
            change()
            await self.until(lambda: entry in self.kernel.names and not self.watch._busy)
            self.kernel.names = [pair for pair in self.kernel.names if pair != entry]
