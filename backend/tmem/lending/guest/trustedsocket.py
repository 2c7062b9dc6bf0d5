"""Connect to tmemd's socket, and to nobody else's.

A guest hands its arena to who listens, and tmemctl its verbs. In a directory in which others may write, anybody can
take the socket's place as soon as tmemd is gone: he could read and change every page that is put. So nothing is sent
before it is known who listens (SO_PEERCRED tells who called listen(2), for a socket of systemd's root), and a socket in
such a directory is not used at all. The sticky bit does not help: it protects a name that is there, not a vacant one.
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
    """Somebody else listens there, or could. `user` is who, where that may be meant."""

    def __init__(self, reason: str, user: str | None) -> None:
        super().__init__(None, reason)
        self._user = user

    def remedy(self, option: str) -> str:
        """Say what to do, in a few words; `option` names the owner."""
        return f"give {option} {self._user} if that user is meant" if self._user else "use one in a directory of root's"


def parse_user(text: str) -> int:
    """Parse a user's name or number."""
    try:
        return int(text) if text.isdecimal() else pwd.getpwnam(text).pw_uid
    except KeyError:
        raise ConfigError(f"user '{text}' does not exist: give one that `getent passwd` lists") from None


def connect(connection: socket.socket, path: str, owner: int | None = None) -> None:
    """Connect where root, this user or the owner listens. Raises Untrusted, and OSError as connect(2) does."""
    trusted = {0, os.geteuid(), *(() if owner is None else (owner,))}
    for directory in {os.path.dirname(os.path.abspath(path)), os.path.dirname(os.path.realpath(path))}:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):  # connecting says it better
            about = os.stat(directory)
            if about.st_uid not in trusted:
                user = _name(about.st_uid)
                raise Untrusted(f"'{directory}' belongs to user {user}, neither root nor you", user)
            if is_open_to_others(about.st_mode):
                raise Untrusted(f"others may write to '{directory}' and take the socket's place", None)
    connection.connect(path)
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(credentials)
    if uid not in trusted:
        raise Untrusted(f"user {_name(uid)} listens there, neither root nor you", _name(uid))


def is_open_to_others(mode: int) -> bool:
    """Tell whether others than its owner may put a socket into a directory of that mode."""
    return bool(mode & (stat.S_IWGRP | stat.S_IWOTH))


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
