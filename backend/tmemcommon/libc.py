"""Call the functions of libc and the system calls that Python does not offer.

Each raises OSError from errno, but for `PathOpener.open`, which returns it: it is called in the event loop, where an
exception would cost as much as the call.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Sequence

# fallocate(2)
FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
# umount2(2)
MNT_FORCE = 1
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8
# renameat2(2)
RENAME_EXCHANGE = 2
# utimensat(2), in place of nanoseconds
UTIME_NOW = (1 << 30) - 1
UTIME_OMIT = (1 << 30) - 2
# mlockall(2)
MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT = 1, 2, 4
# prctl(2)
PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_IO_FLUSHER = 57
# openat2(2)
RESOLVE_NO_XDEV, RESOLVE_NO_SYMLINKS, RESOLVE_CACHED = 0x01, 0x04, 0x20

# System call numbers that are the same on all architectures that matter (x86-64, arm64, RISC-V).
_SYS_OPENAT2 = 437
_SYS_CACHESTAT = 451
_SYS_SETGROUPS = {"x86_64": 116, "aarch64": 159, "riscv64": 159, "loongarch64": 159, "ppc64le": 81, "s390x": 206}.get(
    platform.machine()
)
HAS_THREAD_GROUPS = _SYS_SETGROUPS is not None

_AT_FDCWD = -100
_NO_ID = 0xFFFF_FFFF  # setfsuid and setfsgid only return the present id for it

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_libc.prctl.argtypes = (ctypes.c_int, *[ctypes.c_ulong] * 4)

# Indexing a library returns a new function object each time, so these two have argument types of their own.
_openat2 = _libc["syscall"]
_openat2.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t)
_openat2.restype = ctypes.c_long
_cachestat = _libc["syscall"]
_cachestat.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint)
_cachestat.restype = ctypes.c_long

_libc_with_gil = ctypes.PyDLL(None, use_errno=True)  # for calls that take less time than releasing the GIL
_libc_with_gil.setfsuid.argtypes = _libc_with_gil.setfsgid.argtypes = [ctypes.c_uint]


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


class _CacheStatRange(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


_CacheStat = ctypes.c_uint64 * 5  # pages: cached, dirty, under write-back, evicted, recently evicted


def _check(result: int, path: str | None = None) -> None:
    """Raise OSError from errno where a call failed."""
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), *([] if path is None else [path]))


def fallocate(fd: int, mode: int, offset: int, size: int) -> None:
    """Allocate or free a part of a file."""
    _check(_libc.fallocate(fd, mode, offset, size))


def mount(source: str, target: str, fstype: str, flags: int, data: str) -> None:
    """Mount a filesystem."""
    _check(_libc.mount(os.fsencode(source), os.fsencode(target), fstype.encode(), flags, data.encode()), target)


def umount2(target: str, flags: int) -> None:
    """Unmount what is uppermost at a path."""
    _check(_libc.umount2(os.fsencode(target), flags), target)


def renameat2(old_dir_fd: int, old_name: bytes, new_dir_fd: int, new_name: bytes, flags: int) -> None:
    """Rename with flags."""
    _check(_libc.renameat2(old_dir_fd, old_name, new_dir_fd, new_name, flags), os.fsdecode(old_name))


def utimensat(path: str, atime: tuple[int, int], mtime: tuple[int, int]) -> None:
    """Set the times of a file, each as seconds and nanoseconds; os.utime cannot leave one of them as it is."""
    times = (_Timespec * 2)(_Timespec(*atime), _Timespec(*mtime))
    _check(_libc.utimensat(_AT_FDCWD, os.fsencode(path), times, 0), path)


def mlockall(flags: int) -> None:
    """Lock the memory of this process."""
    _check(_libc.mlockall(flags))


def prctl(option: int, value: int) -> None:
    """Set a property of this process or thread."""
    _check(_libc.prctl(option, value, 0, 0, 0))


def set_thread_ids(uid: int, gid: int) -> None:
    """Set the ids that this thread has for files. The kernel refuses without an error: ask `has_thread_ids`."""
    _libc_with_gil.setfsgid(gid)
    _libc_with_gil.setfsuid(uid)


def has_thread_ids(uid: int, gid: int) -> bool:
    """Return whether these are the ids that this thread has for files."""
    return (_libc_with_gil.setfsuid(_NO_ID) & _NO_ID, _libc_with_gil.setfsgid(_NO_ID) & _NO_ID) == (uid, gid)


def set_thread_groups(groups: Sequence[int]) -> None:
    """Set the supplementary groups of this thread; glibc's setgroups would set those of all threads."""
    array = (ctypes.c_uint * len(groups))(*groups)
    _check(_libc_with_gil.syscall(_SYS_SETGROUPS, ctypes.c_size_t(len(groups)), array))


def cached_pages(fd: int, offset: int, size: int) -> int:
    """Return how many pages of a part of a file are in the kernel's page cache (cachestat(2), Linux 6.5)."""
    wanted, found = _CacheStatRange(offset, size), _CacheStat()
    _check(_cachestat(_SYS_CACHESTAT, fd, ctypes.addressof(wanted), ctypes.addressof(found), 0))
    return found[0]


class PathOpener:
    """Open paths with O_PATH under fixed RESOLVE_* rules (openat2(2)); arguments made once save 1 µs a call."""

    def __init__(self, resolve: int) -> None:
        self._how = _OpenHow(os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, 0, resolve)
        self._address, self._size = ctypes.addressof(self._how), ctypes.sizeof(self._how)

    def open(self, dir_fd: int, path: bytes) -> int:
        """Return a descriptor, or -errno; that is -ENOSYS or -EPERM where the call is missing or filtered."""
        fd: int = _openat2(_SYS_OPENAT2, dir_fd, path, self._address, self._size)
        return fd if fd >= 0 else -ctypes.get_errno()
