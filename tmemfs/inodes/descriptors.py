"""Keep a bounded number of O_PATH descriptors of inodes, reopened when needed.

A directory of 100,000 entries must not cost 100,000 descriptors, so an inode's descriptor is opened at its first use,
by its parent's descriptor and its name (or, when that name has gone, through an open file's descriptor), and (device,
inode number) are verified: a name that leads elsewhere since is ESTALE, never the wrong file. The least recently used
is closed when the table is full. Descriptors of files that lost their last name are pinned until the kernel forgets
them: they could not be reopened.

A backing that has a node for each path (FUSE filesystems over paths, like bindfs) does not know a descriptor any more
whose name was removed, though the file may have others. So a call that fails with ENOENT or ESTALE is made once more
with a descriptor that was opened anew, by whatever name leads to the file.

Threads call in here: the lock guards the table alone and is never held over a system call.

What the event loop lets go of is closed in a thread: a descriptor may be the last that holds a file without a name, and
a disk takes seconds to free tens of gigabytes.
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
CLOSE_SECONDS = 10.0  # that the end waits for
_NAME_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)

T = TypeVar("T")


class Located(Protocol):
    """An inode as this table sees it."""

    @property
    def key(self) -> tuple[int, int]:
        """(device, inode number)."""

    @property
    def locations(self) -> Sequence[tuple[Located, bytes]]:
        """Parents and names under which the inode was seen; empty for one that has no name any more."""

    @property
    def open_descriptors(self) -> Sequence[int]:
        """Descriptors of those who have the file open now."""


class _Entry:
    __slots__ = ("dropped", "fd", "pinned", "users")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.users = 1
        self.pinned = False
        self.dropped = False  # dropped from the table while in use: the last user closes it


class _Lease:
    """A descriptor in use. (A generator for a context manager would cost 2 µs, as much as the call it is for.)"""

    __slots__ = ("_entry", "_owner")

    def __init__(self, owner: Descriptors, entry: _Entry) -> None:
        self._owner = owner
        self._entry = entry

    def __enter__(self) -> int:
        return self._entry.fd

    def __exit__(self, *exc: object) -> None:
        self._owner._release(self._entry)


class Closer:
    """Close descriptors in a thread, one after the other and with nobody to wait for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[int] = deque()
        self._busy = False
        self._idle = threading.Condition(self._lock)

    def close(self, fd: int) -> None:
        """Have a descriptor closed soon."""
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
            with contextlib.suppress(OSError):  # closed all the same, and nobody can be told
                os.close(fd)

    def finish(self, seconds: float) -> None:
        """Wait until everything is closed, for a bounded time."""
        with self._idle:
            self._idle.wait_for(lambda: not self._busy, seconds)


class Descriptors:
    """Lend O_PATH descriptors of inodes; hold at most `limit` that are not in use or pinned."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._entries: OrderedDict[Located, _Entry] = OrderedDict()
        self.closer = Closer()

    def __len__(self) -> int:
        return len(self._entries)

    def pin(self, inode: Located, fd: int) -> None:
        """Hand over a descriptor that is to stay until `drop` (the root's, an unlinked file's)."""
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
        """Hand over a descriptor of an inode that is about to be used."""
        with self._lock:
            spare = [fd]
            if inode not in self._entries:
                entry = self._entries[inode] = _Entry(fd)
                entry.users = 0
                spare = self._overflow()
        for fd in spare:
            self.closer.close(fd)

    def use(self, inode: Located) -> _Lease:
        """Lend the inode's descriptor for the time of a `with` block. Raise OSError where it cannot be opened."""
        return _Lease(self, self._acquire(inode))

    def call(self, inode: Located, function: Callable[[int], T]) -> T:
        """Call a function with the inode's descriptor, once more with another one if this one's name has gone."""
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

    def _replace(self, inode: Located, entry: _Entry) -> bool:
        """Have an inode's descriptor be one that is opened anew by a name; tell whether there is one."""
        fd = -1 if entry.pinned else self._open_by_name(inode)
        if fd < 0:
            return False
        with self._lock:
            if self._entries.get(inode) is entry:
                entry.dropped = True
                new = self._entries[inode] = _Entry(fd)
                new.users = 0
                return True
        os.close(fd)  # another thread was faster
        return True

    def use_open(self, inode: Located) -> _Lease:
        """Lend the inode's descriptor where it is open. Raise BlockingIOError where it would have to be opened."""
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
            if entry is not None:  # another thread was faster
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
        """Take the least recently used descriptors out until the bound holds (lock held)."""
        closing: list[int] = []
        if len(self._entries) <= self.limit:
            return closing
        for inode, entry in list(self._entries.items())[: len(self._entries) - self.limit + self.limit // 16]:
            if entry.users == 0 and not entry.pinned:
                del self._entries[inode]
                closing.append(entry.fd)
        return closing

    def _closed_ancestors(self, inode: Located) -> list[Located]:
        """List the directories above an inode's first name that have no descriptor, from the top.

        By recursion alone, a path of a few hundred directories would be deeper than the interpreter allows.
        """
        above: dict[Located, None] = {}  # a set in order: after renames by others, names can lead in a circle
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
        """Return a descriptor of what a name leads to, if that is the inode; -1 if no name does."""
        names = tuple(inode.locations)
        try:
            for ancestor in self._closed_ancestors(inode):  # from the top: each finds the one above it open
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
                    continue  # renamed or removed underneath, or its directory was; it may have another name
                raise
            if _matches_or_close(fd, inode):
                return fd
        return -1

    def drop(self, inode: Located) -> None:
        """Have the inode's descriptor closed, soon or by its last user."""
        with self._lock:
            entry = self._entries.pop(inode, None)
            if entry is None:
                return
            entry.dropped = True
            close = entry.users == 0
        if close:
            self.closer.close(entry.fd)

    def close(self) -> None:
        """Close everything."""
        for inode in list(self._entries):
            self.drop(inode)
        self.closer.finish(CLOSE_SECONDS)

    def check(self) -> None:
        """Raise AssertionError when the bound is broken or an entry is closed."""
        with self._lock:
            loose = [entry for entry in self._entries.values() if entry.users == 0 and not entry.pinned]
            assert len(loose) <= self.limit, (len(loose), self.limit)
            for entry in self._entries.values():
                fcntl.fcntl(entry.fd, fcntl.F_GETFD)  # not fstat: that would ask a file which may hang


def stat_or_close(fd: int) -> os.stat_result:
    """Return the stat of a descriptor that was just opened; close it where that fails, as nobody knows of it yet."""
    try:
        return os.fstat(fd)
    except OSError:
        os.close(fd)
        raise


def _matches_or_close(fd: int, inode: Located) -> bool:
    """Tell whether a descriptor is the inode's; close it if not."""
    found = stat_or_close(fd)
    if (found.st_dev, found.st_ino) == inode.key:
        return True
    os.close(fd)
    return False
