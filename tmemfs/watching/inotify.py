"""The inotify watches on directories: adding and removing them, the system's limits, and reading the events."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Callable
from typing import NamedTuple

import trio
from inotify_simple import INotify, flags, parse_events  # type: ignore[import-untyped]

from tmemcommon.sizes import ConfigError
from tmemfs.inodes.descriptors import Descriptors
from tmemfs.inodes.inode import Inode

log = logging.getLogger(__name__)

NAME_REMOVED: int = flags.DELETE | flags.MOVED_FROM
NAME_CHANGED: int = flags.CREATE | flags.MOVED_TO | NAME_REMOVED
MODIFIED: int = flags.MODIFY
FILE_CHANGED: int = flags.MODIFY | flags.ATTRIB | flags.CLOSE_WRITE
SELF = b""  # the name in an event of the watched directory itself

_MASK: int = NAME_CHANGED | FILE_CHANGED | flags.ONLYDIR | flags.EXCL_UNLINK
_READ_BYTES = 1 << 16  # per read: about 2000 events, 5 ms
_LARGEST_EVENT = 16 + 256  # bytes, with its name
_RETRY = 60.0  # seconds without new watches after the limit was reached

RawEvent = tuple[int, int, bytes]  # watch descriptor of the directory, mask, name


class Event(NamedTuple):
    """An event of kinds `mask` on a name in a directory."""

    directory: Inode
    name: bytes
    mask: int


class Watches:
    """The watched directories. `Inode.watch` is the watch descriptor; 0: not watched, -1: cannot be watched."""

    def __init__(self, descriptors: Descriptors, on_end: Callable[[Inode], None]) -> None:
        try:
            self._inotify = INotify(nonblocking=True)
        except OSError as error:
            raise ConfigError(
                f"--watch: inotify is not available ({error.strerror}): raise fs.inotify.max_user_instances (sysctl)"
                " or mount without --watch"
            ) from None
        self._descriptors = descriptors
        self._on_end = on_end
        self._by_number: dict[int, Inode] = {}
        self._refused_until = 0.0
        self._emptied_at = self.since = 0.0
        self.events = 0
        self.refusals = 0  # directories that could not be watched

    def __len__(self) -> int:
        return len(self._by_number)

    # -- directories ---------------------------------------------------------------------------------------------

    @property
    def accepting(self) -> bool:
        """True unless the system's limit was reached in the last minute."""
        return trio.current_time() >= self._refused_until

    def add_watch(self, directory: Inode) -> tuple[int, os.stat_result]:
        """Add a watch (blocks). Return the watch descriptor, for `record_watch`, and the directory's stat after it."""
        with self._descriptors.use(directory) as fd:
            return self._inotify.add_watch(f"/proc/self/fd/{fd}", _MASK), os.fstat(fd)

    def record_watch(self, number: int, directory: Inode) -> None:
        """Record the watch of a directory."""
        former = self._by_number.get(number)
        if former is not None and former is not directory:
            self._end(former)
        directory.watch = number
        self._by_number[number] = directory

    def record_failure(self, directory: Inode, error: OSError) -> None:
        """Count and log that a directory cannot be watched."""
        self.refusals += 1
        if error.errno == errno.ENOSPC:
            if not self._refused_until:
                log.warning(
                    "%d directories are watched, which is the limit: changes in others are only seen at the"
                    " next open; raise it with: sysctl fs.inotify.max_user_watches=1048576",
                    len(self),
                )
            self._refused_until = trio.current_time() + _RETRY
        elif error.errno not in (errno.ENOENT, errno.ESTALE):  # gone: the caller's operation fails by itself
            name = os.fsdecode(directory.locations[0][1]) if directory.locations else "/"
            log.warning("directory %s cannot be watched: %s", name, error.strerror)
            directory.watch = -1

    def remove(self, number: int) -> None:
        """Stop watching a directory."""
        directory = self._by_number.pop(number, None)
        with contextlib.suppress(OSError):  # EINVAL: the directory is gone, and its watch with it
            self._inotify.rm_watch(number)
        if directory is not None:
            self._end(directory)

    def is_watched(self, number: int) -> bool:
        """Return whether a watch descriptor is in use."""
        return number in self._by_number

    def _end(self, directory: Inode) -> None:
        directory.watch = 0
        self._on_end(directory)

    # -- events --------------------------------------------------------------------------------------------------

    async def read(self) -> tuple[list[Event], bool]:
        """Wait for events. Return them, and whether some were lost. Sets `since`: no returned event is older."""
        await trio.lowlevel.wait_readable(self._inotify.fd)
        self.since = self._emptied_at
        now = trio.current_time()
        found = os.read(self._inotify.fd, _READ_BYTES)
        if len(found) < _READ_BYTES - _LARGEST_EVENT:
            self._emptied_at = now
        events = parse_events(found)
        return self.resolve([(number, mask, os.fsencode(name)) for number, mask, _, name in events])

    def resolve(self, raw: list[RawEvent]) -> tuple[list[Event], bool]:
        """Return events with their directories, and whether some were lost."""
        self.events += len(raw)
        events: list[Event] = []
        lost = False
        for number, mask, name in raw:
            directory = self._by_number.get(number)
            if mask & flags.Q_OVERFLOW:
                lost = True
            elif directory is None:
                continue  # its watch was removed after the event
            elif mask & flags.IGNORED:  # the directory is gone, or its filesystem
                del self._by_number[number]
                self._end(directory)
            else:
                events.append(Event(directory, name, mask & (NAME_CHANGED | FILE_CHANGED)))
        return events, lost

    def check(self) -> None:
        """Raise AssertionError unless each directory has its watch descriptor."""
        for number, directory in self._by_number.items():
            assert directory.watch == number, (number, directory.watch)
