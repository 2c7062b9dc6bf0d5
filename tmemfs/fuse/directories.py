"""Open directories. Each keeps the listing of its first read until it is rewound.

All entries are sent with their attributes (readdirplus), so after a listing the kernel has them cached. The reply for
an entry is kept with the listing and sent again while its inode is unchanged. A second `ls -l` within the attribute
time-out needs no call on the backing and takes a third of the time.
"""

from __future__ import annotations

import itertools

import pyfuse3
import trio
from pyfuse3 import EntryAttributes

from tmemfs.fuse.replies import ReplyBuilder
from tmemfs.inodes.inode import Inode
from tmemfs.inodes.inodes import InodeTable
from tmemfs.namespace.listing import Listing
from tmemfs.namespace.namespace import Namespace

_DOTS = (b".", b"..")
_FIRST_NEXT = len(_DOTS) + 1  # the kernel's offset after the entry at position 0


class OpenDirectory:
    """One open of a directory."""

    __slots__ = ("inode", "listing")

    def __init__(self, inode: Inode) -> None:
        self.inode = inode
        self.listing: Listing | None = None  # None until the first read


class OpenDirectories:
    """The open directories of one guest."""

    def __init__(self, inodes: InodeTable, namespace: Namespace, replies: ReplyBuilder) -> None:
        self._inodes = inodes
        self._attributes = namespace.attributes
        self._opener = namespace.opener
        self._listings = namespace.listings
        self._replies = replies
        self._open: dict[int, OpenDirectory] = {}

    async def open(self, fh: int, inode: Inode, thread: int) -> None:
        """Open a directory under a handle number. Raise OSError; ESTALE if a known name does not lead to it."""
        self._listings.compare(inode, await self._opener.open_directory(inode, thread))
        self._open[fh] = OpenDirectory(inode)

    def close(self, fh: int) -> None:
        """Forget a handle number."""
        self._open.pop(fh, None)

    def inode(self, fh: int) -> Inode | None:
        """Return the directory of a handle number; None for the virtual directory."""
        directory = self._open.get(fh)
        return directory.inode if directory is not None else None

    async def read(self, fh: int, start: int, token: pyfuse3.ReaddirToken) -> None:
        """Send the entries from offset `start` on, as many as fit into the kernel's buffer."""
        directory = self._open.get(fh)
        if directory is None:
            return
        if start == 0 and directory.listing is not None:  # rewound
            inode = directory.inode
            self._listings.compare(inode, await self._attributes.stat(inode))
        if start == 0 or directory.listing is None:
            directory.listing = await self._listings.open(directory.inode)
        for position in range(start, len(_DOTS)):
            entry = self._replies.entry(await self._dot(directory.inode, position))
            if not pyfuse3.readdir_reply(token, pyfuse3.FileNameT(_DOTS[position]), entry, position + 1):
                return  # the kernel counts no lookup for `.` and `..`
        await self._read_names(directory.inode, directory.listing, max(start - len(_DOTS), 0), token)

    async def _read_names(self, directory: Inode, listing: Listing, start: int, token: pyfuse3.ReaddirToken) -> None:
        # The loop is optimised: it takes most of the time of a repeated listing. So names are bound before it, and the
        # case of a kept reply is inlined.
        send = pyfuse3.readdir_reply
        left = max(0.0, listing.made + self._inodes.attr_timeout - trio.current_time())
        names, replies = itertools.islice(listing.names, start, None), itertools.islice(listing.replies, start, None)
        for position, (name, reply) in enumerate(zip(names, replies, strict=True), start):
            # Unchanged since that reply?
            if reply is not None and reply[0].file.stat_seq == reply[1] and reply[0].lookups:
                inode, _, entry = reply
                entry.attr_timeout = entry.entry_timeout = left
                if not send(token, name, entry, position + _FIRST_NEXT):
                    return
                inode.lookups += 1
                continue
            made = await self._make_reply(directory, listing, position)
            if made is None:
                continue  # removed since the names were read
            inode, entry = made
            if not send(token, name, entry, position + _FIRST_NEXT):
                self._inodes.forget(inode.number, 0)  # not sent: the kernel does not know the inode
                return
            self._inodes.add_lookup(inode)

    async def _dot(self, inode: Inode, position: int) -> Inode:
        """Return the inode of `.` (position 0) or `..` (1) of a directory, with its attributes cached."""
        if position == 1 and inode.locations:
            inode = inode.locations[0][0]
        if inode.attr is None:
            await self._attributes.get(inode)
        return inode

    async def _make_reply(
        self, directory: Inode, listing: Listing, position: int
    ) -> tuple[Inode, EntryAttributes] | None:
        found = await self._listings.entry(directory, listing, position)
        if found is None:
            return None
        inode = self._inodes.get_or_create_if_linked(directory, found.name, found.st, found.started)
        if inode is None:
            return None
        entry = self._replies.entry(inode)
        if entry.attr_timeout:  # 0: the kernel must not cache it
            listing.replies[position] = (inode, inode.file.stat_seq, entry)
        return inode, entry
