"""One replica of a tree: carry out operations in a directory and return their outcomes.

An operation is a tuple of a name and its arguments; the method of that name carries it out. Its outcome is anything
that two replicas can compare: bytes, a size, a link count, or the name of the errno.

Files are opened and mapped into numbered slots, so that an operation means the same on both replicas. An operation on
an empty slot does nothing. So does one whose outcome Linux leaves open: access to a mapping beyond the end of the file,
unaligned O_DIRECT.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tmemcommon import libc

Op = tuple[Any, ...]
Outcome = Any

PAGE = 4096
SECTOR = 4096  # what O_DIRECT aligns to, whatever the disk
NOTHING = "nothing to do"


def content(tag: int, size: int) -> bytes:
    """Return bytes that no other tag gives: compressible, incompressible or one byte repeated."""
    source = random.Random(tag)
    kind = tag % 4
    if kind == 0:
        return bytes([1 + tag % 255]) * size
    if kind == 1:
        return source.randbytes(size)
    line = source.randbytes(61)
    return (line * (size // len(line) + 1))[:size]


@dataclass(frozen=True, slots=True)
class Slot:
    """An open file."""

    fd: int
    flags: int

    @property
    def direct(self) -> bool:
        """Whether offsets and sizes must be aligned."""
        return bool(self.flags & os.O_DIRECT)


@dataclass(frozen=True, slots=True)
class Mapping:
    """A mapped range of a file."""

    map: mmap.mmap
    offset: int
    length: int
    writable: bool

    def end(self) -> int:
        """Return how many of its bytes are within the file: access beyond the last page is SIGBUS."""
        return max(0, min(self.length, self.map.size() - self.offset))


class Replica:
    """A directory, with the open files and mappings of one process in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.slots: dict[int, Slot] = {}
        self.maps: dict[int, Mapping] = {}

    def run(self, op: Op) -> Outcome:
        """Carry out an operation; an OSError becomes the name of its errno."""
        try:
            return getattr(self, f"do_{op[0]}")(*op[1:])
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, str(error.errno))

    def close(self) -> None:
        """Close everything."""
        for mapping in self.maps.values():
            mapping.map.close()
        self.maps.clear()
        for slot in self.slots.values():
            with contextlib.suppress(OSError):
                os.close(slot.fd)
        self.slots.clear()

    # -- open files ----------------------------------------------------------------------------------------------

    def do_open(self, number: int, name: str, flags: int) -> Outcome:
        """Open a file into a slot; close what the slot had."""
        self.do_close(number)
        fd = os.open(self.root / name, flags | os.O_CLOEXEC, 0o640)
        self.slots[number] = Slot(fd, flags)
        return self._describe(os.fstat(fd))

    def do_close(self, number: int) -> Outcome:
        """Close a slot."""
        slot = self.slots.pop(number, None)
        return NOTHING if slot is None else os.close(slot.fd)

    def do_pread(self, number: int, offset: int, size: int) -> Outcome:
        """Read at an offset."""
        slot = self.slots.get(number)
        if slot is None:
            return NOTHING
        if not slot.direct:
            return os.pread(slot.fd, size, offset)
        with mmap.mmap(-1, max(_aligned(size), SECTOR)) as buffer:
            count = os.preadv(slot.fd, [memoryview(buffer)[: _aligned(size)]], _aligned(offset))
            return buffer[:count]

    def do_pwrite(self, number: int, offset: int, size: int, tag: int) -> Outcome:
        """Write at an offset, or at the end with O_APPEND."""
        slot = self.slots.get(number)
        if slot is None:
            return NOTHING
        if not slot.direct:
            return os.pwrite(slot.fd, content(tag, size), offset)
        if slot.flags & os.O_APPEND:
            return NOTHING  # the end of the file need not be aligned
        with mmap.mmap(-1, max(_aligned(size), SECTOR)) as buffer:
            buffer[: _aligned(size)] = content(tag, _aligned(size))
            return os.pwritev(slot.fd, [memoryview(buffer)[: _aligned(size)]], _aligned(offset))

    def do_read(self, number: int, size: int) -> Outcome:
        """Read at the slot's position."""
        slot = self.slots.get(number)
        return NOTHING if slot is None or slot.direct else os.read(slot.fd, size)

    def do_write(self, number: int, size: int, tag: int) -> Outcome:
        """Write at the slot's position, or at the end with O_APPEND."""
        slot = self.slots.get(number)
        return NOTHING if slot is None or slot.direct else os.write(slot.fd, content(tag, size))

    def do_seek(self, number: int, offset: int, whence: int) -> Outcome:
        """Move the position; not in a directory, where every filesystem counts differently."""
        slot = self.slots.get(number)
        if slot is None or stat.S_ISDIR(os.fstat(slot.fd).st_mode):
            return NOTHING
        return os.lseek(slot.fd, offset, whence)

    def do_ftruncate(self, number: int, size: int) -> Outcome:
        """Set the size."""
        slot = self.slots.get(number)
        return NOTHING if slot is None else os.ftruncate(slot.fd, size)

    def do_sync(self, number: int, data_only: bool) -> Outcome:
        """Call fsync or fdatasync."""
        slot = self.slots.get(number)
        return NOTHING if slot is None else (os.fdatasync if data_only else os.fsync)(slot.fd)

    def do_fstat(self, number: int) -> Outcome:
        """Stat an open file, which may be unlinked."""
        slot = self.slots.get(number)
        return NOTHING if slot is None else self._describe(os.fstat(slot.fd))

    def do_allocate(self, number: int, offset: int, size: int) -> Outcome:
        """Allocate with posix_fallocate, which writes if the filesystem has no fallocate(2)."""
        slot = self.slots.get(number)
        if slot is None or slot.direct or slot.flags & os.O_APPEND or slot.flags & os.O_ACCMODE != os.O_RDWR:
            return NOTHING
        return os.posix_fallocate(slot.fd, offset, max(size, 1))

    def do_punch(self, number: int, offset: int, size: int) -> Outcome:
        """Punch a hole with fallocate(2)."""
        slot = self.slots.get(number)
        if slot is None:
            return NOTHING
        libc.fallocate(slot.fd, libc.FALLOC_FL_PUNCH_HOLE | libc.FALLOC_FL_KEEP_SIZE, offset, max(size, 1))
        return 0

    # -- mappings ------------------------------------------------------------------------------------------------

    def do_map(self, number: int, slot_number: int, first: int, pages: int, private: bool) -> Outcome:
        """Map pages of an open file that exist now."""
        self.do_unmap(number)
        slot = self.slots.get(slot_number)
        if slot is None or slot.flags & os.O_ACCMODE == os.O_WRONLY:
            return NOTHING
        st = os.fstat(slot.fd)
        length = min(pages * PAGE, st.st_size - first * PAGE)
        if length <= 0 or not stat.S_ISREG(st.st_mode):
            return NOTHING
        writable = private or slot.flags & os.O_ACCMODE == os.O_RDWR
        access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        kind = mmap.MAP_PRIVATE if private else mmap.MAP_SHARED
        made = mmap.mmap(slot.fd, length, flags=kind, prot=access, offset=first * PAGE)
        self.maps[number] = Mapping(made, first * PAGE, length, writable)
        return length

    def do_unmap(self, number: int) -> Outcome:
        """Unmap."""
        mapping = self.maps.pop(number, None)
        return NOTHING if mapping is None else mapping.map.close()

    def do_mread(self, number: int, offset: int, size: int) -> Outcome:
        """Read from a mapping."""
        mapping = self.maps.get(number)
        return (
            NOTHING if mapping is None else mapping.map[min(offset, mapping.end()) : min(offset + size, mapping.end())]
        )

    def do_mwrite(self, number: int, offset: int, size: int, tag: int) -> Outcome:
        """Write to a mapping."""
        mapping = self.maps.get(number)
        if mapping is None or not mapping.writable:
            return NOTHING
        count = max(0, min(offset + size, mapping.end()) - offset)
        if count:
            mapping.map[offset : offset + count] = content(tag, count)
        return count

    def do_msync(self, number: int) -> Outcome:
        """Call msync."""
        mapping = self.maps.get(number)
        return NOTHING if mapping is None else mapping.map.flush()

    # -- names ---------------------------------------------------------------------------------------------------

    def do_truncate(self, name: str, size: int) -> Outcome:
        """Set the size by name."""
        return os.truncate(self.root / name, size)

    def do_rename(self, old: str, new: str) -> Outcome:
        """Rename, replacing the target."""
        return os.rename(self.root / old, self.root / new)

    def do_link(self, old: str, new: str) -> Outcome:
        """Make a hard link."""
        return os.link(self.root / old, self.root / new, follow_symlinks=False)

    def do_symlink(self, target: str, new: str) -> Outcome:
        """Make a symbolic link."""
        return os.symlink(target, self.root / new)

    def do_readlink(self, name: str) -> Outcome:
        """Read a symbolic link."""
        return os.readlink(self.root / name)

    def do_unlink(self, name: str) -> Outcome:
        """Remove a name."""
        return os.unlink(self.root / name)

    def do_mkdir(self, name: str) -> Outcome:
        """Make a directory."""
        return os.mkdir(self.root / name, 0o750)

    def do_rmdir(self, name: str) -> Outcome:
        """Remove a directory."""
        return os.rmdir(self.root / name)

    def do_chmod(self, name: str, mode: int) -> Outcome:
        """Change the mode."""
        return os.chmod(self.root / name, mode)

    def do_stat(self, name: str) -> Outcome:
        """Stat a name."""
        return self._describe(os.lstat(self.root / name))

    def do_list(self, name: str) -> Outcome:
        """List a directory."""
        return sorted(os.listdir(self.root / name))

    def do_whole(self, name: str) -> Outcome:
        """Read a file from beginning to end."""
        fd = os.open(self.root / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            with os.fdopen(fd, "rb", closefd=False) as file:
                return file.read()
        finally:
            os.close(fd)

    @staticmethod
    def _describe(st: os.stat_result) -> tuple[str, int, int]:
        size = -1 if stat.S_ISDIR(st.st_mode) else st.st_size
        return stat.filemode(st.st_mode), st.st_nlink, size


def _aligned(number: int) -> int:
    return number // SECTOR * SECTOR
