"""One call on a local backing that waits for its disk stops nobody: hits and stats of cached names go on."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio

from tests.guestparts import MakeParts, Parts, make_parts
from tests.namespace.test_tree import Caller
from tests.pagebytes import MIB, pages_of
from tmemfs import nowait
from tmemfs.cache.pagecache import PAGE_SIZE
from tmemfs.inodes.inode import Inode
from tmemfs.io.files import OpenFile
from tmemfs.namespace.attributes import Attributes
from tmemfs.namespace.changes import Changes
from tmemfs.namespace.listing import BATCH, Listings
from tmemfs.namespace.revalidate import Revalidator
from tmemfs.namespace.tree import Tree

__all__ = ["make_parts"]

SECONDS = 30.0
Operation = Callable[[], Awaitable[object]]


class World:
    """A file that is read from its cached pages, one to do something with, and what does it."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.file = parts.make("file", pages_of(1, 8))
        self.tree = Tree(parts.backing, parts.inodes, parts.descriptors)
        names = Revalidator(parts.backing, parts.inodes, parts.descriptors)
        self.attributes = Attributes(parts.backing, parts.inodes, parts.descriptors, parts.writer, names)
        self.listings = Listings(parts.backing, parts.inodes, parts.descriptors)

    @property
    def inode(self) -> Inode:
        return self.file.inode

    @property
    def root(self) -> Inode:
        return self.parts.inodes.root


async def close_last(world: World) -> None:
    """Close and forget a file that has no name any more; its descriptor was pinned."""
    parts = world.parts
    os.unlink(parts.directory / "file")
    parts.inodes.unlinked(world.inode, 0)
    file = parts.files.remove(world.file.number)
    os.closerange(file.fd, file.fd + 1)  # os.close is what the test holds
    parts.inodes.forget(world.inode.number, world.inode.lookups)


async def list_all(world: World) -> None:
    listing = await world.listings.open(world.root)
    await world.listings.entry(world.root, listing, len(listing.names) - 1)


# What waits, and in which call.
OPERATIONS: dict[str, tuple[str, Callable[[World], Awaitable[object]]]] = {
    "lookup": ("stat", lambda world: world.tree.lookup(world.root, b"cold")),
    "getattr": ("fstat", lambda world: world.attributes.stat(world.inode)),
    "listing": ("scandir", list_all),
    "attributes of a listing": ("stat", list_all),
    "open": ("open", lambda world: world.attributes.open(world.inode, os.O_RDONLY, 1, may_read_too=False)),
    "chmod": ("chmod", lambda world: world.attributes.set(world.inode, Changes(mode=0o600))),
    "truncate": ("ftruncate", lambda world: world.attributes.truncate(world.inode, 0, world.file.fd)),
    "unlink": ("unlink", lambda world: world.tree.unlink(world.root, b"file")),
    "last close": ("close", close_last),
    "create": ("open", lambda world: world.tree.create(world.root, b"new", 0o600, os.O_RDWR, Caller(0, 0))),
    "rename": ("rename", lambda world: world.tree.rename(world.root, b"file", world.root, b"other", 0)),
    "getxattr": ("getxattr", lambda world: world.attributes.getxattr(world.inode, b"user.x")),
    "statfs": ("statvfs", lambda world: world.attributes.statfs()),
    "a large read": ("preadv", lambda world: world.parts.reader.read(world.file, 0, 8 * PAGE_SIZE)),
    "dropping what was read": ("posix_fadvise", lambda world: world.parts.reader.read(world.file, 0, PAGE_SIZE)),
}


@pytest.mark.parametrize("what", OPERATIONS)
def test_a_call_that_waits_for_the_disk_blocks_no_hit(
    make_parts: MakeParts, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    name, operation = OPERATIONS[what]
    parts = make_parts(threads=True, drop=True, cache=4 * MIB)
    for number in range(BATCH + 10):
        (parts.directory / f"name{number}").touch()
    loop, begun, go_on = threading.get_ident(), threading.Event(), threading.Event()
    call: Callable[..., Any] = getattr(os, name)
    opened: list[int] = []

    def slow(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == loop:
            pytest.fail(f"os.{name} is called in the event loop")
        begun.set()
        go_on.wait(SECONDS)
        return call(*args, **kwargs)

    def not_in_memory(*args: object) -> None:
        raise BlockingIOError

    async def do(world: World) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, name, slow)
            with contextlib.suppress(OSError):  # there is no such attribute
                result = await operation(world)
            while not go_on.is_set():
                await trio.sleep(0.001)
        if what in ("open", "create"):
            opened.append(result[0] if what == "open" else result[1])  # type: ignore[index]

    async def main() -> None:
        world = World(parts)
        warm = parts.make("warm", pages_of(2, 4))
        await parts.reader.read(warm, 0, 4 * PAGE_SIZE)
        parts.inodes.expire(world.inode)
        monkeypatch.setattr(nowait, "stat_name", not_in_memory)
        if what == "getattr":
            monkeypatch.setattr(world.attributes._stats, "cached_inode", not_in_memory)
        elif what == "last close":
            parts.descriptors.pin(world.inode, os.open(parts.directory / "file", os.O_PATH))
        with trio.fail_after(SECONDS):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(do, world)
                while not begun.is_set():
                    await trio.sleep(0.001)
                hit_and_stat(parts, warm)
                go_on.set()
        parts.descriptors.closer.finish(SECONDS)

    trio.run(main)
    for fd in opened:
        os.close(fd)


def hit_and_stat(parts: Parts, warm: OpenFile) -> None:
    """Read a cached page and believe cached attributes, in one stretch."""
    assert bytes(parts.reader.hit(warm, PAGE_SIZE, PAGE_SIZE) or b"") == pages_of(2, 4)[PAGE_SIZE : 2 * PAGE_SIZE]
    assert warm.inode.attr is not None
