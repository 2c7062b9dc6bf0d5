"""Keep the slabs in use from being swapped out.

What is not mapped cannot be locked: the pages of a memfd that is only read and written with pread and pwrite are
reclaimed like any others, whatever mlockall says. That must not happen to a pool that swap itself is kept in. Reading
such a page waits for the process that should read it: seen, with all of the guest's own memory locked, on a machine
that only reclaims cold pages ahead of time. So here the arena is mapped, in a process whose mappings are locked as they
are faulted in, and each slab is faulted in when it is given out. Punching the descriptor frees it all the same.

Memory that is locked cannot be reclaimed either: a process that lets its pool run into the limit of its memory cgroup
is killed, or waits for ever for memory where it may not be killed. So its owner is asked before each slab.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable

from tmem.arena import SLAB_SIZE, SlabSource

_MADV_POPULATE_READ = 22  # Linux 5.14
_DENIED_SECONDS = 0.1  # after a denial nobody is asked for so long: the answer costs several reads of files


class ResidentSlabs(SlabSource):
    """A source whose slabs stay in memory while they are out, in a process that called mlockall (future, on fault).

    `may` tells whether so many bytes more may be made real.
    """

    def __init__(self, source: SlabSource, may: Callable[[int], bool] = lambda size: True) -> None:
        self._source = source
        self._may = may
        self._denied_until = float("-inf")
        self._map = mmap.mmap(source.fd, os.fstat(source.fd).st_size, mmap.MAP_SHARED, mmap.PROT_READ)

    @property
    def fd(self) -> int:
        """The memfd of the source."""
        return self._source.fd

    @property
    def capacity(self) -> int:
        """Most bytes that the source gives."""
        return self._source.capacity

    @property
    def ceiling(self) -> int:
        """Most bytes that the source may ever give."""
        return self._source.ceiling

    def acquire(self, persistent: bool) -> int | None:
        """Give a slab of the source, every page of it mapped and so locked; None where it may not be, too."""
        if time.monotonic() < self._denied_until:
            return None
        if not self._may(SLAB_SIZE):
            self._denied_until = time.monotonic() + _DENIED_SECONDS
            return None
        slab = self._source.acquire(persistent)
        if slab is not None:
            self._fault_in(slab * SLAB_SIZE)
        return slab

    def _fault_in(self, start: int) -> None:
        try:
            self._map.madvise(_MADV_POPULATE_READ, start, SLAB_SIZE)
        except OSError:  # an older kernel
            for page in range(start, start + SLAB_SIZE, mmap.PAGESIZE):
                self._map[page]

    def release(self, slab: int, persistent: bool) -> None:
        """Give a slab back to the source."""
        self._source.release(slab, persistent)
