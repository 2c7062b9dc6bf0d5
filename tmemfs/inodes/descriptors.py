"""Cache O_PATH descriptors of inodes: a bounded number, opened when needed, the least recently used closed first.

A directory of 100,000 entries must not cost 100,000 descriptors. So the descriptor of an inode is opened at its first
use, through the descriptor of its parent and its name; if the name has gone, through the descriptor of an open file.
Device and inode number are compared: a name that leads to another file gives ESTALE, never that file. Descriptors of
files that lost their last name are pinned until the kernel forgets them, because they could not be reopened.

Some backings have one node for each path (FUSE filesystems such as bindfs). There, a descriptor becomes invalid when
its name is removed, even if the file has other names. So a call that fails with ENOENT or ESTALE is repeated once with
a descriptor that was opened by any name of the file.

All methods may be called from threads. The lock protects the table alone and is never held over a system call.

Descriptors that the event loop releases are closed in a thread: one of them may be the last reference to a file without
a name, and a disk takes seconds to free tens of gigabytes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from trio.lowlevel import start_thread_soon

PATH_FLAGS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
CLOSE_SECONDS = 10.0  # how long the end of the guest waits for closes
_NAME_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)

T = TypeVar("T")


class Located(Protocol):
    """What this table needs of an inode."""

    @property
    def key(self) -> tuple[int, int]:
        """(device, inode number)."""

    @property
    def locations(self) -> Sequence[tuple[Located, bytes]]:
        """The known names of the inode, each as (parent, name); empty once it has none."""

    @property
    def open_descriptors(self) -> Sequence[int]:
        """The descriptors of its open files."""


class _Entry:
    __slots__ = ("dropped", "fd", "pinned", "users")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.users = 1
        self.pinned = False
        self.dropped = False  # removed from the table while in use: the last user closes it


class _Lease:
    """A descriptor in use. (contextlib.contextmanager would cost 2 µs, as much as the call that uses it.)"""

    __slots__ = ("_entry", "_owner")

    def __init__(self, owner: Descriptors, entry: _Entry) -> None:
        self._owner = owner
        self._entry = entry

    def __enter__(self) -> int:
        return self._entry.fd

    def __exit__(self, *exc: object) -> None:
        self._owner._release(self._entry)


class Closer:
    """Close descriptors in a thread, one after the other, without waiting for the result."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[int] = deque()
        self._busy = False
        self._idle = threading.Condition(self._lock)

    def close(self, fd: int) -> None:
        """Close a descriptor soon."""
        with self._lock:
            self._waiting.append(fd)
            if self._busy:
                return
            self._busy = True
        start_thread_soon(self._run, lambda outcome: None)

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._busy = False
                    self._idle.notify_all()
                    return
                fd = self._waiting.popleft()
            with contextlib.suppress(OSError):  # closed all the same
                os.close(fd)

    def finish(self, seconds: float) -> None:
        """Wait until everything is closed, for at most `seconds`."""
        with self._idle:
            self._idle.wait_for(lambda: not self._busy, seconds)


