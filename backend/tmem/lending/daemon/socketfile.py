"""The socket that tmemd listens on: its path, mode and group, and that only one tmemd has it.

Mode and group of the file decide who may borrow: connecting needs write permission. A lock beside the socket tells a
tmemd that was killed (its socket is stale and goes) from one that runs (the newcomer refuses): trying to connect
alone would let two that start at once remove each other's socket.
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

MACHINES = Path("/run/tmemd.sock")
BACKLOG = 256
_FIRST_PASSED_FD = 3  # systemd's convention
_PATH_BYTES = 107  # sun_path without its end


def default_path() -> Path:
    """Choose where this user's tmemd listens. Raises ConfigError where there is no place for one."""
    if os.geteuid() == 0:
        return MACHINES
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if not runtime:
        raise ConfigError("no socket is given and XDG_RUNTIME_DIR is not set: give --socket PATH")
    return Path(runtime) / "tmemd.sock"


def likely_path() -> Path:
    """Choose which tmemd is meant where none is named: this user's own if there is one, else the machine's."""
    with contextlib.suppress(ConfigError):
        if default_path().exists():
            return default_path()
    return MACHINES


def parse_mode(text: str) -> int:
    """Parse the octal mode of the socket file."""
    if not text.isdecimal() or set(text) & set("89") or len(text) > 4 or int(text, 8) > 0o777:
        raise ConfigError(f"mode '{text}' is not understood: write for instance 0660")
    return int(text, 8)


class SocketFile:
    """A listening socket and, unless systemd passed it, the file and the lock that belong to it."""

    def __init__(self, listener: socket.socket, path: Path, lock: int | None, inode: int | None) -> None:
        self.listener = listener
        self.path = path
        self._lock = lock
        self._inode = inode

    @classmethod
    def create(cls, path: Path, mode: int = 0o660, group: str | None = None) -> SocketFile:
        """Listen on `path`, in the place of a socket that nobody listens on. Raises ConfigError."""
        if len(os.fsencode(path)) > _PATH_BYTES:
            raise ConfigError(f"socket path '{path}' is longer than {_PATH_BYTES} bytes: give a shorter one")
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
        """Take the socket that systemd passed; None when it passed none. Raises ConfigError for another kind."""
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
        if not os.path.isabs(listener.getsockname()):  # a name has no mode and no group: anybody may connect
            listener.detach()
            raise ConfigError("the passed socket has no absolute path: use ListenStream=PATH")
        listener.setblocking(False)
        os.set_inheritable(listener.fileno(), False)
        return cls(listener, Path(os.fsdecode(listener.getsockname())), None, None)

    def close(self) -> None:
        """Stop listening; take the file away if it is still the one that was made here."""
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
    """Take the lock beside the socket. It is never removed: who removes a lock lets two have it."""
    lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise _taken(path) from None
    return lock


def _taken(path: Path) -> ConfigError:
    return ConfigError(f"another tmemd listens on '{path}': stop it first, or give another path with --socket")


def _remove_stale(path: Path) -> None:
    """Take away what a tmemd that was killed left; refuse what is not such a thing."""
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
        except BlockingIOError:  # its queue is full: somebody has it
            raise _taken(path) from None
        else:
            raise _taken(path)


def _bind(path: Path, mode: int, gid: int) -> socket.socket:
    """Make the file nobody may connect to, give it group and mode, and only then listen."""
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
