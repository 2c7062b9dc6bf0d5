"""The overflow file: pages that the pool refused, in slots of a sparse file on slow storage.

A page is always written to a free slot, and its old slot is freed afterwards. So a write that fails or stops halfway
leaves the old content intact. The checksum of every slot is kept in memory: a page that was changed or truncated on the
disk reads as an error, never as wrong bytes.

The first block of the file is a header. A file is removed as the leftover of a killed guest only if it has this header,
the same owner, and no process has locked it.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from xxhash import xxh3_64_intdigest

from tmemcommon.sizes import ConfigError
from tmemfs.iothreads import BUFFER_BYTES, IoThreads

log = logging.getLogger(__name__)

PAGE = 4096
HEADER = b"tmemfs overflow file\n".ljust(PAGE, b"\0")
FIRST_SLOT = 1  # slot 0 is the header
SPARE_SLOTS = 1024  # reserved besides one for each page: new slots that are written before the old ones are freed
THREADS = 4
_BUFFER_PAGES = BUFFER_BYTES // PAGE


class SlotStore(Protocol):
    """Slots on slow storage. A call that raises OSError has changed nothing."""

    async def write(self, pages: Sequence[bytes]) -> list[int]:
        """Write pages to free slots, FIRST_SLOT or above; return the slots."""

    async def read(self, slots: Sequence[int]) -> list[bytes]:
        """Return the pages of slots."""

    def free(self, slots: Sequence[int]) -> None:
        """Free slots."""

    async def reserve(self, pages: int) -> None:
        """Allocate disk space for so many pages."""

    def clear(self) -> None:
        """Free every slot."""

    def check(self, used: Sequence[int]) -> None:
        """Raise AssertionError unless every slot is either free or one of the `used`."""


class OverflowFile(SlotStore):
    """Slots of a file that `create` has made and locked."""

    def __init__(self, fd: int, remove: Callable[[], None]) -> None:
        self._fd = fd
        self._remove = remove
        self._threads = IoThreads("overflow", THREADS)
        self._free = array("I")
        self._checksums = array("Q", bytes(8 * FIRST_SLOT))

    async def write(self, pages: Sequence[bytes]) -> list[int]:
        """Write pages to free slots; return the slots. An OSError leaves all slots as they were."""
        slots = self._allocate(len(pages))
        try:
            await self._threads.run(lambda buffer: _write(self._fd, buffer, slots, pages))
        except BaseException:
            self.free(slots)
            raise
        for slot, page in zip(slots, pages, strict=True):
            self._checksums[slot] = xxh3_64_intdigest(page)
        return slots

    async def read(self, slots: Sequence[int]) -> list[bytes]:
        """Return the pages of slots. Raises OSError when one cannot be read or its checksum does not match."""
        pages = await self._threads.run(lambda buffer: _read(self._fd, buffer, slots))
        for slot, page in zip(slots, pages, strict=True):
            if xxh3_64_intdigest(page) != self._checksums[slot]:
                raise OSError(errno.EIO, f"slot {slot} of the overflow file has other bytes than were written")
        return pages

    def free(self, slots: Sequence[int]) -> None:
        """Free slots."""
        self._free.extend(slots)

    def _allocate(self, count: int) -> list[int]:
        """Return free slots; those that were used before come first, so that the file grows only when it must."""
        slots = [self._free.pop() for _ in range(min(count, len(self._free)))]
        fresh = range(len(self._checksums), len(self._checksums) + count - len(slots))
        self._checksums.extend([0] * len(fresh))
        return sorted([*slots, *fresh])

    async def reserve(self, pages: int) -> None:
        """Allocate disk space for so many pages. Raises OSError, usually ENOSPC, when there is not enough."""
        await self._threads.run(lambda _: _reserve(self._fd, (pages + SPARE_SLOTS) * PAGE))

    def clear(self) -> None:
        """Free every slot. The file keeps its disk space: a truncate took seconds on a filesystem that discards."""
        del self._free[:]
        del self._checksums[FIRST_SLOT:]

    def close(self) -> None:
        """Remove the file; does nothing the second time."""
        if self._fd >= 0:
            self._threads.stop()
            self._remove()
            os.close(self._fd)
            self._fd = -1

    def check(self, used: Sequence[int]) -> None:
        """Raise AssertionError unless every slot is either free or one of the `used`."""
        free = set(self._free)
        assert len(free) == len(self._free), "a slot is free twice"
        assert free.isdisjoint(used), "a slot is free and used"
        assert len(free) + len(used) == len(self._checksums) - FIRST_SLOT, "a slot is lost"


def _runs(slots: Sequence[int]) -> list[tuple[int, int]]:
    """Return runs of adjacent slots that fit into a thread's buffer, each as (index in `slots`, count)."""
    runs: list[tuple[int, int]] = []
    for position, slot in enumerate(slots):
        if runs:
            start, count = runs[-1]
            if slot == slots[start] + count and count < _BUFFER_PAGES:
                runs[-1] = start, count + 1
                continue
        runs.append((position, 1))
    return runs


