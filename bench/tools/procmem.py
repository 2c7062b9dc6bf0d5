"""Measure the memory and the processor time of a process."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_longlong)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.POINTER(ctypes.c_ubyte))
_MAP_FAILED = ctypes.c_void_p(-1).value


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one process."""

    pss: int  # proportional set size of everything mapped but shared memory
    memfd: int  # blocks behind its memfds, mapped or not

    @property
    def total(self) -> int:
        """The sum."""
        return self.pss + self.memfd


def of(pid: int) -> Memory:
    """Return the memory of a process."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    sizes = {name: int(rest.split()[0]) << 10 for name, _, rest in (line.partition(":") for line in lines)}
    return Memory(sizes["Pss"] - sizes["Pss_Shmem"], _memfd_bytes(pid))


def family(pid: int) -> list[int]:
    """Return a process and the processes that it has started."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that has ended
            found += map(int, (task / "children").read_text().split())
    return found


def _memfd_bytes(pid: int) -> int:
    """Return the bytes behind the memfds of a process, each memfd once."""
    blocks: dict[int, int] = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            if os.readlink(entry).startswith("/memfd:"):
                found = entry.stat()
                blocks[found.st_ino] = found.st_blocks * 512
    return sum(blocks.values())


def in_page_cache(fd: int, size: int, *, touch: bool) -> int:
    """Map an open file, read its pages if `touch`, and return how many of its bytes the kernel then has in memory.

    One mapping does both: with direct I/O, every open and every mmap of a FUSE file drops its pages.
    """
    present = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    if address is None or address == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), "mmap")
    try:
        for start in range(0, size, mmap.PAGESIZE) if touch else ():
            ctypes.string_at(address + start, 1)
        if _libc.mincore(address, size, present) != 0:
            raise OSError(ctypes.get_errno(), "mincore")
    finally:
        _libc.munmap(address, size)
    return sum(byte & 1 for byte in present) * mmap.PAGESIZE


def run_seconds(pid: int) -> float:
    """Return the processor time of a process, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def thread_times(pid: int) -> dict[str, int]:
    """Return the processor time of each thread of a process, in nanoseconds."""
    times = {}
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # ended meanwhile
            times[thread.name] = int((thread / "schedstat").read_text().split()[0])
    return times


def seconds_since(before: dict[str, int], pid: int) -> float:
    """Return the processor time of a process since its `thread_times`, in nanoseconds: for short times."""
    return sum(now - before.get(thread, 0) for thread, now in thread_times(pid).items()) / 1e9


def main_thread_seconds(pid: int) -> float:
    """Return the processor time of a process's first thread, in nanoseconds: for processes that hardly run."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
