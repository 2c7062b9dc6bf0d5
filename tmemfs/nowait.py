"""Read what the kernel has in memory. Where a call might wait for a disk, raise BlockingIOError instead.

For the event loop, which must not block.

* Names are looked up in the kernel's dentry cache alone (openat2(2) with RESOLVE_CACHED, Linux 5.12). A negative dentry
  is an answer, too. The name must be on the filesystem of its directory, and that must be local: then the stat comes
  from memory.
* File data is read with RWF_NOWAIT after cachestat(2) (Linux 6.5) has shown that all of it is cached. RWF_NOWAIT alone
  would start a read of the missing pages, and look up on the disk where they are.

Where the kernel or a seccomp filter does not offer these calls, every call raises BlockingIOError.
"""

from __future__ import annotations

import errno
import os

from tmem.arena import PAGE_SHIFT
from tmemcommon import libc

_cached_path = libc.PathOpener(libc.RESOLVE_CACHED | libc.RESOLVE_NO_XDEV)


def stat_name(dir_fd: int, name: bytes) -> os.stat_result | None:
    """Return the stat of a name in a directory, or None where there is none."""
    fd = _cached_path.open(dir_fd, name)
    if fd < 0:
        if fd == -errno.ENOENT:
            return None
        raise BlockingIOError  # not in memory, on another filesystem, or not offered
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def read(fd: int, buffer: bytearray, offset: int) -> None:
    """Fill a buffer with the bytes of a file from `offset` on. After BlockingIOError, its content is undefined."""
    first, last = offset >> PAGE_SHIFT, (offset + len(buffer) - 1) >> PAGE_SHIFT
    try:
        if libc.cached_pages(fd, offset, len(buffer)) <= last - first:
            raise BlockingIOError
        done = os.preadv(fd, [buffer], offset, os.RWF_NOWAIT)
    except OSError:  # not offered; any other error comes again from the read in a thread
        raise BlockingIOError from None
    if done < len(buffer):
        raise BlockingIOError
