"""The arenas of guests, as tmemd sees them: sealed memfds, checked on arrival, populated and punched, never mapped.

A descriptor may come from a hostile process. Only a sealed memfd of the promised size on 4-KiB pages is accepted: a
file that can shrink would make its owner's reads fault, one that forbids writes would refuse fallocate, and huge pages
would make `st_blocks` wrong.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from dataclasses import dataclass

from tmem.arena import PAGE_SIZE, SLAB_SIZE, punch

_NEEDED_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_F_SEAL_FUTURE_WRITE = 0x10  # not named by this Python
_FORBIDDEN_SEALS = fcntl.F_SEAL_WRITE | _F_SEAL_FUTURE_WRITE
_BLOCK = 512  # the unit of st_blocks


class ArenaRefused(Exception):
    """The descriptor is not an arena; the message is one line."""


def validate(fd: int, slabs: int) -> None:
    """Raise ArenaRefused unless the descriptor is a memfd of exactly `slabs` slabs that can never shrink or grow."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        status, filesystem = os.fstat(fd), os.fstatvfs(fd)
    except OSError:
        raise ArenaRefused("the arena is not a memfd") from None
    if not stat.S_ISREG(status.st_mode):
        raise ArenaRefused("the arena is not a memfd")
    # A file in a tmpfs has F_SEAL_SEAL only, so it can never get the other seals.
    if seals & _NEEDED_SEALS != _NEEDED_SEALS:
        raise ArenaRefused("the arena is not sealed against shrinking, growing and further seals")
    if seals & _FORBIDDEN_SEALS or access != os.O_RDWR:
        raise ArenaRefused("the arena cannot be written")
    if status.st_size != slabs * SLAB_SIZE:
        raise ArenaRefused(f"the arena has {status.st_size} bytes, not {slabs * SLAB_SIZE}")
    if filesystem.f_bsize != PAGE_SIZE or status.st_blksize != PAGE_SIZE:
        raise ArenaRefused(
            "the arena is on huge pages: write never to /sys/kernel/mm/transparent_hugepage/shmem_enabled"
        )


def file_id(fd: int) -> tuple[int, int]:
    """Return the device and inode number, which are the same for all descriptors of one memfd."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def populate(fd: int, first: int, count: int) -> None:
    """Allocate the memory of `count` slabs, zeroed where it is new. Raise OSError if the kernel has none."""
    os.posix_fallocate(fd, first * SLAB_SIZE, count * SLAB_SIZE)


def is_populated(fd: int, slab: int) -> bool:
    """Return whether a slab is fully populated; punch it if it is not.

    SEEK_DATA cannot be used: it reports populated pages that were never written as holes.
    """
    before = populated_bytes(fd)
    with contextlib.suppress(OSError):  # no memory: a part was missing
        populate(fd, slab, 1)
        if populated_bytes(fd) == before:
            return True
    punch(fd, slab)
    return False


def populated_bytes(fd: int) -> int:
    """Return the number of populated bytes."""
    return os.fstat(fd).st_blocks * _BLOCK


@dataclass(frozen=True, slots=True)
class Arena:
    """A guest's memfd and the guest's user."""

    fd: int
    slabs: int
    uid: int
    file_id: tuple[int, int]


class Arenas:
    """The arenas of all guests, with one descriptor each."""

    def __init__(self) -> None:
        self._arenas: dict[int, Arena] = {}

    def add(self, guest: int, fd: int, slabs: int, uid: int) -> None:
        """Keep the descriptor of a guest that has none here."""
        assert guest not in self._arenas
        self._arenas[guest] = Arena(fd, slabs, uid, file_id(fd))

    def get(self, guest: int) -> Arena | None:
        """Return the arena of a guest; None if there is none here."""
        return self._arenas.get(guest)

    def find_owner(self, identity: tuple[int, int]) -> int | None:
        """Return the guest whose memfd has this `file_id`."""
        return next((guest for guest, arena in self._arenas.items() if arena.file_id == identity), None)

    def release(self, guest: int) -> None:
        """Close the descriptor of a guest."""
        os.close(self._arenas.pop(guest).fd)

    def close(self) -> None:
        """Close all descriptors. The guests keep their memory."""
        for guest in [*self._arenas]:
            self.release(guest)
