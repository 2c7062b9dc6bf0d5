"""Generate random operations that interact: few names, few slots, offsets near the edges of pages.

Most bugs need several operations on one place of one file (read, truncate, extend, read again). So a stream stays with
a slot for a while, returns to recent offsets, and often reads back what it changed.
"""

from __future__ import annotations

import os
import random
from collections import deque

from tests.torture.replica import PAGE, Op

SLOTS = 5
MAPS = 3
LARGEST = 768 << 10  # bytes; a dozen such files are several times the cache and the pool
SAME_SLOT = 0.7  # of the operations on a slot use the slot of the operation before
RECENT_OFFSET = 0.5  # of the offsets are recent ones or close to one
READ_BACK = 0.3  # of the changes are followed by a read of the place
DIRECTORIES = ("d0", "d1", "d0/e")
FILES = ("a", "b", "c", "d", "d0/a", "d0/b", "d1/a", "d0/e/a")
OPENINGS = (
    os.O_RDONLY,
    os.O_RDWR,
    os.O_RDWR,
    os.O_RDWR | os.O_CREAT,
    os.O_RDWR | os.O_CREAT,
    os.O_RDWR | os.O_CREAT,
    os.O_WRONLY | os.O_CREAT,
    os.O_RDWR | os.O_CREAT | os.O_EXCL,
    os.O_RDWR | os.O_CREAT | os.O_TRUNC,
    os.O_WRONLY | os.O_TRUNC,
    os.O_RDWR | os.O_APPEND | os.O_CREAT,
    os.O_WRONLY | os.O_APPEND,
    os.O_RDWR | os.O_DIRECT | os.O_CREAT,
    os.O_RDWR | os.O_SYNC,
    os.O_RDWR | os.O_DSYNC | os.O_CREAT,
)
WEIGHTS = {
    "open": 12,
    "close": 2,
    "pread": 16,
    "pwrite": 18,
    "read": 3,
    "write": 6,
    "seek": 2,
    "ftruncate": 5,
    "truncate": 2,
    "sync": 3,
    "fstat": 3,
    "allocate": 1,
    "punch": 1,
    "map": 5,
    "unmap": 2,
    "mread": 8,
    "mwrite": 8,
    "msync": 2,
    "rename": 3,
    "link": 2,
    "symlink": 1,
    "readlink": 1,
    "unlink": 2,
    "mkdir": 1,
    "rmdir": 1,
    "chmod": 1,
    "stat": 3,
    "list": 1,
    "whole": 5,
    "control": 3,
}


