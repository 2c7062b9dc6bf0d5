"""Slabs of memory: where they come from, and the memfd that holds them.

An arena that somebody else punches is not mapped: pread of a hole returns zeros, which fail the checksum, and allocates
nothing (a mapped read would). A private arena is mapped: copying a page out of it takes a quarter of a pread. Slabs are
allocated by fallocate and freed by punching, so `st_blocks` shows the memory that they really use.
"""

from __future__ import annotations

import errno
import fcntl
import os
from typing import Protocol

from tmemcommon import libc

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
SLAB_SIZE = 65536

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class SlabSource(Protocol):
    """A source of slabs: a private arena, or a daemon that lends them."""

    @property
    def fd(self) -> int:
        """The memfd that contains all slabs; slab n is at n * SLAB_SIZE."""

    @property
    def capacity(self) -> int:
        """The maximum of bytes out at once now; a share of it bounds the same-filled pages."""

    @property
    def ceiling(self) -> int:
        """The maximum of bytes that can ever be out; larger than the capacity if that follows what is lent."""

    @property
    def private(self) -> bool:
        """Whether slabs are punched only after their release, so that the memfd may be mapped."""

    def acquire(self, persistent: bool) -> int | None:
        """Return the number of a slab with allocated memory, None if there is none."""

    def release(self, slab: int, persistent: bool) -> None:
        """Take a slab back; its content is lost."""


class SlabSourceWrapper(SlabSource):
    """A source that takes its slabs from another one."""

    def __init__(self, source: SlabSource) -> None:
        self._source = source

    @property
    def fd(self) -> int:
        """The memfd of the wrapped source."""
        return self._source.fd

    @property
    def capacity(self) -> int:
        """The capacity of the wrapped source."""
        return self._source.capacity

    @property
    def ceiling(self) -> int:
        """The ceiling of the wrapped source."""
        return self._source.ceiling

    @property
    def private(self) -> bool:
        """Whether the wrapped source may be mapped."""
        return self._source.private


def punch(fd: int, slab: int, count: int = 1) -> None:
    """Free the memory of `count` slabs; they read as zeros then. OSError when the kernel refuses."""
    libc.fallocate(fd, libc.FALLOC_FL_PUNCH_HOLE | libc.FALLOC_FL_KEEP_SIZE, slab * SLAB_SIZE, count * SLAB_SIZE)


def make_arena(slabs: int) -> int:
    """Return the descriptor of a new sparse memfd of `slabs` slabs, which can neither shrink nor grow."""
    fd = os.memfd_create("tmem-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, slabs * SLAB_SIZE)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError:
        os.close(fd)
        raise
    return fd


class EmbeddedArena(SlabSource):
    """A private memfd cut into slabs. It is sealed, so that no truncation can ever take a slab away.

    `capacity` is in bytes, rounded down to whole slabs, at least one. It costs nothing until slabs are acquired.
    """

    def __init__(self, capacity: int) -> None:
        self._slabs = max(1, capacity // SLAB_SIZE)
        self._never_used = 0
        self._returned: list[int] = []
        self._out: dict[int, bool] = {}  # slab: persistent
        self._fd = make_arena(self._slabs)

    @property
    def fd(self) -> int:
        """The memfd; -1 once closed."""
        return self._fd

    @property
    def capacity(self) -> int:
        """The maximum of bytes out at once."""
        return self._slabs * SLAB_SIZE

    @property
    def ceiling(self) -> int:
        """The capacity, which never changes."""
        return self.capacity

    @property
    def private(self) -> bool:
        """True: nobody else punches it."""
        return True

    @property
    def slabs_out(self) -> int:
        """Slabs acquired and not released."""
        return len(self._out)

    def acquire(self, persistent: bool) -> int | None:
        """Allocate a slab and return its number; None when the capacity or the memory of the machine is used up.

        May wait for memory. May run at the same time as `release` in another thread.
        """
        if len(self._out) >= self._slabs:
            return None
        if self._returned:  # before it is allocated: another thread may release one meanwhile
            slab = self._returned.pop()
        else:
            slab = self._never_used
            self._never_used += 1
        self._out[slab] = persistent
        try:
            os.posix_fallocate(self._fd, slab * SLAB_SIZE, SLAB_SIZE)
        except OSError as error:
            del self._out[slab]
            self._returned.append(slab)
            if error.errno in (errno.ENOSPC, errno.ENOMEM):
                return None
            raise
        return slab

    def release(self, slab: int, persistent: bool) -> None:
        """Punch a slab and take it back. ValueError if it is not out, or is out as the other kind."""
        if self._out.get(slab) is not persistent:
            raise ValueError(f"slab {slab} is not out as {'persistent' if persistent else 'ephemeral'}")
        punch(self._fd, slab)
        del self._out[slab]
        self._returned.append(slab)

    def close(self) -> None:
        """Close the memfd, which frees its memory; does nothing if it is closed."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def check(self) -> None:
        """Raise AssertionError unless every slab is in one place and only slabs out use memory."""
        returned = set(self._returned)
        assert len(returned) == len(self._returned), "a slab was returned twice"
        assert not returned & self._out.keys(), "a slab is out and returned"
        assert len(returned) + len(self._out) == self._never_used <= self._slabs, "a slab is nowhere"
        if self._fd >= 0:
            allocated = os.fstat(self._fd).st_blocks * 512
            assert allocated <= len(self._out) * SLAB_SIZE, f"{allocated} bytes allocated, {self.slabs_out} slabs out"