def _reserve(fd: int, size: int) -> None:
    """Allocate disk space. Free space is checked first: an attempt that fails would leave the disk full."""
    disk, allocated = os.fstatvfs(fd), os.fstat(fd).st_blocks * 512
    if size - allocated > disk.f_bavail * disk.f_frsize:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        # On a filesystem without fallocate libc writes single bytes instead, which O_DIRECT refuses with EINVAL.
        code = errno.EOPNOTSUPP if error.errno == errno.EINVAL else error.errno
        raise OSError(code, os.strerror(code or errno.EIO)) from None


def _write(fd: int, buffer: memoryview, slots: Sequence[int], pages: Sequence[bytes]) -> None:
    for position, count in _runs(slots):
        size = count * PAGE
        for number in range(count):
            buffer[number * PAGE : (number + 1) * PAGE] = pages[position + number]
        done = os.pwrite(fd, buffer[:size], slots[position] * PAGE)
        if done != size:
            # A short write has no error code: writing the rest raises the real one.
            os.pwrite(fd, buffer[done // PAGE * PAGE : size], slots[position] * PAGE + done // PAGE * PAGE)
            raise OSError(errno.ENOSPC, "the overflow file takes only a part")


def _read(fd: int, buffer: memoryview, slots: Sequence[int]) -> list[bytes]:
    pages: list[bytes] = []
    for position, count in _runs(slots):
        size = count * PAGE
        if os.preadv(fd, [buffer[:size]], slots[position] * PAGE) != size:
            raise OSError(errno.EIO, "the overflow file is shorter than what was written")
        pages.extend(bytes(buffer[number * PAGE : (number + 1) * PAGE]) for number in range(count))
    return pages


def create(path: Path) -> OverflowFile:
    """Create the file with mode 0600 and lock it; remove the leftover of a killed guest first. Raises ConfigError.

    It uses O_DIRECT where the filesystem has it. It will be removed through a descriptor of its directory, because its
    path may be covered by a mount by then.
    """
    try:
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(
            f"overflow file '{path}': {error.strerror}; create its directory or give another --hswap-overflow"
        ) from None
    try:
        try:
            fd = _open_new(path.name, directory)
        except FileExistsError:
            _remove_leftover(path, directory)
            fd = _open_new(path.name, directory)
    except OSError as error:
        os.close(directory)
        raise ConfigError(f"overflow file '{path}': {error.strerror}; give another --hswap-overflow") from None
    except ConfigError:
        os.close(directory)
        raise

    def remove() -> None:
        try:
            os.unlink(path.name, dir_fd=directory)
        except OSError as error:
            log.warning("overflow file %s cannot be removed: %s; remove it by hand", path, error.strerror)
        os.close(directory)

    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.pwrite(fd, HEADER, 0) != PAGE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        remove()
        os.close(fd)
        raise ConfigError(f"overflow file '{path}': {error.strerror}; give another --hswap-overflow") from None
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_DIRECT)
    except OSError:
        log.warning("overflow file %s: no O_DIRECT on its filesystem, so the kernel caches its pages too", path)
    return OverflowFile(fd, remove)


def _open_new(name: str, directory: int) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(name, flags, 0o600, dir_fd=directory)


def _remove_leftover(path: Path, directory: int) -> None:
    """Remove an overflow file that no process uses. Raises ConfigError for any other file."""
    fd = os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    try:
        found = os.fstat(fd)
        if (
            not stat.S_ISREG(found.st_mode)
            or found.st_uid != os.geteuid()
            or found.st_nlink != 1
            or os.pread(fd, PAGE, 0) != HEADER
        ):
            raise ConfigError(
                f"overflow file '{path}' exists and is not one of tmemfs: remove it or give another --hswap-overflow"
            )
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"overflow file '{path}' is in use by another mount: give another --hswap-overflow"
            ) from None
        if os.fstat(fd).st_nlink != 1:  # another mount has just replaced it
            raise ConfigError(f"overflow file '{path}' is in use by another mount: give another --hswap-overflow")
        log.info("overflow file %s: removing the one that a killed guest left", path)
        os.unlink(path.name, dir_fd=directory)
    finally:
        os.close(fd)
