"""List directories. All names are read in one scan, the attributes BATCH at a time as the reader advances.

So the first screen of `ls` in a directory of 100,000 entries does not wait for the attributes of the last. A listing is
shared by all readers within the attribute time-out. It is dropped by each change of our own in the directory or to one
of its files, and by an open that finds the times of the directory changed. If the directory had changed just before it
was listed, equal times prove nothing (`stamps.py`); then the next open drops the listing.
"""

from __future__ import annotations

import itertools
import os
import time
from typing import Any, NamedTuple

import trio

from tmemfs.backing import Backing
from tmemfs.inodes.inode import Inode
from tmemfs.inodes.inodes import InodeTable

BATCH = 256  # names whose attributes are read in one call


Version = tuple[int, int]  # mtime and ctime of a directory


class Entry(NamedTuple):
    """A name and its stat; `started` is the tick before the stat."""

    name: bytes
    st: os.stat_result
    started: int


class Listing:
    """A snapshot of the names of a directory, with the attributes read so far."""

    __slots__ = ("entries", "made", "names", "replies", "statted", "version")

    def __init__(self, names: list[bytes], version: Version | None, made: float) -> None:
        self.names = names
        self.version = version  # None: a later change by others might leave the same times
        self.made = made
        self.entries: list[Entry | None] = []  # None: removed before its attributes were read
        self.statted = 0
        # By position: the inode, its `stat_seq`, and the reply that was sent.
        self.replies: list[tuple[Inode, int, Any] | None] = [None] * len(names)

    def add(self, stats: list[os.stat_result | None], started: int) -> None:
        """Add the stats of the next names; `started` is the tick before them."""
        names = self.names[self.statted : self.statted + len(stats)]
        self.entries.extend(
            None if st is None else Entry(name, st, started) for name, st in zip(names, stats, strict=True)
        )
        self.statted += len(stats)


class Listings:
    """The cached directory listings of one guest."""

    def __init__(self, backing: Backing, inodes: InodeTable) -> None:
        self._backing = backing
        self._inodes = inodes
        self._descriptors = inodes.descriptors
        self._cached: dict[Inode, float] = {}  # directory: when its listing was made, the oldest first

    async def open(self, directory: Inode) -> Listing:
        """Return a listing that is no older than the attribute time-out."""
        await self._inodes.ensure_watched(directory)
        self._expire(trio.current_time() - self._inodes.attr_timeout)
        cached = directory.listing
        if isinstance(cached, Listing):
            return cached
        started = self._inodes.start()
        made, wall = trio.current_time(), time.time_ns()
        names, st, stats = await self._backing.meta(self._scan, directory)
        listing = Listing(names, _version(st) if self._inodes.is_settled(st, made, wall) else None, made)
        listing.add(stats, started)
        if directory.file.stat_seq <= started:  # else we changed the directory during the scan
            directory.listing = listing
            self._cached.pop(directory, None)
            self._cached[directory] = made
        return listing

    def compare(self, directory: Inode, st: os.stat_result) -> None:
        """Drop the cached listing if the directory may have changed since."""
        cached = directory.listing
        if isinstance(cached, Listing) and cached.version != _version(st):
            directory.listing = None

    def _expire(self, until: float) -> None:
        """Drop the listings made before a time: a walk of a tree leaves one in each directory."""
        for directory, _ in list(itertools.takewhile(lambda item: item[1] <= until, self._cached.items())):
            del self._cached[directory]
            directory.listing = None

    def _scan(self, directory: Inode) -> tuple[list[bytes], os.stat_result, list[os.stat_result | None]]:
        """Return the names, the stat of the directory just before, and the stats of the first names."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        fd = self._descriptors.call(directory, lambda path_fd: os.open(f"/proc/self/fd/{path_fd}", flags))
        try:
            st = os.fstat(fd)
            with os.scandir(fd) as entries:
                names = [os.fsencode(entry.name) for entry in entries]
            return names, st, [_stat_or_none(fd, name) for name in names[:BATCH]]
        finally:
            os.close(fd)

    async def entry(self, directory: Inode, listing: Listing, position: int) -> Entry | None:
        """Return the entry at a position below len(names); None if it was removed."""
        while position >= listing.statted:
            begin = listing.statted
            names = listing.names[begin : begin + BATCH]
            started = self._inodes.start()
            stats = await self._backing.meta(self._stat_all, directory, names)
            if listing.statted != begin:
                continue  # another reader has added them
            listing.add(stats, started)
        return listing.entries[position]

    def _stat_all(self, directory: Inode, names: list[bytes]) -> list[os.stat_result | None]:
        with self._descriptors.use(directory) as fd:
            return [_stat_or_none(fd, name) for name in names]


def _version(st: os.stat_result) -> Version:
    return st.st_mtime_ns, st.st_ctime_ns


def _stat_or_none(fd: int, name: bytes) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=fd, follow_symlinks=False)
    except FileNotFoundError:
        return None
