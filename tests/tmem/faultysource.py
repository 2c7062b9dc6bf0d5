"""Pages of known compressibility, a slab source that fails on demand, and faults in its memory."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from tmem import PAGE_SIZE, SLAB_SIZE, EmbeddedArena, SlabSource

if TYPE_CHECKING:
    from tests.tmem.implementations import AnyPool


def page_of(seed: int, stored: int) -> bytes:
    """Return a page that lz4 compresses to about `stored` bytes; different for each seed."""
    noise = random.Random(seed).randbytes(max(8, min(stored - 30, PAGE_SIZE)))
    return (noise + b"\xa5\x5a" * (PAGE_SIZE // 2))[:PAGE_SIZE]


def filled(word: int) -> bytes:
    """Return a same-filled page."""
    return word.to_bytes(8, "little") * (PAGE_SIZE // 8)


class FaultySource(SlabSource):
    """A source that can refuse, raise, cap its persistent slabs and take slabs away."""

    def __init__(self, capacity: int) -> None:
        self._arena = EmbeddedArena(capacity)
        self._slabs = self._arena.capacity // SLAB_SIZE
        self._fd = os.dup(self._arena.fd)  # the pool's own, so that a fault in it does not reach `acquire`
        self._out: dict[int, bool] = {}  # slab -> persistent
        self.refuses = False
        self.raises = False
        self.persistent_cap: int | None = None

    @property
    def fd(self) -> int:
        return self._fd

    @property
    def capacity(self) -> int:
        return self._slabs * SLAB_SIZE

    @property
    def ceiling(self) -> int:
        return self.capacity

    @property
    def private(self) -> bool:
        return False

    def fds_of_pool(self) -> list[int]:
        """Return all descriptors of the memfd, the pool's own copy too, except the one that `acquire` uses."""
        return [fd for fd in descriptors_of(self._fd) if fd != self._arena.fd]

    @property
    def slabs_out(self) -> int:
        """The number of slabs that the pool has."""
        return len(self._out)

    def slabs_of(self, persistent: bool) -> list[int]:
        """Return the slabs that are out as this kind."""
        return [slab for slab, kind in self._out.items() if kind is persistent]

    def acquire(self, persistent: bool) -> int | None:
        self._maybe_raise()
        capped = persistent and self.persistent_cap is not None and len(self.slabs_of(True)) >= self.persistent_cap
        if self.refuses or capped or len(self._out) >= self._slabs:
            return None
        slab = self._arena.acquire(persistent)
        if slab is not None:
            self._out[slab] = persistent
        return slab

    def release(self, slab: int, persistent: bool) -> None:
        self._maybe_raise()
        self._arena.release(slab, persistent)
        del self._out[slab]

    def _maybe_raise(self) -> None:
        if self.raises:
            raise ConnectionResetError(errno.ECONNRESET, "the lender is gone")

    def revoke(self, slab: int) -> None:
        """Punch an ephemeral slab without telling the pool."""
        self._arena.release(slab, False)
        del self._out[slab]

    def resize(self, capacity: int) -> int:
        """Change the capacity; return the number of slabs that are now too many."""
        self._slabs = max(1, capacity // SLAB_SIZE)
        assert self._slabs * SLAB_SIZE <= self._arena.capacity
        return max(0, len(self._out) - self._slabs)

    def check(self) -> None:
        """Raise AssertionError unless every slab is in one place."""
        self._arena.check()
        assert self._arena.slabs_out == len(self._out)

    def close(self) -> None:
        """Free the memory."""
        os.close(self._fd)
        self._arena.close()


class Thinned:
    """A persistent pool, filled with small pages, of which every second one was flushed."""

    def __init__(self, pool: AnyPool) -> None:
        self._pool = pool
        count = 0
        while pool.put(1, count, page_of(count, 1000)):
            count += 1
        for gone in range(0, count, 2):
            pool.flush_page(1, gone)
        self._left = range(1, count, 2)

    def check(self) -> None:
        """Raise AssertionError unless the other pages are there."""
        assert all(self._pool.get(1, index) == page_of(index, 1000) for index in self._left)


def stored_ranges(fd: int) -> list[range]:
    """Return where a memfd has been written: ranges of byte offsets, whole pages each."""
    ranges, end = list[range](), 0
    while True:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return ranges
            raise
        end = os.lseek(fd, start, os.SEEK_HOLE)
        ranges.append(range(start, end))


def first_stored_byte(fd: int) -> int:
    """Return the offset of the first byte of a memfd that is not zero."""
    written = stored_ranges(fd)[0]
    data = os.pread(fd, len(written), written.start)
    return written[len(data) - len(data.lstrip(b"\0"))]


def every_16th_byte(fd: int, at: int) -> list[range]:
    """Return every 16th byte that was written: no stored page is shorter."""
    return [written[at::16] for written in stored_ranges(fd)]


_FLIP = bytes(byte ^ 0x10 for byte in range(256))


@contextmanager
def flipped_bits(fd: int, places: list[range]) -> Iterator[None]:
    """Flip one bit of each of these bytes inside the block, and flip it back afterwards."""

    def flip() -> None:
        for offsets in places:
            data = bytearray(os.pread(fd, offsets.stop - offsets.start, offsets.start))
            data[:: offsets.step] = data[:: offsets.step].translate(_FLIP)
            os.pwrite(fd, data, offsets.start)

    flip()
    try:
        yield
    finally:
        flip()


def descriptors_of(file: int) -> list[int]:
    """Return all descriptors of this process for the same file."""
    status, found = os.fstat(file), list[int]()
    for fd in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):
            if os.path.samestat(os.fstat(fd), status):
                found.append(fd)
    return found


@contextmanager
def unwritable(fds: Sequence[int]) -> Iterator[None]:
    """Make every write through descriptors of one file fail inside the block: they are read-only meanwhile."""
    writable, read_only = os.dup(fds[0]), os.open(f"/proc/self/fd/{fds[0]}", os.O_RDONLY | os.O_CLOEXEC)
    for fd in fds:
        os.dup2(read_only, fd, inheritable=False)
    os.close(read_only)
    try:
        yield
    finally:
        for fd in fds:
            os.dup2(writable, fd, inheritable=False)
        os.close(writable)
