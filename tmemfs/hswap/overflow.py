"""The overflow file: pages that the pool refused, in slots of a sparse file on slow storage.

A page is always written to a slot that no page has, and the old slot is freed afterwards: a write that fails, or that
stops halfway, leaves the previous content as it was. The checksum of every slot is kept in memory, so a page that was
changed on the disk, or cut off with the end of the file, is an error and never other bytes.

The first block of the file is a header that makes it recognizable: only such a file, of the same owner, that no process
has locked is removed as the leftover of a guest that was killed.
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

from tmem.codec import checksum
from tmemfs.config import ConfigError
from tmemfs.iothreads import BUFFER_BYTES, IoThreads

log = logging.getLogger(__name__)

PAGE = 4096
HEADER = b"tmemfs overflow file\n".ljust(PAGE, b"\0")
FIRST_SLOT = 1  # slot 0 is the header
SPARE_SLOTS = 1024  # beyond the pages: what is written while the old slots are still in use
THREADS = 4
_BUFFER_PAGES = BUFFER_BYTES // PAGE


class OverflowFile(Protocol):
    """Slots on slow storage; every call may raise OSError and has then changed nothing."""

    async def write(self, pages: Sequence[bytes]) -> list[int]:
        """Write pages to free slots, FIRST_SLOT or above, and give the slots."""

    async def read(self, slots: Sequence[int]) -> list[bytes]:
        """Read the pages of slots."""

    def free(self, slots: Sequence[int]) -> None:
        """Give slots back."""

    async def reserve(self, pages: int) -> None:
        """Have space for that many pages."""

    def clear(self) -> None:
        """Forget every slot."""

    def check(self, used: Sequence[int]) -> None:
        """Raise AssertionError unless every slot is free or used."""


class Overflow(OverflowFile):
    """Slots of one file; made by `create`, so that it is ours alone."""

    def __init__(self, fd: int, remove: Callable[[], None]) -> None:
        self._fd = fd
        self._remove = remove
        self._threads = IoThreads("overflow", THREADS)
        self._free = array("I")
        self._digests = array("Q", bytes(8 * FIRST_SLOT))

    @property
    def slots(self) -> int:
        """Slots that hold a page."""
        return len(self._digests) - FIRST_SLOT - len(self._free)

    async def write(self, pages: Sequence[bytes]) -> list[int]:
        """Write pages to free slots; give the slots. OSError: nothing was taken."""
        slots = self._take(len(pages))
        try:
            await self._threads.run(lambda buffer: _write(self._fd, buffer, slots, pages))
        except BaseException:
            self.free(slots)
            raise
        for slot, page in zip(slots, pages, strict=True):
            self._digests[slot] = checksum(page)
        return slots

    async def read(self, slots: Sequence[int]) -> list[bytes]:
        """Read the pages of slots; OSError when one cannot be read or is not what was written."""
        pages = await self._threads.run(lambda buffer: _read(self._fd, buffer, slots))
        for slot, page in zip(slots, pages, strict=True):
            if checksum(page) != self._digests[slot]:
                raise OSError(errno.EIO, f"slot {slot} of the overflow file has other bytes than were written")
        return pages

    def free(self, slots: Sequence[int]) -> None:
        """Give slots back."""
        self._free.extend(slots)

    def _take(self, count: int) -> list[int]:
        """Take slots: those that were used before first, so that the file grows only when it must."""
        slots = [self._free.pop() for _ in range(min(count, len(self._free)))]
        fresh = range(len(self._digests), len(self._digests) + count - len(slots))
        self._digests.extend([0] * len(fresh))
        return sorted([*slots, *fresh])

    async def reserve(self, pages: int) -> None:
        """Have disk space for that many pages; OSError, ENOSPC for one, when there is not enough."""
        await self._threads.run(lambda _: _reserve(self._fd, (pages + SPARE_SLOTS) * PAGE))

    def clear(self) -> None:
        """Forget every slot. The disk space stays with the file: to give it back can take a filesystem seconds."""
        del self._free[:]
        del self._digests[FIRST_SLOT:]

    def close(self) -> None:
        """Remove the file; harmless when closed already."""
        if self._fd >= 0:
            self._threads.stop()
            self._remove()
            os.close(self._fd)
            self._fd = -1

    def check(self, used: Sequence[int]) -> None:
        """Raise AssertionError unless every slot is free or one of the `used`."""
        free = set(self._free)
        assert len(free) == len(self._free), "a slot is free twice"
        assert free.isdisjoint(used), "a slot is free and used"
        assert len(free) + len(used) == len(self._digests) - FIRST_SLOT, "a slot is lost"


def _runs(slots: Sequence[int]) -> list[tuple[int, int]]:
    """Cut slots into (position, count) of neighbours that fit into a thread's buffer."""
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
    """Allocate; not by trying, for what an attempt that fails has taken stays taken, and the disk full."""
    disk, taken = os.fstatvfs(fd), os.fstat(fd).st_blocks * 512
    if size - taken > disk.f_bavail * disk.f_frsize:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        # Where a filesystem has no fallocate, libc writes single bytes, which O_DIRECT does not allow.
        code = errno.EOPNOTSUPP if error.errno == errno.EINVAL else error.errno
        raise OSError(code, os.strerror(code or errno.EIO)) from None


def _write(fd: int, buffer: memoryview, slots: Sequence[int], pages: Sequence[bytes]) -> None:
    for position, count in _runs(slots):
        size = count * PAGE
        for number in range(count):
            buffer[number * PAGE : (number + 1) * PAGE] = pages[position + number]
        done = os.pwrite(fd, buffer[:size], slots[position] * PAGE)
        if done != size:
            # With room for a part only, the kernel says why when the rest is asked for.
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


def create(path: Path) -> Overflow:
    """Make the file, for its owner alone, and lock it; the leftover of a killed guest is removed first.

    Read and written past the kernel's page cache, where the filesystem can. It is removed by its directory's
    descriptor, because a mount may come to lie over its path. Raises ConfigError.
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
            log.warning("overflow file %s: not removed: %s", path, error.strerror)
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
        log.warning("overflow file %s: its filesystem has no O_DIRECT, so the kernel caches what is written", path)
    return Overflow(fd, remove)


def _open_new(name: str, directory: int) -> int:
    """Create the file."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(name, flags, 0o600, dir_fd=directory)


def _remove_leftover(path: Path, directory: int) -> None:
    """Remove a file of that name if it is one of ours that nobody uses; ConfigError if it is not."""
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
        if os.fstat(fd).st_nlink != 1:  # another mount was faster, and the name is that one's file now
            raise ConfigError(f"overflow file '{path}' is in use by another mount: give another --hswap-overflow")
        log.info("overflow file %s: removing what a killed guest left", path)
        os.unlink(path.name, dir_fd=directory)
    finally:
        os.close(fd)
