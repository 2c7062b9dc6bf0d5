"""Keep the slabs in use from being swapped out.

What is not mapped cannot be locked: the pages of a memfd that is only read and written with pread and pwrite are
reclaimed like any others, whatever mlockall says. That must not happen to a pool that swap itself is kept in. Reading
such a page waits for the process that should read it: seen, with all of the guest's own memory locked, on a machine
that only reclaims cold pages ahead of time. So here the arena is mapped, in a process whose mappings are locked as they
are faulted in, and each slab is faulted in when it is given out. Punching the descriptor frees it all the same.
"""

from __future__ import annotations

import mmap
import os

from tmem.arena import SLAB_SIZE, SlabSource

_MADV_POPULATE_READ = 22  # Linux 5.14


class ResidentSlabs(SlabSource):
    """A source whose slabs stay in memory while they are out, in a process that called mlockall (future, on fault)."""

    def __init__(self, source: SlabSource) -> None:
        self._source = source
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
        """Give a slab of the source, every page of it mapped and so locked."""
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
