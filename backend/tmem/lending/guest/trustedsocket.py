"""Connects to a socket only if a trusted user listens there.

A guest sends its arena to the listener, which can then read and change all its pages. In a directory that others can
write to, anybody can create the socket when tmemd is not running. So a socket in such a directory is not used, and the
listener's user is checked before anything is sent (SO_PEERCRED has the user that called listen(2); root if it was
systemd). The sticky bit does not help: it protects existing names only.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import socket
import stat
import struct

from tmemcommon.sizes import ConfigError

_CREDENTIALS = struct.Struct("iII")


class Untrusted(OSError):
    """Another user listens there, or could. `user` is that user, if naming it as the owner is a remedy."""

    def __init__(self, reason: str, user: str | None) -> None:
        super().__init__(None, reason)
        self._user = user

    def remedy(self, option: str) -> str:
        """Return what to do; `option` is the command-line option for the owner."""
        return (
            f"give {option} {self._user} if that user is meant"
            if self._user
            else "use a socket in a directory that only root or you can write to"
        )


def parse_user(text: str) -> int:
    """Parse a user name or number into a uid."""
    try:
        return int(text) if text.isdecimal() else pwd.getpwnam(text).pw_uid
    except KeyError:
        raise ConfigError(f"user '{text}' does not exist: give one that `getent passwd` lists") from None


def connect(connection: socket.socket, path: str, owner: int | None = None) -> None:
    """Connect if root, this user or the owner listens. Raises Untrusted, and OSError as connect(2) does."""
    trusted = {0, os.geteuid(), *(() if owner is None else (owner,))}
    for directory in {os.path.dirname(os.path.abspath(path)), os.path.dirname(os.path.realpath(path))}:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):  # connect reports it better
            status = os.stat(directory)
            if status.st_uid not in trusted:
                user = _name(status.st_uid)
                raise Untrusted(f"'{directory}' belongs to user {user}, neither root nor you", user)
            if is_open_to_others(status.st_mode):
                raise Untrusted(f"others may write to '{directory}' and take the socket's place", None)
    connection.connect(path)
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(credentials)
    if uid not in trusted:
        raise Untrusted(f"user {_name(uid)} listens there, neither root nor you", _name(uid))


def is_open_to_others(mode: int) -> bool:
    """Return whether users other than its owner can create files in a directory of this mode."""
    return bool(mode & (stat.S_IWGRP | stat.S_IWOTH))


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
