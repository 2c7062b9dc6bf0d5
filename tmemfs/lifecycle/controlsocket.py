"""The control socket of a mount: where it is, and the messages on it.

A mount that is read-only or hangs cannot be controlled through its own files, so the commands send requests to its
process. A connection carries one request and one answer, each a msgpack message that ends with its half of the stream.

Each end accepts only root and the mount's owner at the other end: the socket is in a directory of its owner alone, and
both ends check SO_PEERCRED.

The socket's name is the device number of the mount. It is unique among the mounts of a machine, and everybody who sees
the mount can read it. A socket of that number that exists already belonged to a mount that has ended.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import msgspec

from tmemcommon.texts import printable
from tmemfs.statefiles import state_directory

MAX_REQUEST = 1 << 16  # bytes
MAX_ANSWER = 1 << 20
ROOT_DIRECTORY = Path("/run/tmemfs")
_CREDENTIALS = struct.Struct("iII")  # pid, uid, gid


class Request(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """Read a control file, or with `data` write to it."""

    name: str
    data: bytes | None = None


class Answer(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """The content of the file, or an error of one line; `misused` if the request was wrong."""

    data: bytes = b""
    error: str | None = None
    misused: bool = False

    def __post_init__(self) -> None:
        if self.error is not None:  # it may quote a path with any bytes
            self.error = printable(" ".join(self.error.split()))


def socket_name(device: str) -> str:
    """Return the name of the socket of the mount with a device number."""
    return f"{device}.sock"


def directories(owner: int) -> Iterator[Path]:
    """Yield the directories where the sockets of a user's mounts may be, the preferred one first."""
    if owner == 0:
        yield ROOT_DIRECTORY
        return
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and owner == os.geteuid():
        yield Path(runtime) / "tmemfs"
    yield Path(f"/run/user/{owner}/tmemfs")
    if owner == os.geteuid():
        yield state_directory() / "control"
    else:
        with contextlib.suppress(KeyError):
            yield Path(pwd.getpwuid(owner).pw_dir) / ".local/state/tmemfs/control"


class SocketLike(Protocol):
    """A socket of the standard library or of trio."""

    def getsockopt(self, level: int, name: int, length: int, /) -> bytes:
        """Return an option."""


def peer(connection: SocketLike) -> tuple[int, int]:
    """Return pid and uid of the process at the other end; the pid is 0 if our pid namespace does not have it."""
    pid, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, uid
