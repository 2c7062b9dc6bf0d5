"""The parts of a guest with a watch on real inotify, and a kernel that remembers what it was asked to forget."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from tests.guestparts import Parts
from tmemfs.inodes.inode import Inode
from tmemfs.kernel.kernelcache import KernelCache
from tmemfs.namespace.listing import Listings
from tmemfs.namespace.tree import Tree
from tmemfs.watching.watch import Watch

SECONDS = 30.0


class Kernel(KernelCache):
    """The kernel's side, which remembers what it was asked to forget."""

    def __init__(self) -> None:
        self.attributes: list[int] = []
        self.names: list[tuple[int, bytes]] = []

    def invalidate_attributes(self, number: int) -> None:
        self.attributes.append(number)

    def was_told_of(self, inode: Inode) -> bool:
        """Tell whether the attributes of an inode were to be forgotten."""
        return inode.number in self.attributes

    def invalidate_pages(self, number: int) -> None:
        raise AssertionError("only the guest asks for that")

    def invalidate_name(self, number: int, name: bytes) -> None:
        if name != b"/":
            self.names.append((number, name))


class Watched(Parts):
    """A guest's parts with a watch, on real inotify."""

    def __init__(self, directory: Path, **more: Any) -> None:
        super().__init__(directory, attr_timeout=60.0, **more)
        self.kernel = Kernel()
        self.watch = Watch(self.inodes, self.descriptors, self.backing, self.content, self.kernel)
        self.tree = Tree(self.backing, self.inodes)
        self.listings = Listings(self.backing, self.inodes)

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
        """Wait for what an event brings about."""
        with trio.fail_after(SECONDS):
            while not condition():
                await trio.sleep(0.002)

    async def settled(self) -> None:
        """Wait until the events of everything before are used up: those of a directory come in order."""
        assert self.inodes.root.watch > 0, "nothing was looked up"
        news, marker = (self.inodes.root.number, b".marker"), self.directory / ".marker"
        for change in (marker.touch, marker.unlink):
            change()
            await self.until(lambda: news in self.kernel.names and not self.watch._busy)
            self.kernel.names = [pair for pair in self.kernel.names if pair != news]
