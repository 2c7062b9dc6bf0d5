"""A call on a local backing that waits for its disk does not block hits and stats of cached names."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio

from tests.guestparts import Caller, MakeParts, Parts, make_parts
from tests.pagebytes import MIB, pages_of
from tmem.arena import PAGE_SIZE
from tmemfs import nowait
from tmemfs.inodes.cachedstats import CachedStats
from tmemfs.inodes.inode import Inode
from tmemfs.io.files import OpenFile
from tmemfs.namespace.attributes import AttributeChanges
from tmemfs.namespace.listing import BATCH
from tmemfs.namespace.namespace import Namespace

__all__ = ["make_parts"]

SECONDS = 30.0
Operation = Callable[[], Awaitable[object]]


class Operand:
    """A file, and the parts that operate on it."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.file = parts.make("file", pages_of(1, 8))
        namespace = Namespace(parts)
        self.tree, self.attributes = namespace.tree, namespace.attributes
        self.opener, self.listings = namespace.opener, namespace.listings

    @property
    def inode(self) -> Inode:
        return self.file.inode

    @property
    def root(self) -> Inode:
        return self.parts.inodes.root


async def close_last(operand: Operand) -> None:
    """Close and forget an unlinked file with a pinned descriptor."""
    parts = operand.parts
    os.unlink(parts.directory / "file")
    parts.inodes.record_unlink(operand.inode, 0)
    file = parts.files.remove(operand.file.number)
    os.closerange(file.fd, file.fd + 1)  # os.close is the call that the test holds
    parts.inodes.forget(operand.inode.number, operand.inode.lookups)


async def list_all(operand: Operand) -> None:
    listing = await operand.listings.open(operand.root)
    await operand.listings.entry(operand.root, listing, len(listing.names) - 1)


# Each operation with the system call in which it waits.
OPERATIONS: dict[str, tuple[str, Callable[[Operand], Awaitable[object]]]] = {
    "lookup": ("stat", lambda operand: operand.tree.lookup(operand.root, b"cold")),
    "getattr": ("fstat", lambda operand: operand.attributes.stat(operand.inode)),
    "listing": ("scandir", list_all),
    "attributes of a listing": ("stat", list_all),
    "open": ("open", lambda operand: operand.opener.open(operand.inode, os.O_RDONLY, Caller(0, 0))),
    "chmod": ("chmod", lambda operand: operand.attributes.set(operand.inode, AttributeChanges(mode=0o600))),
    "truncate": ("ftruncate", lambda operand: operand.attributes.truncate(operand.inode, 0, operand.file.fd)),
    "unlink": ("unlink", lambda operand: operand.tree.unlink(operand.root, b"file")),
    "last close": ("close", close_last),
    "create": ("open", lambda operand: operand.tree.create(operand.root, b"new", 0o600, os.O_RDWR, Caller(0, 0))),
    "rename": ("rename", lambda operand: operand.tree.rename(operand.root, b"file", operand.root, b"other", 0)),
    "getxattr": ("getxattr", lambda operand: operand.attributes.getxattr(operand.inode, b"user.x")),
    "statfs": ("statvfs", lambda operand: operand.attributes.statfs()),
    "a large read": ("preadv", lambda operand: operand.parts.reader.read(operand.file, 0, 8 * PAGE_SIZE)),
    "dropping what was read": ("posix_fadvise", lambda operand: operand.parts.reader.read(operand.file, 0, PAGE_SIZE)),
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

    async def do(operand: Operand) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, name, slow)
            with contextlib.suppress(OSError):  # getxattr: there is no such attribute
                result = await operation(operand)
            while not go_on.is_set():
                await trio.sleep(0.001)
        if what == "create":
            opened.append(result[1])  # type: ignore[index]

    async def main() -> None:
        operand = Operand(parts)
        warm = parts.make("warm", pages_of(2, 4))
        await parts.reader.read(warm, 0, 4 * PAGE_SIZE)
        parts.inodes.expire(operand.inode)
        monkeypatch.setattr(nowait, "stat_name", not_in_memory)
        if what == "getattr":
            monkeypatch.setattr(CachedStats, "cached_inode", not_in_memory)
        elif what == "last close":
            parts.descriptors.pin(operand.inode, os.open(parts.directory / "file", os.O_PATH))
        with trio.fail_after(SECONDS):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(do, operand)
                while not begun.is_set():
                    await trio.sleep(0.001)
                hit_and_stat(parts, warm)
                go_on.set()
        parts.descriptors.closer.finish(SECONDS)

    trio.run(main)
    for fd in opened:
        os.close(fd)


def hit_and_stat(parts: Parts, warm: OpenFile) -> None:
    """Read a cached page and find cached attributes, without an await."""
    assert bytes(parts.reader.hit(warm, PAGE_SIZE, PAGE_SIZE) or b"") == pages_of(2, 4)[PAGE_SIZE : 2 * PAGE_SIZE]
    assert warm.inode.attr is not None
