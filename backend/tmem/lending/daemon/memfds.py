"""What tmemd does with a guest's memfd: it looks at it, makes slabs real, and punches them. It never maps it.

A descriptor comes from somebody who may be hostile. What is not exactly a sealed, unhuge memfd of the promised
size is refused before anything is done with it: a file that could shrink would make its owner's late reads
faults, one that refuses writes would refuse fallocate, and one with huge pages would make `st_blocks` lie.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import threading

from tmem.arena import PAGE_SIZE, SLAB_SIZE, punch

STEP_SLABS = 16  # 1 MiB: what is made real between two looks at the machine's memory

_NEEDED_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_F_SEAL_FUTURE_WRITE = 0x10  # not named by this Python
_FORBIDDEN_SEALS = fcntl.F_SEAL_WRITE | _F_SEAL_FUTURE_WRITE
_BLOCK = 512  # the unit of st_blocks


class MemfdRefused(Exception):
    """A descriptor that is not an arena; the text says why, in one line."""


def validate(fd: int, slabs: int) -> None:
    """Raise MemfdRefused unless the descriptor is a memfd of exactly `slabs` slabs that can never shrink or grow."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        about, filesystem = os.fstat(fd), os.fstatvfs(fd)
    except OSError:
        raise MemfdRefused("the arena is not a memfd") from None
    if not stat.S_ISREG(about.st_mode):
        raise MemfdRefused("the arena is not a memfd")
    # A file in a tmpfs carries F_SEAL_SEAL alone, and can never get the others.
    if seals & _NEEDED_SEALS != _NEEDED_SEALS:
        raise MemfdRefused("the arena is not sealed against shrinking, growing and further seals")
    if seals & _FORBIDDEN_SEALS or access != os.O_RDWR:
        raise MemfdRefused("the arena cannot be written")
    if about.st_size != slabs * SLAB_SIZE:
        raise MemfdRefused(f"the arena has {about.st_size} bytes, not {slabs * SLAB_SIZE}")
    if filesystem.f_bsize != PAGE_SIZE or about.st_blksize != PAGE_SIZE:
        raise MemfdRefused(
            "the arena is on huge pages: write never to /sys/kernel/mm/transparent_hugepage/shmem_enabled"
        )


class Disposal:
    """Closes descriptors that users sent, whatever they are of, and tells of whom that hangs.

    Closing a file of a FUSE filesystem waits for its server, which may be the sender's: so in a thread of its own.
    """

    def __init__(self) -> None:
        self._threads: dict[int, list[threading.Thread]] = {}

    def dispose(self, uid: int, fd: int) -> None:
        """Close a descriptor that a user sent."""
        try:
            fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError:
            thread = threading.Thread(target=_close, args=(fd,), daemon=True)
            thread.start()
            self._threads.setdefault(uid, []).append(thread)
        else:
            os.close(fd)  # a memfd, or a file in a tmpfs

    def hanging(self, uid: int) -> int:
        """Count the descriptors of a user that are not closed yet."""
        running = [thread for thread in self._threads.pop(uid, ()) if thread.is_alive()]
        if running:
            self._threads[uid] = running
        return len(running)


def _close(fd: int) -> None:
    with contextlib.suppress(OSError):  # its server's answer
        os.close(fd)


def identity(fd: int) -> tuple[int, int]:
    """Tell which memfd a descriptor is of, whatever its number."""
    about = os.fstat(fd)
    return about.st_dev, about.st_ino


def populate(fd: int, first: int, count: int) -> None:
    """Give `count` slabs memory, zeroed where they had none; OSError when the kernel has none to give."""
    os.posix_fallocate(fd, first * SLAB_SIZE, count * SLAB_SIZE)


def is_whole(fd: int, slab: int) -> bool:
    """Tell whether all of a slab is real; one that is not is punched.

    Seeking for data does not tell: pages that were made real and never written count as holes there.
    """
    before = populated_bytes(fd)
    with contextlib.suppress(OSError):  # no memory: then it was not all there
        populate(fd, slab, 1)
        if populated_bytes(fd) == before:
            return True
    punch(fd, slab)
    return False


def populated_bytes(fd: int) -> int:
    """Count the bytes that have memory behind them."""
    return os.fstat(fd).st_blocks * _BLOCK
