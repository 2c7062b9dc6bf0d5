"""Carry out a setattr: mode, owner, times.

The kernel has checked who may do it. A time that is to be that of now arrives as the kernel's time of now: only who
owns the file may set any other, so where the backing takes us for somebody who does not own it but may write to it, it
is the time of now that was asked for.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass

from tmemcommon import libc

_BILLION = 1_000_000_000

_NOW = (0, libc.UTIME_NOW)
_OMIT = (0, libc.UTIME_OMIT)


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
                libc.utimensat(path, _timespec(self.atime_ns), _timespec(self.mtime_ns))
            except OSError as error:
                if error.errno != errno.EPERM or self.atime_ns is None or self.mtime_ns is None:
                    raise
                libc.utimensat(path, _NOW, _NOW)


def _timespec(time_ns: int | None) -> tuple[int, int]:
    return _OMIT if time_ns is None else divmod(time_ns, _BILLION)
