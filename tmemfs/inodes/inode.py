"""The state of one file, directory or other node of the backing: attributes, names, content."""

from __future__ import annotations

import os

import trio

from tmemfs.cache.file import File
from tmemfs.inodes.writeerrors import WriteErrors

Absent = tuple[tuple[bytes, int], ...]
_SHOWN_DEPTH = 100

MAX_LOCATIONS = 8  # names remembered of one file
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
        "errors",
        "file",
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
        "readable_opens",
        "size_in_doubt",
        "touched_at",
        "unlinked",
        "virtual",
        "watch",
        "write_lock",
    )

    def __init__(self, number: int, key: tuple[int, int], file: File) -> None:
        self.number = number
        self.key = key
        self.file = file  # its content, and the version of that
        self.generation = 0
        self.lookups = 0  # the lookup count of FUSE
        self.locations: list[tuple[Inode, bytes]] = []  # known names, each as (parent, name)
        self.names_doubted_until = 0.0  # until then the kernel may have cached a name that is not in `locations`
        self.unlinked = False  # its last name was removed through this mount
        self.opens = 0
        self.open_descriptors: list[int] = []  # of its open files: they lead to it even without a name
        self.readable_opens = 0  # since its pages in the kernel were last invalidated
        self.attr: os.stat_result | None = None
        self.attr_until = 0.0
        self.listing: object | None = None
        self.watch = 0  # of a directory: its inotify watch descriptor; 0: none yet, -1: not possible
        self.no_default_acl_until = 0.0  # until then (monotonic) the directory has no default ACL
        self.absent_xattrs: Absent = ()  # extended attributes that it does not have, with the errno of the backing
        self.absent_xattrs_until = 0.0  # until then (monotonic) they are trusted
        self.no_capability_xattr = False  # it has no security.capability
        self.errors = WriteErrors()  # of write-backs, to be reported by fsync and close
        self.virtual = False  # its stat does not show its size, because its content is generated when read (procfs)
        self.changed_by_others = False  # at least once
        self.size_in_doubt = False  # others changed it since the kernel was told its size
        self.former_sizes: tuple[int, ...] = ()  # the kernel may have cached any of these
        self.touched_at = -1.0  # monotonic time of the last change of our own
        self.write_lock: trio.Lock | None = None
        self.io_slots: trio.CapacityLimiter | None = None

    @property
    def display_path(self) -> str:
        """The path in the mount, for log lines; the node number if it has no name."""
        names: list[bytes] = []
        inode = self
        while inode.locations and len(names) < _SHOWN_DEPTH:  # renames by others can make the known names a cycle
            inode, name = inode.locations[0]
            names.insert(0, name)
        return os.fsdecode(b"/".join(names)) if names else f"inode {self.number}"

    def set_true_size(self, size: int) -> None:
        """Record the size that reads found; it holds for this version."""
        self.file.size = self.file.true_size = size
        if self.attr is not None and size != self.attr.st_size:
            self.virtual = self.file.provisional = True

    def doubt_size(self, known: int) -> None:
        """Record that others change the size, while the kernel keeps the one known until now or a former one."""
        self.size_in_doubt = True
        if known not in self.former_sizes:
            self.former_sizes = (known, *self.former_sizes)[:MAX_FORMER_SIZES]

    def forget_xattrs(self) -> None:
        """Forget which extended attributes it does not have."""
        self.no_capability_xattr = False
        self.absent_xattrs = ()

    def lock(self) -> trio.Lock:
        """Return the lock that every change of the content holds."""
        if self.write_lock is None:
            self.write_lock = trio.Lock()
        return self.write_lock

    def add_location(self, parent: Inode, name: bytes) -> None:
        """Remember a name, as the first to be tried."""
        if not self.locations or self.locations[0] != (parent, name):
            self.remove_location(parent, name)
            self.locations.insert(0, (parent, name))
            del self.locations[MAX_LOCATIONS:]

    def remove_location(self, parent: Inode, name: bytes) -> None:
        """Forget a name."""
        if (parent, name) in self.locations:
            self.locations.remove((parent, name))