class OperationGenerator:
    """A stream of operations; the same seed gives the same stream."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self._names = list(WEIGHTS)
        self._weights = list(WEIGHTS.values())
        self._tag = seed * 1_000_003
        self._last_slot = 0
        self._recent: deque[int] = deque([0], maxlen=6)
        self._queue = deque(
            [("mkdir", name) for name in DIRECTORIES]
            + [("open", slot, FILES[slot], os.O_RDWR | os.O_CREAT) for slot in range(SLOTS)]
        )

    def next(self) -> Op:
        """Return the next operation."""
        if self._queue:
            return self._queue.popleft()
        op = self._new()
        if op[0] in ("pwrite", "ftruncate", "mwrite", "punch", "allocate") and self.random.random() < READ_BACK:
            number, offset = op[1], max(0, op[2] - self.random.choice((0, 1, PAGE, 5 * PAGE)))
            self._queue.append(("mread" if op[0] == "mwrite" else "pread", number, offset, self._size()))
        return op

    def _new(self) -> Op:
        name = self.random.choices(self._names, self._weights)[0]
        return (name, *getattr(self, f"_{name}", self._slot_only)())

    # -- ingredients ---------------------------------------------------------------------------------------------

    def _slot(self) -> int:
        if self.random.random() > SAME_SLOT:
            self._last_slot = self.random.randrange(SLOTS)
        return self._last_slot

    def _map_number(self) -> int:
        return self.random.randrange(MAPS)

    def _file(self) -> str:
        return self.random.choice(FILES)

    def _any(self) -> str:
        return self.random.choice(FILES if self.random.random() < 0.93 else DIRECTORIES)

    def _offset(self, largest: int = LARGEST) -> int:
        """Prefer the beginning of the file, offsets at or beside page edges, and recent offsets."""
        if self.random.random() < RECENT_OFFSET:
            near = self.random.choice(self._recent) + self.random.choice((0, 0, -1, 1, -700, 700, -PAGE, PAGE, 20_000))
            return min(max(0, near), largest)
        self._recent.append(self._new_offset(largest))
        return self._recent[-1]

    def _new_offset(self, largest: int) -> int:
        offset = self.random.randrange(largest) >> self.random.choice((0, 0, 1, 3, 6))
        kind = self.random.randrange(3)
        if kind == 0:
            return offset // PAGE * PAGE
        return max(0, offset // PAGE * PAGE + self.random.randint(-2, 2)) if kind == 1 else offset

    def _size(self) -> int:
        size = self.random.choice((1, 100, PAGE, PAGE, 3 * PAGE, 32 << 10, 128 << 10, 300 << 10))
        return self.random.choice((size, self.random.randint(1, size)))

    def _new_tag(self) -> int:
        self._tag += 1
        return self._tag

    # -- operations ----------------------------------------------------------------------------------------------

    def _slot_only(self) -> Op:
        return (self._slot(),)

    def _open(self) -> Op:
        return self._slot(), self._file(), self.random.choice(OPENINGS)

    def _pread(self) -> Op:
        return self._slot(), self._offset(), self._size()

    def _pwrite(self) -> Op:
        return self._slot(), self._offset(), self._size(), self._new_tag()

    def _read(self) -> Op:
        return self._slot(), self._size()

    def _write(self) -> Op:
        return self._slot(), min(self._size(), 20_000), self._new_tag()

    def _seek(self) -> Op:
        whence = self.random.choice((os.SEEK_SET, os.SEEK_CUR, os.SEEK_END))
        return self._slot(), self._offset() if whence == os.SEEK_SET else 0, whence

    def _ftruncate(self) -> Op:
        return self._slot(), self._offset()

    def _truncate(self) -> Op:
        return self._file(), self._offset()

    def _sync(self) -> Op:
        return self._slot(), self.random.random() < 0.5

    def _allocate(self) -> Op:
        return self._slot(), self._offset(), min(self._size(), 64 << 10)

    def _punch(self) -> Op:
        return self._slot(), self._offset(), self._size()

    def _map(self) -> Op:
        first = self._offset() // PAGE
        return self._map_number(), self._slot(), first, self.random.choice((1, 4, 64, 400)), self.random.random() < 0.3

    def _unmap(self) -> Op:
        return (self._map_number(),)

    def _mread(self) -> Op:
        return self._map_number(), self._offset(256 << 10), self._size()

    def _mwrite(self) -> Op:
        return self._map_number(), self._offset(256 << 10), min(self._size(), 64 << 10), self._new_tag()

    def _msync(self) -> Op:
        return (self._map_number(),)

    def _rename(self) -> Op:
        return self._any(), self._any()

    def _link(self) -> Op:
        return self._file(), self._file()

    def _symlink(self) -> Op:
        return self._file(), self._file()

    def _readlink(self) -> Op:
        return (self._file(),)

    def _unlink(self) -> Op:
        return (self._any(),)

    def _mkdir(self) -> Op:
        return (self.random.choice(DIRECTORIES),)

    def _rmdir(self) -> Op:
        return (self.random.choice(DIRECTORIES),)

    def _chmod(self) -> Op:
        return self._file(), self.random.choice((0o600, 0o644, 0o755, 0o4755))

    def _stat(self) -> Op:
        return (self._any(),)

    def _list(self) -> Op:
        return (self.random.choice(("", *DIRECTORIES)),)

    def _whole(self) -> Op:
        return (self._file(),)

    def _control(self) -> Op:
        what = self.random.choice(("drop_caches", "cache_size", "cache_size", "freeze"))
        if what == "drop_caches":
            return what, "1"
        if what == "freeze":
            return what, self.random.choice("01")
        return what, self.random.choice(("1M", "1100K", "1536K", "3M"))
