"""List directories: a snapshot of the names at the first read, attributes fetched as the reader advances.

The names of 100,000 entries are one scan; their attributes are read BATCH at a time, so that the first screen of
`ls` does not wait for the last entry. A listing that was made within the attribute time-out serves the next reader
too; every change of our own in the directory or to one of its files drops it, and so does an open that finds the
directory's times changed. An open directory keeps the snapshot that its first read took, until it is rewound.

Equal times prove nothing of a directory that had changed just before it was listed (`stamps.py`). Such a listing serves
nobody after the next open.
"""

from __future__ import annotations

import itertools
import os
import time
from typing import Any, NamedTuple

import trio

from tmemfs.backing import Backing
from tmemfs.inodes.descriptors import Descriptors
from tmemfs.inodes.inode import Inode
from tmemfs.inodes.inodes import InodeTable

BATCH = 256


Version = tuple[int, int]  # times of modification and change of a directory


class Entry(NamedTuple):
    """A name and the attributes of what it leads to, as of tick `started`."""

    name: bytes
    st: os.stat_result
    started: int


class Listing:
    """The names of a directory at one moment."""

    __slots__ = ("entries", "made", "names", "replies", "statted", "version")

    def __init__(self, names: list[bytes], version: Version | None, made: float) -> None:
        self.names = names
        self.version = version  # None: others may change the directory and leave its times as they are
        self.made = made
        self.entries: list[Entry | None] = []  # None: gone before its attributes were read
        self.statted = 0
        # By position: inode, when it was seen, what was said.
        self.replies: list[tuple[Inode, int, Any] | None] = [None] * len(names)

    def add(self, stats: list[os.stat_result | None], started: int) -> None:
        """Take in the stats of the next names, taken from tick `started` on."""
        names = self.names[self.statted : self.statted + len(stats)]
        self.entries.extend(
            None if st is None else Entry(name, st, started) for name, st in zip(names, stats, strict=True)
        )
        self.statted += len(stats)


class Listings:
    """The directory listings of one guest."""

    def __init__(self, backing: Backing, inodes: InodeTable, descriptors: Descriptors) -> None:
        self._backing = backing
        self._inodes = inodes
        self._descriptors = descriptors
        self._kept: dict[Inode, float] = {}  # when the listing of a directory was made, the oldest first

    async def open(self, directory: Inode) -> Listing:
        """Return a listing that is no older than the attribute time-out."""
        await self._inodes.ensure_watched(directory)
        self._let_go(trio.current_time() - self._inodes.attr_timeout)
        kept = directory.listing
        if isinstance(kept, Listing):
            return kept
        started = self._inodes.start()
        made, wall = trio.current_time(), time.time_ns()
        names, st, stats = await self._backing.meta(self._scan, directory)
        listing = Listing(names, _version(st) if self._inodes.is_settled(st, made, wall) else None, made)
        listing.add(stats, started)
        if directory.seen_at <= started:  # else something of our own changed in here meanwhile
            directory.listing = listing
            self._kept.pop(directory, None)
            self._kept[directory] = made
        return listing

    def compare(self, directory: Inode, st: os.stat_result) -> None:
        """Drop the listing if the directory has changed since it was made, or may have."""
        kept = directory.listing
        if isinstance(kept, Listing) and kept.version != _version(st):
            directory.listing = None

    def _let_go(self, until: float) -> None:
        """Drop the listings made before a moment: one is as large as its directory, and a walk leaves one in each."""
        for directory, _ in list(itertools.takewhile(lambda item: item[1] <= until, self._kept.items())):
            del self._kept[directory]
            directory.listing = None

    def _scan(self, directory: Inode) -> tuple[list[bytes], os.stat_result, list[os.stat_result | None]]:
        """Return the names, the directory's stat of just before, and the first stats of what is in there."""
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
        """Return the entry at a position below len(names); None when it is gone."""
        while position >= listing.statted:
            begin = listing.statted
            names = listing.names[begin : begin + BATCH]
            started = self._inodes.start()
            stats = await self._backing.meta(self._stat_all, directory, names)
            if listing.statted != begin:
                continue  # another reader of the same listing was here
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
