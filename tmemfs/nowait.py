"""Ask the kernel for what it has in memory, without waiting for a disk: it answers, or BlockingIOError is raised.

For the event loop, which may do nothing that waits. Names are looked up in the kernel's name cache alone (openat2(2)
with RESOLVE_CACHED, Linux 5.12; a name that is known not to be there is an answer, too). They must be on one local
filesystem, where the stat of what was found comes from memory. File data is read with RWF_NOWAIT after cachestat(2)
(Linux 6.5) has said that all of it is there: of what is not, RWF_NOWAIT alone begins to read some, and looks up on the
disk where it is. Where the kernel or a seccomp filter does not offer these calls, nothing is known without waiting.

The calls are the same numbers on all architectures that matter (x86-64, arm64, RISC-V); Python has no functions for
them. With their arguments made beforehand they cost 0.3 µs more than such a function would.
"""

from __future__ import annotations

import ctypes
import errno
import os

from tmemfs.cache.frames import PAGE_SHIFT
from tmemfs.openat2 import CACHED, NO_XDEV, PathOpener

_CACHESTAT = 451


class _Range(ctypes.Structure):
    """Hold a struct cachestat_range."""

    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


_CacheStat = ctypes.c_uint64 * 5  # cached, dirty, under write-back, evicted, recently evicted

_libc = ctypes.CDLL(None, use_errno=True)
_cachestat = _libc["syscall"]
_cachestat.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint)
_cachestat.restype = ctypes.c_long

_cached_path = PathOpener(CACHED | NO_XDEV)


def stat_name(dir_fd: int, name: bytes) -> os.stat_result | None:
    """Return the stat of a name in a directory, None where there is none; by the event loop alone."""
    fd = _cached_path.open(dir_fd, name)
    if fd < 0:
        if ctypes.get_errno() == errno.ENOENT:
            return None
        raise BlockingIOError  # not in memory, on another filesystem, not offered: a call that may wait finds out
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def read(fd: int, buffer: bytearray, offset: int) -> None:
    """Fill a buffer with a file's bytes from `offset` on; where some are not in memory, what it holds says nothing."""
    first, last = offset >> PAGE_SHIFT, (offset + len(buffer) - 1) >> PAGE_SHIFT
    wanted, found = _Range(offset, len(buffer)), _CacheStat()
    if _cachestat(_CACHESTAT, fd, ctypes.addressof(wanted), ctypes.addressof(found), 0) or found[0] <= last - first:
        raise BlockingIOError
    try:
        done = os.preadv(fd, [buffer], offset, os.RWF_NOWAIT)
    except OSError:  # EOPNOTSUPP: not offered; anything else comes again from the real read
        raise BlockingIOError from None
    if done < len(buffer):
        raise BlockingIOError
