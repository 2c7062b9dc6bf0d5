"""Be one file, directory or other node of the backing: what is known and cached of it."""

from __future__ import annotations

import os

import trio

from tmemfs.cache.content import Fill
from tmemfs.cache.pagecache import PageTable
from tmemfs.inodes.writeerrors import WriteErrors

Version = tuple[int, ...]
Absent = tuple[tuple[bytes, int], ...]
_SHOWN_DEPTH = 100

MAX_LOCATIONS = 8  # of a file with many links, a few names are enough
MAX_FORMER_SIZES = 8


class Inode:
    """One file, directory or other node of the backing."""

    __slots__ = (
        "__weakref__",
        "absent_xattrs",
        "absent_xattrs_until",
        "attr",
        "attr_until",
        "changed_by_others",
        "dirty",
        "errors",
        "fills",
        "former_sizes",
        "generation",
        "io_slots",
        "key",
        "listing",
        "locations",
        "lookups",
        "names_doubted_until",
        "no_capability_xattr",
        "no_default_acl_until",
        "number",
        "open_descriptors",
        "opens",
        "pages",
        "provisional",
        "readable_opens",
        "recorded_at",
        "seen_at",
        "settles_at",
        "size",
        "size_in_doubt",
        "touched_at",
        "true_size",
        "unlinked",
        "version",
        "virtual",
        "watch",
        "write_lock",
        "writers",
    )

    def __init__(self, number: int, key: tuple[int, int]) -> None:
        self.number = number
        self.key = key
        self.generation = 0
        self.lookups = 0  # how often the kernel was told of it and has not forgotten
        self.locations: list[tuple[Inode, bytes]] = []
        self.names_doubted_until = 0.0  # until then the kernel may believe in a name that is not among these
        self.unlinked = False  # its last name went, through this mount
        self.opens = 0
        self.open_descriptors: list[int] = []  # a way to the file when its names have gone
        self.readable_opens = 0  # since the kernel's pages of it were last invalidated
        self.attr: os.stat_result | None = None
        self.attr_until = 0.0
        self.listing: object | None = None
        self.watch = 0  # inotify's number for a directory; 0: none yet, -1: not to be had
        self.no_default_acl_until = 0.0  # until then (monotonic) a directory is known to have no default ACL
        self.absent_xattrs: Absent = ()  # extended attributes that it does not have, and the errno that says so
        self.absent_xattrs_until = 0.0  # how long that is believed
        self.no_capability_xattr = False  # known to have no security.capability
        self.pages = PageTable()
        self.fills: dict[int, Fill] = {}
        self.dirty: set[int] = set()  # page numbers
        self.errors = WriteErrors()  # of write-backs, owed to fsync and close
        self.size = 0
        self.true_size: int | None = None  # as reads found it for this version, where the stat may be wrong
        self.virtual = False  # its size is not what the stat shows: its content is made when it is read
        self.changed_by_others = False  # by others, some time
        self.size_in_doubt = False  # changed underneath since the kernel was told of the size
        self.former_sizes: tuple[int, ...] = ()  # that the kernel may believe in, one of them or the present one
        self.version: Version | None = None
        self.settles_at = 0.0  # from then on (monotonic), every change by others changes the version
        self.provisional = False  # pages were read, or changed by us, before that: an open does not believe in them
        self.seen_at = 0  # tick of the last stat that was taken in, or of the last change of our own
        self.touched_at = -1.0  # monotonic time of the same: of the last change of our own
        self.recorded_at = 0  # tick at which a change of our own was recorded last
        self.writers = 0
        self.write_lock: trio.Lock | None = None
        self.io_slots: trio.CapacityLimiter | None = None

    @property
    def display_path(self) -> str:
        """Its path in the mount, for people; its number when it has no name any more."""
        names: list[bytes] = []
        inode = self
        while inode.locations and len(names) < _SHOWN_DEPTH:  # names that others changed can lead in a circle
            inode, name = inode.locations[0]
            names.insert(0, name)
        return os.fsdecode(b"/".join(names)) if names else f"inode {self.number}"

    def set_true_size(self, size: int) -> None:
        """Take in that reads found the end there: it holds for this version, and until the next open."""
        self.size = self.true_size = size
        if self.attr is not None and size != self.attr.st_size:
            self.virtual = self.provisional = True

    def doubt_size(self) -> None:
        """Take in that others change the size: the kernel goes on to believe in that of now, or in one of before."""
        self.size_in_doubt = True
        if self.size not in self.former_sizes:
            self.former_sizes = (self.size, *self.former_sizes)[:MAX_FORMER_SIZES]

    def lock(self) -> trio.Lock:
        """Return the lock that every change of the file's content takes."""
        if self.write_lock is None:
            self.write_lock = trio.Lock()
        return self.write_lock

    def add_location(self, parent: Inode, name: bytes) -> None:
        """Remember a name; the newest is tried first."""
        if not self.locations or self.locations[0] != (parent, name):
            self.remove_location(parent, name)
            self.locations.insert(0, (parent, name))
            del self.locations[MAX_LOCATIONS:]

    def remove_location(self, parent: Inode, name: bytes) -> None:
        """Forget a name."""
        if (parent, name) in self.locations:
            self.locations.remove((parent, name))
