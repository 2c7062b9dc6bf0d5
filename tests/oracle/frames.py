"""Frames: pages of one anonymous mapping, and for each frame who owns it and what is marked on it.

The marks of all frames are one bytearray each, so that a hit is one store and the hand of the clock moves at the speed
of `bytearray.find`.
"""

from __future__ import annotations

import itertools
import mmap
from array import array
from typing import Protocol

from tmemfs import processmemory

PAGE_SIZE = 4096
PAGE_SHIFT = 12

# Reference bytes. A hit stores USED whatever was there; dirty frames are known by a byte of their own.
IDLE, USED, QUEUED, FREE = 0, 1, 2, 3

# Frames lie this far off page boundaries. The kernel copies a reply with `rep movsb`, which is three times slower where
# source and target have the same place in their pages (measured with a null filesystem, 1-MiB reads into a page-aligned
# buffer: 713 against 2362 MiB/s on an AMD EPYC).
SKEW = 64


_object_numbers = itertools.count(1)


class PageTable(dict[int, int]):
    """The cached pages of one generation of a file: page number to frame.

    Frames refer to the table and not to the file: a file that forgets many pages takes a new table, and those of the
    old one are freed in steps. `oid` is the number that the pool knows them by; no other table ever has it.
    """

    __slots__ = ("discarded", "oid")

    def __init__(self) -> None:
        super().__init__()
        self.discarded = False  # no file has it any more
        self.oid = next(_object_numbers)

    def renumber(self) -> int:
        """Have the pool know nothing of these pages; return the number under which it may know some."""
        old, self.oid = self.oid, next(_object_numbers)
        return old


class PageOwner(Protocol):
    """A file, as the cache sees it."""

    pages: PageTable


class Frames:
    """A number of frames that can change; `limit` bytes bound it, now and later."""

    def __init__(self, capacity: int, limit: int) -> None:
        self.frames = capacity >> PAGE_SHIFT
        self._limit = max(limit >> PAGE_SHIFT, self.frames)
        size = (self._limit + 1) << PAGE_SHIFT
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
        self._map.madvise(mmap.MADV_HUGEPAGE)  # what is resident is what is accounted
        self.view = memoryview(self._map)[SKEW : SKEW + (self._limit << PAGE_SHIFT)]
        self.ref = bytearray()
        self.pool_bit = bytearray()
        self.bypassing = bytearray()  # set by the admission: evicted without being queued for the pool
        self.dirty = bytearray()
        self.unread = bytearray()  # read ahead, and asked for by nobody yet
        self._owner: list[PageTable | None] = []
        self._index = array("Q")
        self._extend(self.frames)

    @property
    def capacity(self) -> int:
        """Bytes that the frames may hold."""
        return self.frames << PAGE_SHIFT

    def page(self, frame: int) -> memoryview:
        """Give the bytes of a frame; valid until the next await."""
        return self.view[frame << PAGE_SHIFT : (frame + 1) << PAGE_SHIFT]

    def describe(self, frame: int) -> tuple[PageTable, int]:
        """Tell which page of which table a used frame holds."""
        table = self._owner[frame]
        assert table is not None
        return table, self._index[frame]

    def _extend(self, count: int) -> None:
        """Make free frames of what is still unused of the mapping, so that there are `count`."""
        grown = max(0, count - len(self.ref))
        self.ref.extend(bytes([FREE]) * grown)
        for marks in (self.pool_bit, self.bypassing, self.dirty, self.unread):
            marks.extend(bytes(grown))
        self._owner.extend([None] * grown)
        self._index.extend([0] * grown)

    def _cut_off(self, first: int) -> None:
        """Return the memory of the frames from `first` on, which are all free, to the system."""
        start = (first + 1) << PAGE_SHIFT  # the page before is shared with the last frame, because of SKEW
        processmemory.release_pages(self._map, start, (len(self.ref) - first) << PAGE_SHIFT)
        for table in (self.ref, self.pool_bit, self.bypassing, self.dirty, self.unread, self._owner, self._index):
            del table[first:]

    def _copy(self, frame: int, target: int) -> None:
        """Copy a page into a free frame, with its marks, and have its table lead there."""
        pages, index = self.describe(frame)
        self.page(target)[:] = self.page(frame)
        for table in (self.ref, self.pool_bit, self.bypassing, self.dirty, self.unread):
            table[target] = table[frame]
        self._owner[target], self._index[target] = pages, index
        pages[index] = target
        self._owner[frame] = None
        self.ref[frame], self.dirty[frame] = FREE, 0

    def close(self) -> None:
        """Give the mapping back. Every view that was handed out must be gone."""
        self.view.release()
        self._map.close()


_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
