"""Slabs of memory: where they come from, and the memfd that holds them.

The pool never maps the memfd. It writes with pwrite and reads with pread into private bytes, so a slab may be
punched at any moment: a read of a hole gives zeros, fails its checksum, and makes no memory real again (a
mapped read would). Slabs are made real by fallocate and freed by punching, so `st_blocks` tells the truth
about both.
"""

from __future__ import annotations

import errno
import fcntl
import os
from typing import Protocol

from tmemcommon import libc

PAGE_SIZE = 4096
SLAB_SIZE = 65536

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class SlabSource(Protocol):
    """Where slabs come from: a private arena, or a daemon that lends them."""

    @property
    def fd(self) -> int:
        """The memfd that all slabs are pieces of; slab n is at n * SLAB_SIZE."""

    @property
    def capacity(self) -> int:
        """Most bytes that may be out at once; same-filled pages are bounded by a share of it."""

    @property
    def ceiling(self) -> int:
        """Most bytes that may ever be out: more than the capacity where that follows what is lent."""

    def acquire(self, persistent: bool) -> int | None:
        """Give the number of a slab whose memory is real, or None when there is none to give."""

    def release(self, slab: int, persistent: bool) -> None:
        """Take a slab back; its content is gone."""


def punch(fd: int, slab: int, count: int = 1) -> None:
    """Free the memory of `count` slabs and leave a hole that reads as zeros; OSError when the kernel refuses."""
    libc.fallocate(fd, libc.FALLOC_FL_PUNCH_HOLE | libc.FALLOC_FL_KEEP_SIZE, slab * SLAB_SIZE, count * SLAB_SIZE)


def make_arena(slabs: int) -> int:
    """Make a sparse memfd of that many slabs that can neither shrink nor grow, and give its descriptor."""
    fd = os.memfd_create("tmem-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, slabs * SLAB_SIZE)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError:
        os.close(fd)
        raise
    return fd


class EmbeddedArena(SlabSource):
    """A private memfd cut into slabs; sealed, so that no slab can ever fault by a truncation.

    `capacity` and `limit` are bytes, rounded down to whole slabs, at least one. `limit` is the virtual size
    of the memfd and so the most that `resize` can grow to; it costs nothing until slabs are acquired.
    """

    def __init__(self, capacity: int, limit: int | None = None) -> None:
        self._allowed = max(1, capacity // SLAB_SIZE)
        self._total = max(self._allowed, (limit or 0) // SLAB_SIZE)
        self._never_used = 0
        self._returned: list[int] = []
        self._out: dict[int, bool] = {}
        self._fd = make_arena(self._total)

    @property
    def fd(self) -> int:
        """The memfd; -1 once closed."""
        return self._fd

    @property
    def capacity(self) -> int:
        """Most bytes that may be out at once."""
        return self._allowed * SLAB_SIZE

    @property
    def ceiling(self) -> int:
        """The capacity: all of it is there from the start."""
        return self.capacity

    @property
    def slabs_out(self) -> int:
        """Slabs acquired and not released; after a `resize` this can exceed the capacity for a while."""
        return len(self._out)

    def acquire(self, persistent: bool) -> int | None:
        """Make a slab real and give it out; None when the capacity or the machine's memory is used up.

        It may wait for memory, and may run beside a `release` of another thread.
        """
        if len(self._out) >= self._allowed:
            return None
        if self._returned:  # taken before it is made real: a release may come meanwhile, of another thread
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
        """Punch the slab and take it back; ValueError when it is not out, or was given as the other kind."""
        if self._out.get(slab) is not persistent:
            raise ValueError(f"slab {slab} is not out as {'persistent' if persistent else 'ephemeral'}")
        punch(self._fd, slab)
        del self._out[slab]
        self._returned.append(slab)

    def resize(self, capacity: int) -> int:
        """Change how many bytes may be out; give how many slabs are now too many."""
        slabs = max(1, capacity // SLAB_SIZE)
        if slabs > self._total:
            raise ValueError(f"{capacity} bytes exceed the arena's {self._total * SLAB_SIZE}")
        self._allowed = slabs
        return max(0, len(self._out) - slabs)

    def close(self) -> None:
        """Close the memfd, which frees all of its memory; harmless when closed already."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def check(self) -> None:
        """Raise AssertionError unless every slab is in one place and exactly those out are real."""
        returned = set(self._returned)
        assert len(returned) == len(self._returned), "a slab was returned twice"
        assert not returned & self._out.keys(), "a slab is out and returned"
        assert len(returned) + len(self._out) == self._never_used <= self._total, "a slab is nowhere"
        if self._fd >= 0:
            real = os.fstat(self._fd).st_blocks * 512
            assert real <= len(self._out) * SLAB_SIZE, f"{real} bytes are real, {self.slabs_out} slabs out"
