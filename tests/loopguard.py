"""Find calls of the event loop's thread that may wait for a disk.

Most calls raise Python audit events; those without are replaced. Allowed are calls of `tmemfs.nowait`, the pool's
memfd, /proc, sockets and pipes, and POSIX_FADV_RANDOM, which only sets a flag on a descriptor.
"""

from __future__ import annotations

import os
import stat
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

_EVENTS = {
    *("open", "os.chmod", "os.chown", "os.getxattr", "os.link", "os.listdir", "os.listxattr", "os.mkdir", "os.remove"),
    *("os.removexattr", "os.rename", "os.rmdir", "os.scandir", "os.setxattr", "os.symlink", "os.truncate", "os.utime"),
}
_WITHOUT_EVENT = (
    *("close", "copy_file_range", "fdatasync", "fsync", "lstat", "mknod", "posix_fadvise", "posix_fallocate", "pread"),
    *("preadv", "pwrite", "readlink", "stat", "statvfs"),
)
_readlink, _fstat = os.readlink, os.fstat


class LoopGuard:
    """Watches the thread that created it, while it is active."""

    def __init__(self, source: str) -> None:
        self.found: dict[str, str] = {}  # call: the stack of its first occurrence
        self._source = source
        self._loop = threading.get_ident()
        self.active = True
        sys.addaudithook(self._hear)
        for name in _WITHOUT_EVENT:
            setattr(os, name, self._watched(name, getattr(os, name)))

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if event in _EVENTS and self._applies() and self._may_wait(args[0]):
            self._note(f"{event} {args[0]!r}")

    def _applies(self) -> bool:
        return self.active and threading.get_ident() == self._loop

    def _may_wait(self, path: object) -> bool:
        """Return whether a path or a descriptor may lead to the backing."""
        if isinstance(path, int):
            return _is_file(path)
        text = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else "?"
        return text.startswith(("/proc/self/fd/", self._source)) or not text.startswith("/")

    def _watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._applies() and self._may_wait(args[0]) and not _is_allowed(name, args):
                self._note(f"os.{name} {args[0]!r}")
            return call(*args, **kwargs)

        return watched

    def _note(self, what: str) -> None:
        stack = "".join(traceback.format_stack(sys._getframe(2), limit=6))
        self.found.setdefault(what.split()[0], f"{what}\n{stack}")

    def check(self) -> None:
        """Raise AssertionError if the loop made a call that may wait."""
        assert not self.found, "\n".join(self.found.values())


def _is_file(fd: int) -> bool:
    try:
        mode = _fstat(fd).st_mode
        return not (stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)) and not _is_memory(fd)
    except OSError:
        return False


def _is_memory(fd: int) -> bool:
    return _readlink(f"/proc/self/fd/{fd}").startswith(("/memfd:", "anon_inode:", "/dev/"))


def _is_allowed(name: str, args: tuple[Any, ...]) -> bool:
    if name == "posix_fadvise":
        return bool(args[3] == os.POSIX_FADV_RANDOM)
    return sys._getframe(2).f_globals.get("__name__") == "tmemfs.nowait"
