"""Lock the slabs in use in memory, for a pool that stores swap.

mlockall locks only mapped memory. The pages of a memfd that is used with pread and pwrite alone can be swapped out. For
a pool that stores swap this is a deadlock: reading a swapped-out page waits for the process that is reading it. (Seen
with all other memory of the guest locked, on a machine that only reclaims cold pages ahead of time.) So the arena is
mapped here, in a process that locks its mappings as they are faulted in, and each slab is faulted in when it is given
out. Punching the memfd frees it all the same. The engine maps a private arena as well,
but not the slabs in stock.

Locked memory cannot be reclaimed. A process whose pool reaches the limit of its memory cgroup is killed, or waits for
memory forever if it must not be killed. So `may` is asked before each slab.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable

from tmem.arena import SLAB_SIZE, SlabSource, SlabSourceWrapper

_MADV_POPULATE_READ = 22  # Linux 5.14
_DENIED_SECONDS = 0.1  # `may` is not asked again for so long after a denial: it reads several files


class ResidentSlabs(SlabSourceWrapper):
    """A source whose slabs stay in memory while they are out. The process has called mlockall (future, on fault).

    `may` returns whether so many more bytes may be allocated.
    """

    def __init__(self, source: SlabSource, may: Callable[[int], bool] = lambda size: True) -> None:
        super().__init__(source)
        self._may = may
        self._denied_until = float("-inf")
        self._map = mmap.mmap(source.fd, os.fstat(source.fd).st_size, mmap.MAP_SHARED, mmap.PROT_READ)

    def acquire(self, persistent: bool) -> int | None:
        """Return a slab with every page mapped and so locked; None if there is none or `may` denies it."""
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
        """Return a slab to the source."""
        self._source.release(slab, persistent)
