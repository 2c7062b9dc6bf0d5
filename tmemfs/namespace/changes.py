"""Carry out a setattr: mode, owner, times.

The kernel has checked who may do it. A time that is to be that of now arrives as the kernel's time of now: only who
owns the file may set any other, so where the backing takes us for somebody who does not own it but may write to it, it
is the time of now that was asked for.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from dataclasses import dataclass

_AT_FDCWD = -100
_UTIME_NOW = (1 << 30) - 1
_UTIME_OMIT = (1 << 30) - 2
_BILLION = 1_000_000_000

_libc = ctypes.CDLL(None, use_errno=True)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


@dataclass(frozen=True, slots=True)
class Changes:
    """What a setattr asks for; None leaves a thing as it is. Times are nanoseconds."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None

    def apply(self, path: str) -> None:
        """Carry them out on a path that leads to the node itself. No change at all is one of the ctime."""
        if self.uid is not None or self.gid is not None or self == Changes():
            os.chown(path, -1 if self.uid is None else self.uid, -1 if self.gid is None else self.gid)
        if self.mode is not None:
            os.chmod(path, stat.S_IMODE(self.mode))
        if self.atime_ns is not None or self.mtime_ns is not None:
            try:
                _set_times(path, _timespec(self.atime_ns), _timespec(self.mtime_ns))
            except OSError as error:
                if error.errno != errno.EPERM or self.atime_ns is None or self.mtime_ns is None:
                    raise
                _set_times(path, _Timespec(0, _UTIME_NOW), _Timespec(0, _UTIME_NOW))


def _timespec(time_ns: int | None) -> _Timespec:
    return _Timespec(0, _UTIME_OMIT) if time_ns is None else _Timespec(*divmod(time_ns, _BILLION))


def _set_times(path: str, atime: _Timespec, mtime: _Timespec) -> None:
    """Set the times as utimensat(2) does; os.utime can leave none of them as it is."""
    if _libc.utimensat(_AT_FDCWD, os.fsencode(path), (_Timespec * 2)(atime, mtime), 0):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), path)
