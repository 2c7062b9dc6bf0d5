"""The control socket of a mount, as both ends know it: where it is, what is said on it, and how to ask.

A mount that is read-only or hangs cannot be controlled through its own files, so the commands ask its process. A
connection carries one request and one answer, each a msgpack message that ends with its half of the stream. Who asks
has to be root or the mount's owner, and who answers as well: the socket is in a directory of its owner alone, and each
end looks at the other's credentials.

The name is the device number of the mount: no two that are mounted share one, and whoever sees the mount knows it. A
socket of that number that was there before belonged to a mount that has ended.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import msgspec

from tmemcommon.commandline import CommandError
from tmemcommon.mountinfo import MountEntry
from tmemcommon.texts import printable
from tmemfs.config import ConfigError
from tmemfs.statefiles import state_directory

MAX_REQUEST = 1 << 16  # bytes
MAX_ANSWER = 1 << 20
ANSWER_SECONDS = 30.0  # a busy machine can take its time
ROOTS_DIRECTORY = Path("/run/tmemfs")
_QUEUE_SECONDS = 0.02
_CREDENTIALS = struct.Struct("iII")  # pid, uid, gid


class Request(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """Ask for a control file's content, or for what `data` makes of it when that is written to it."""

    name: str
    data: bytes | None = None


class Answer(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """Give the content, or say in one line why not; `misused` when the request is to blame for that."""

    data: bytes = b""
    error: str | None = None
    misused: bool = False

    def __post_init__(self) -> None:
        if self.error is not None:  # it may quote a path, which need not be text
            self.error = printable(" ".join(self.error.split()))


class RemoteError(CommandError):
    """Report that a mount could not do what it was asked, in one line."""


def socket_name(device: str) -> str:
    """Name the socket of the mount with a device number."""
    return f"{device}.sock"


def directories(owner: int) -> Iterator[Path]:
    """Say where the sockets of a user's mounts may be, the first choice first."""
    if owner == 0:
        yield ROOTS_DIRECTORY
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


@contextlib.contextmanager
def connected(mount: MountEntry, seconds: float = ANSWER_SECONDS) -> Iterator[socket.socket]:
    """Connect to the process behind a mount. Raises RemoteError."""
    place = f"'{mount.mountpoint}'"
    if os.geteuid() not in (0, mount.owner):
        raise RemoteError(f"{place} may be controlled by root and its owner (uid {mount.owner}) alone: use sudo")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(seconds)
        for directory in directories(mount.owner):
            try:
                with opened(directory) as fd:  # a path in it may be longer than an address can be
                    _connect(connection, f"/proc/self/fd/{fd}/{socket_name(mount.device)}", seconds)
            except (FileNotFoundError, NotADirectoryError, PermissionError):
                continue
            except ConnectionRefusedError:
                raise RemoteError(f"{place} has no process any more: run tmemfs umount {mount.mountpoint}") from None
            except OSError as error:
                raise _no_answer(mount) from error
            _, uid = peer(connection)
            if uid not in (0, mount.owner):
                raise RemoteError(f"the control socket of {place} in '{directory}' is held by uid {uid}: remove it")
            yield connection
            return
    looked = " or ".join(f"'{directory}'" for directory in directories(mount.owner))
    raise RemoteError(
        f"{place} has no control socket in {looked}: ask where it was mounted (its log says why there is none), or use "
        "the files in its control directory"
    )


def ask(mount: MountEntry, name: str, data: bytes | None = None, seconds: float = ANSWER_SECONDS) -> bytes:
    """Read a control file of a mount, or write to it, through its socket.

    Raises ConfigError when the mount says that the request is wrong, and RemoteError for every other failure, at the
    latest after `seconds`.
    """
    deadline = time.monotonic() + seconds
    request = msgspec.msgpack.encode(Request(name, data))
    if len(request) > MAX_REQUEST:
        raise ConfigError(f"request '{name}' is longer than {MAX_REQUEST} bytes: give a shorter path")
    with connected(mount, seconds) as connection:
        try:
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            content = _receive(connection, deadline)
        except TimeoutError as error:
            raise _no_answer(mount) from error
        except OSError as error:
            raise RemoteError(f"'{mount.mountpoint}' hung up: {error.strerror}; its log may say why") from error
    try:
        answer = msgspec.msgpack.decode(content, type=Answer)
    except ValueError:  # also what is not UTF-8, which is no DecodeError
        raise RemoteError(f"'{mount.mountpoint}' answers nothing that can be understood: is it busy?") from None
    if answer.error is None:
        return answer.data
    text = f"'{mount.mountpoint}': {answer.error}"
    raise ConfigError(text) if answer.misused else RemoteError(text)


def _connect(connection: socket.socket, address: str, seconds: float) -> None:
    """Connect, in time: a queue that is full may get shorter, and the kernel tells a socket with a time-out at once."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            connection.connect(address)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_QUEUE_SECONDS)


def remove_stale(mount: MountEntry) -> None:
    """Remove the socket of a mount whose process was killed; to be called while it still has its number."""
    for directory in directories(mount.owner):
        with contextlib.suppress(OSError), opened(directory) as fd, socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            try:
                probe.connect(f"/proc/self/fd/{fd}/{socket_name(mount.device)}")
            except ConnectionRefusedError:
                os.unlink(socket_name(mount.device), dir_fd=fd)


class Connected(Protocol):
    """A connected socket, of this process or of a scheduler."""

    def getsockopt(self, level: int, name: int, length: int, /) -> bytes:
        """Read an option."""


def peer(connection: Connected) -> tuple[int, int]:
    """Return pid and uid of the process at the other end; the pid is 0 when it is in a pid namespace not seen here."""
    pid, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, uid


@contextlib.contextmanager
def opened(directory: Path) -> Iterator[int]:
    """Open a directory for paths that begin in it."""
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _receive(connection: socket.socket, deadline: float) -> bytes:
    """Receive to the end of the stream. Raises TimeoutError at the deadline, OSError for too much."""
    content = bytearray()
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        connection.settimeout(left)
        piece = connection.recv(1 << 16)
        if not piece:
            return bytes(content)
        content += piece
        if len(content) > MAX_ANSWER:
            raise OSError(0, "the answer does not end")


def _no_answer(mount: MountEntry) -> RemoteError:
    return RemoteError(f"'{mount.mountpoint}' does not answer: it hangs; tmemfs umount --lazy takes it away")