class Descriptors:
    """The cached O_PATH descriptors of one guest; at most `limit` are neither in use nor pinned."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._entries: OrderedDict[Located, _Entry] = OrderedDict()
        self.closer = Closer()

    def __len__(self) -> int:
        return len(self._entries)

    def pin(self, inode: Located, fd: int) -> None:
        """Take over a descriptor and keep it until `drop` (of the root, of an unlinked file)."""
        with self._lock:
            entry = self._entries.get(inode)
            if entry is None:
                entry = self._entries[inode] = _Entry(fd)
                entry.users = 0
                entry.pinned = True
                return
            entry.pinned = True
        self.closer.close(fd)

    def add(self, inode: Located, fd: int) -> None:
        """Take over a descriptor of an inode that is about to be used."""
        with self._lock:
            spare = [fd]
            if inode not in self._entries:
                entry = self._entries[inode] = _Entry(fd)
                entry.users = 0
                spare = self._overflow()
        for fd in spare:
            self.closer.close(fd)

    def use(self, inode: Located) -> _Lease:
        """Return a context manager over the descriptor of an inode. OSError when it cannot be opened."""
        return _Lease(self, self._acquire(inode))

    def call(self, inode: Located, function: Callable[[int], T]) -> T:
        """Call a function with the descriptor of an inode; repeat it once with a new one if the name has gone."""
        entry = self._acquire(inode)
        try:
            return function(entry.fd)
        except OSError as error:
            if error.errno not in _NAME_GONE or not self._replace(inode, entry):
                raise
        finally:
            self._release(entry)
        with self.use(inode) as fd:
            return function(fd)

    def reopen(self, inode: Located, flags: int) -> int:
        """Return a new descriptor of the inode's file, opened with `flags`."""
        return self.call(inode, lambda fd: os.open(f"/proc/self/fd/{fd}", flags))

    def _replace(self, inode: Located, entry: _Entry) -> bool:
        """Replace the descriptor of an inode by one opened by name now. Return whether that was possible."""
        fd = -1 if entry.pinned else self._open_by_name(inode)
        if fd < 0:
            return False
        with self._lock:
            if self._entries.get(inode) is entry:
                entry.dropped = True
                new = self._entries[inode] = _Entry(fd)
                new.users = 0
                return True
        os.close(fd)  # another thread replaced it first
        return True

    def use_open(self, inode: Located) -> _Lease:
        """Return a context manager over the cached descriptor of an inode. BlockingIOError when none is cached."""
        entry = self._find(inode)
        if entry is None:
            raise BlockingIOError
        return _Lease(self, entry)

    def _find(self, inode: Located) -> _Entry | None:
        with self._lock:
            entry = self._entries.get(inode)
            if entry is not None:
                entry.users += 1
                self._entries.move_to_end(inode)
            return entry

    def _acquire(self, inode: Located) -> _Entry:
        entry = self._find(inode)
        if entry is not None:
            return entry
        fd = self._open(inode)
        with self._lock:
            entry = self._entries.get(inode)
            if entry is not None:  # another thread opened it first
                entry.users += 1
                spare = [fd]
            else:
                entry = self._entries[inode] = _Entry(fd)
                spare = self._overflow()
        for fd in spare:
            os.close(fd)
        return entry

    def _release(self, entry: _Entry) -> None:
        with self._lock:
            entry.users -= 1
            close = entry.dropped and entry.users == 0
        if close:
            os.close(entry.fd)

    def _overflow(self) -> list[int]:
        """Remove the least recently used descriptors above the limit and return them. The caller holds the lock."""
        closing: list[int] = []
        if len(self._entries) <= self.limit:
            return closing
        for inode, entry in list(self._entries.items())[: len(self._entries) - self.limit + self.limit // 16]:
            if entry.users == 0 and not entry.pinned:
                del self._entries[inode]
                closing.append(entry.fd)
        return closing

    def _closed_ancestors(self, inode: Located) -> list[Located]:
        """Return the directories above the first name of an inode that have no descriptor, from the top down.

        Opening them in this order avoids recursion, whose depth the interpreter limits, on long paths.
        """
        above: dict[Located, None] = {}  # as an ordered set; renames by others can make the known names a cycle
        while inode.locations:
            inode = inode.locations[0][0]
            if inode in self._entries or inode in above:
                break
            above[inode] = None
        return list(above)[::-1]

    def _open(self, inode: Located) -> int:
        fd = self._open_by_name(inode)
        if fd >= 0:
            return fd
        for number in tuple(inode.open_descriptors):
            try:
                fd = os.open(f"/proc/self/fd/{number}", os.O_PATH | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # closed since
            if _matches_or_close(fd, inode):
                return fd
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    def _open_by_name(self, inode: Located) -> int:
        """Return a descriptor opened by a name that leads to the inode, -1 if no known name does."""
        names = tuple(inode.locations)
        try:
            for ancestor in self._closed_ancestors(inode):  # from the top down: the parent of each is open
                self._release(self._acquire(ancestor))
        except OSError as error:
            if error.errno not in _NAME_GONE:
                raise
            names = names[1:]
        for parent, name in names:
            try:
                with self.use(parent) as parent_fd:
                    fd = os.open(name, PATH_FLAGS, dir_fd=parent_fd)
            except OSError as error:
                if error.errno in _NAME_GONE:
                    continue  # others renamed or removed the name or its directory; another name may work
                raise
            if _matches_or_close(fd, inode):
                return fd
        return -1

    def drop(self, inode: Located) -> None:
        """Remove the descriptor of an inode and close it, soon or after its last use."""
        with self._lock:
            entry = self._entries.pop(inode, None)
            if entry is None:
                return
            entry.dropped = True
            close = entry.users == 0
        if close:
            self.closer.close(entry.fd)

    def close(self) -> None:
        """Close all descriptors."""
        for inode in list(self._entries):
            self.drop(inode)
        self.closer.finish(CLOSE_SECONDS)

    def check(self) -> None:
        """Raise AssertionError when the limit is exceeded or a descriptor is closed."""
        with self._lock:
            loose = [entry for entry in self._entries.values() if entry.users == 0 and not entry.pinned]
            assert len(loose) <= self.limit, (len(loose), self.limit)
            for entry in self._entries.values():
                fcntl.fcntl(entry.fd, fcntl.F_GETFD)  # fstat could hang


def stat_or_close(fd: int) -> os.stat_result:
    """Return the stat of a descriptor that was just opened; close it if that fails."""
    try:
        return os.fstat(fd)
    except OSError:
        os.close(fd)
        raise


def _matches_or_close(fd: int, inode: Located) -> bool:
    """Return whether a descriptor leads to an inode; close it if not."""
    found = stat_or_close(fd)
    if (found.st_dev, found.st_ino) == inode.key:
        return True
    os.close(fd)
    return False
