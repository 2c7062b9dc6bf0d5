"""The client of the control socket: send one request to a mount's process and wait for the answer, in bounded time."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from tmemcommon.commandline import CommandError
from tmemcommon.mountinfo import MountEntry
from tmemcommon.sizes import ConfigError
from tmemfs.lifecycle.controlsocket import MAX_ANSWER, MAX_REQUEST, Answer, Request, directories, peer, socket_name

ANSWER_SECONDS = 30.0  # on a busy machine an answer may take long
_BACKLOG_SECONDS = 0.02  # between two tries while the server's backlog is full


class RemoteError(CommandError):
    """A mount could not do what it was asked to do; the message is one line."""


@contextlib.contextmanager
def connected(mount: MountEntry, seconds: float = ANSWER_SECONDS) -> Iterator[socket.socket]:
    """Connect to the process of a mount. Raises RemoteError."""
    name = f"'{mount.mountpoint}'"
    if os.geteuid() not in (0, mount.owner):
        raise RemoteError(f"only root and its owner (uid {mount.owner}) may control {name}: use sudo")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(seconds)
        for directory in directories(mount.owner):
            try:
                with _opened(directory) as fd:  # the path itself may be longer than a socket address
                    _connect(connection, f"/proc/self/fd/{fd}/{socket_name(mount.device)}", seconds)
            except (FileNotFoundError, NotADirectoryError, PermissionError):
                continue
            except ConnectionRefusedError:
                raise RemoteError(f"{name} has no process any more: run tmemfs umount {mount.mountpoint}") from None
            except OSError as error:
                raise _no_answer(mount) from error
            _, uid = peer(connection)
            if uid not in (0, mount.owner):
                raise RemoteError(f"the control socket of {name} in '{directory}' is held by uid {uid}: remove it")
            yield connection
            return
    places = " or ".join(f"'{directory}'" for directory in directories(mount.owner))
    raise RemoteError(
        f"{name} has no control socket in {places}: run this where it was mounted (its log says why there is none), or "
        "use the files in its control directory"
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
            raise RemoteError(f"'{mount.mountpoint}' ended the connection: {error.strerror}; see its log") from error
    try:
        answer = msgspec.msgpack.decode(content, type=Answer)
    except ValueError:  # a text that is not UTF-8 raises no DecodeError
        raise RemoteError(
            f"'{mount.mountpoint}' sends an answer that is not understood: check that it is tmemfs of this version"
        ) from None
    if answer.error is None:
        return answer.data
    text = f"'{mount.mountpoint}': {answer.error}"
    raise ConfigError(text) if answer.misused else RemoteError(text)


def _connect(connection: socket.socket, address: str, seconds: float) -> None:
    """Connect; retry while the backlog is full: with a time-out set, connect(2) does not wait for that."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            connection.connect(address)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_BACKLOG_SECONDS)


def remove_stale(mount: MountEntry) -> None:
    """Remove the socket of a mount whose process was killed. Call it before the unmount frees the device number."""
    for directory in directories(mount.owner):
        with contextlib.suppress(OSError), _opened(directory) as fd, socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            try:
                probe.connect(f"/proc/self/fd/{fd}/{socket_name(mount.device)}")
            except ConnectionRefusedError:
                os.unlink(socket_name(mount.device), dir_fd=fd)


@contextlib.contextmanager
def _opened(directory: Path) -> Iterator[int]:
    """Open a directory, for paths relative to it."""
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _receive(connection: socket.socket, deadline: float) -> bytes:
    """Receive to the end of the stream. Raises TimeoutError at the deadline, OSError after MAX_ANSWER bytes."""
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
            raise OSError(errno.EMSGSIZE, "its answer is too long")


def _no_answer(mount: MountEntry) -> RemoteError:
    return RemoteError(f"'{mount.mountpoint}' does not answer: it hangs; tmemfs umount --lazy removes it")
