"""The socket that tmemd listens on: its path, mode and group, and a lock so that only one tmemd uses it.

Mode and group of the file decide who may borrow, because connecting needs write permission. The lock beside the socket
tells whether another tmemd runs or was killed, which leaves a stale socket to remove. A trial connection alone is not
enough: two tmemds that start at the same time could remove each other's socket.
"""

from __future__ import annotations

import contextlib
import fcntl
import grp
import os
import socket
import stat
from collections.abc import MutableMapping
from pathlib import Path

from tmemcommon.sizes import ConfigError

SYSTEM_SOCKET = Path("/run/tmemd.sock")
BACKLOG = 256
_FIRST_PASSED_FD = 3  # systemd's convention
_MAX_PATH_BYTES = 107  # sun_path without its final NUL


def default_path() -> Path:
    """Return the default socket of this user's tmemd. Raises ConfigError if there is none."""
    if os.geteuid() == 0:
        return SYSTEM_SOCKET
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if not runtime:
        raise ConfigError("no socket is given and XDG_RUNTIME_DIR is not set: give --socket PATH")
    return Path(runtime) / "tmemd.sock"


def likely_path() -> Path:
    """Return the socket to use if none is named: this user's own if it exists, else the system's."""
    with contextlib.suppress(ConfigError):
        if default_path().exists():
            return default_path()
    return SYSTEM_SOCKET


def parse_mode(text: str) -> int:
    """Parse the octal mode of the socket file."""
    if not text.isdecimal() or set(text) & set("89") or len(text) > 4 or int(text, 8) > 0o777:
        raise ConfigError(f"mode '{text}' is not understood: write an octal mode such as 0660")
    return int(text, 8)


class SocketFile:
    """A listening socket, with its file and lock unless systemd passed it."""

    def __init__(self, listener: socket.socket, path: Path, lock: int | None, inode: int | None) -> None:
        self.listener = listener
        self.path = path
        self._lock = lock
        self._inode = inode

    @classmethod
    def create(cls, path: Path, mode: int = 0o660, group: str | None = None) -> SocketFile:
        """Listen on `path`; replace a stale socket there. Raises ConfigError."""
        if len(os.fsencode(path)) > _MAX_PATH_BYTES:
            raise ConfigError(f"socket path '{path}' is longer than {_MAX_PATH_BYTES} bytes: give a shorter one")
        gid = _group_id(group)
        try:
            lock = _lock(path)
            try:
                _remove_stale(path)
                listener = _bind(path, mode, gid)
            except BaseException:
                os.close(lock)
                raise
        except OSError as error:
            raise ConfigError(
                f"socket '{path}' cannot be made: {error.strerror}; give another path with --socket"
            ) from None
        return cls(listener, path, lock, path.lstat().st_ino)

    @classmethod
    def passed(cls, environ: MutableMapping[str, str] = os.environ) -> SocketFile | None:
        """Return the socket that systemd passed; None if there is none. Raises ConfigError for another kind."""
        pid, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
        environ.pop("LISTEN_FDNAMES", None)
        if pid != str(os.getpid()) or not count.isdecimal() or int(count) == 0:
            return None
        if int(count) != 1:
            raise ConfigError(f"{count} sockets were passed: give one ListenStream= in the socket unit")
        try:
            listener = socket.socket(fileno=_FIRST_PASSED_FD)
            listening = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError as error:
            raise ConfigError(f"the passed descriptor is not a socket: {error.strerror}") from None
        if (listener.family, listener.type, listening) != (socket.AF_UNIX, socket.SOCK_STREAM, 1):
            listener.detach()
            raise ConfigError("the passed socket is not a listening Unix stream socket: use ListenStream=PATH")
        if not os.path.isabs(listener.getsockname()):  # an abstract socket has no mode: anybody may connect
            listener.detach()
            raise ConfigError("the passed socket has no absolute path: use ListenStream=PATH")
        listener.setblocking(False)
        os.set_inheritable(listener.fileno(), False)
        return cls(listener, Path(os.fsdecode(listener.getsockname())), None, None)

    def close(self) -> None:
        """Stop listening; remove the file if it is still the one that was made here."""
        if self._inode is not None:
            with contextlib.suppress(OSError):
                if self.path.lstat().st_ino == self._inode:
                    self.path.unlink()
        self.listener.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _group_id(group: str | None) -> int:
    if group is None:
        return -1
    try:
        return int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
    except KeyError:
        raise ConfigError(f"group '{group}' does not exist: give one that `getent group` lists") from None


def _lock(path: Path) -> int:
    """Take the lock beside the socket. The file is never removed, because two processes could hold the lock then."""
    lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise _in_use(path) from None
    return lock


def _in_use(path: Path) -> ConfigError:
    return ConfigError(f"another tmemd listens on '{path}': stop it first, or give another path with --socket")


def _remove_stale(path: Path) -> None:
    """Remove the socket of a killed tmemd. Raise ConfigError for a socket in use or another file."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ConfigError(f"'{path}' exists and is not a socket: give another path with --socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
        except BlockingIOError:  # its backlog is full, so it is in use
            raise _in_use(path) from None
        else:
            raise _in_use(path)


def _bind(path: Path, mode: int, gid: int) -> socket.socket:
    """Create the file without permissions, set its group and mode, and only then listen."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        before = os.umask(0o777)
        try:
            listener.bind(os.fspath(path))
        finally:
            os.umask(before)
        if gid != -1:
            os.chown(path, -1, gid, follow_symlinks=False)
        os.chmod(path, mode)
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener
