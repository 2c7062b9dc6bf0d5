"""The mount's end of its control socket: answers from the event loop, whatever the backing and the mount do.

Everything is bounded: who may ask, a request and the time that it may take to come, connections, and requests that have
not been answered because they wait for the backing. Those that only read never wait.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import msgspec
import trio

from tmemfs.fuse.virtualfiles import InvalidInput
from tmemfs.kernel.mounttable import mount_table
from tmemfs.lifecycle.controlsocket import MAX_REQUEST, Answer, Request, directories, peer, socket_name
from tmemfs.statefiles import make_private

log = logging.getLogger(__name__)

BACKLOG = 64
MAX_CONNECTIONS = 64
MAX_CHANGES = 16  # that are being made at once
REQUEST_SECONDS = 5.0  # for a request to come, and for an answer to be taken
REMOVE_SECONDS = 2.0  # that the end of the mount waits for its socket to be removed
_NO_DESCRIPTOR_SECONDS = 0.1
_LOCK_SECONDS = 0.05


class Asked(Protocol):
    """What the socket leads to."""

    async def call(self, name: bytes, data: bytes | None) -> bytes:
        """Read a control file, or write to it."""


class ControlServer:
    """The control socket of one mount. Its file is made and removed in a thread: it may be on a disk."""

    def __init__(self, control: Asked) -> None:
        self._control = control
        self._listener: socket.socket | None = None
        self._directory = -1
        self._name = ""
        self._inode = 0
        self._connections = 0
        self._changes = 0
        self._scope = trio.CancelScope()
        self._stopped = trio.Event()
        self._limiter = trio.CapacityLimiter(1)  # other threads may hang in the backing

    async def run(self, device: str, task_status: trio.TaskStatus[Path] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen and answer until stopped, started with the socket's path; OSError when it cannot be made."""
        try:
            path = await trio.to_thread.run_sync(self._open, device, limiter=self._limiter)
            try:
                with self._scope:
                    task_status.started(path)
                    await self._accept()
            finally:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + REMOVE_SECONDS):
                    await trio.to_thread.run_sync(self._remove, abandon_on_cancel=True, limiter=self._limiter)
        finally:
            self._stopped.set()

    async def stop(self) -> None:
        """Stop answering, and wait until the socket is removed. Only after `run` was begun."""
        self._scope.cancel()
        await self._stopped.wait()

    def _open(self, device: str) -> Path:
        """Listen; return the socket's path. Raises OSError when no directory for it can be used."""
        if not device:
            raise FileNotFoundError(errno.ENOENT, "the mount table does not show the mount")
        trouble: OSError | None = None
        for directory in directories(os.geteuid()):
            try:
                self._directory = _private_directory(directory)
            except OSError as error:
                trouble = trouble or error
                continue
            with _locked(self._directory) as is_locked:
                if is_locked:
                    _remove_stale(self._directory)
                self._listen(socket_name(device))
            return directory / self._name
        assert trouble is not None
        raise trouble

    def _listen(self, name: str) -> None:
        """Listen under another name first, so that a socket of the right one has somebody who listens, or is stale."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        fresh = f".{os.getpid()}"
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(fresh, dir_fd=self._directory)
            listener.bind(f"/proc/self/fd/{self._directory}/{fresh}")
            os.chmod(fresh, 0o600, dir_fd=self._directory)
            listener.listen(BACKLOG)
            self._inode = _inode_of(fresh, self._directory)
            os.rename(fresh, name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        except BaseException:
            listener.close()
            raise
        self._listener, self._name = listener, name

    def _remove(self) -> None:
        """Stop listening, and remove the socket if it has not been replaced."""
        assert self._listener is not None
        with contextlib.suppress(OSError), _locked(self._directory, attempts=1) as is_locked:
            # Without the lock it is left to whoever removes what is stale.
            if is_locked and _inode_of(self._name, self._directory) == self._inode:
                os.unlink(self._name, dir_fd=self._directory)
        self._listener.close()
        os.close(self._directory)

    async def _accept(self) -> None:
        """Take connections."""
        assert self._listener is not None
        listener = trio.socket.from_stdlib_socket(self._listener)
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    connection, _ = await listener.accept()
                except OSError as error:
                    log.warning("no control connection can be taken: %s", error.strerror)
                    await trio.sleep(_NO_DESCRIPTOR_SECONDS)
                    continue
                if self._connections >= MAX_CONNECTIONS:
                    connection.close()
                    continue
                self._connections += 1
                nursery.start_soon(self._serve, connection)

    async def _serve(self, connection: trio.socket.SocketType) -> None:
        """Take one request and answer it."""
        try:
            with connection:
                answer = await self._answer(connection)
                with trio.move_on_after(REQUEST_SECONDS):
                    await trio.SocketStream(connection).send_all(msgspec.msgpack.encode(answer))
        except (OSError, trio.BrokenResourceError):
            pass  # who asked has gone
        except Exception:
            log.exception("a control request failed unexpectedly")
        finally:
            self._connections -= 1

    async def _answer(self, connection: trio.socket.SocketType) -> Answer:
        """Find out what is asked, and by whom, and do it."""
        content = bytearray()
        with trio.move_on_after(REQUEST_SECONDS) as waiting:
            while len(content) <= MAX_REQUEST and (piece := await connection.recv(MAX_REQUEST)):
                content += piece
        if waiting.cancelled_caught or len(content) > MAX_REQUEST:
            return Answer(error="the request does not end", misused=True)
        _, uid = peer(connection)  # not before: who closes without having read is heard by nobody
        if uid not in (0, os.geteuid()):
            return Answer(error=f"only root and uid {os.geteuid()} may ask: use sudo")
        try:
            request = msgspec.msgpack.decode(content, type=Request)
        except ValueError as error:  # also what is not UTF-8, which is no DecodeError
            return Answer(error=f"the request is not understood: {error}", misused=True)
        return await self._do(request)

    async def _do(self, request: Request) -> Answer:
        """Read, or change something unless too many changes have not ended yet."""
        name = request.name.encode(errors="replace")
        if request.data is not None and self._changes >= MAX_CHANGES:
            return Answer(error=f"{self._changes} requests wait already: its backing hangs, or its cache shrinks")
        self._changes += request.data is not None
        try:
            return Answer(await self._control.call(name, request.data))
        except InvalidInput as error:
            return Answer(error=str(error), misused=True)
        except OSError as error:
            return Answer(error=error.strerror or str(error))
        finally:
            self._changes -= request.data is not None


def _private_directory(path: Path) -> int:
    """Open a directory of ours that nobody else may enter; made if it is missing. Raises OSError."""
    make_private(path)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if found.st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, f"it belongs to uid {found.st_uid}", os.fspath(path))
        if stat.S_IMODE(found.st_mode) & 0o077:
            os.fchmod(fd, 0o700)
    except BaseException:
        os.close(fd)
        raise
    return fd


@contextlib.contextmanager
def _locked(directory: int, attempts: int = 40) -> Iterator[bool]:
    """Lock a directory of sockets, for who removes one and who puts one in its place; False if it stays locked."""
    for attempt in range(attempts):
        if attempt:
            time.sleep(_LOCK_SECONDS)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
    else:
        yield False
        return
    try:
        yield True
    finally:
        fcntl.flock(directory, fcntl.LOCK_UN)


def _inode_of(name: str, directory: int) -> int:
    return os.stat(name, dir_fd=directory, follow_symlinks=False).st_ino


def _remove_stale(directory: int) -> None:
    """Remove the sockets of mounts that were killed, unless they are still mounted: nobody listens on them."""
    mounted = {socket_name(entry.device) for entry in mount_table()}
    for name in os.listdir(directory):
        if not name.endswith(".sock") or name in mounted:
            continue
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                probe.connect(f"/proc/self/fd/{directory}/{name}")
            except ConnectionRefusedError:
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=directory)
            except OSError:
                continue  # its queue is full: somebody has it
