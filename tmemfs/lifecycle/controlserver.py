"""The server of the control socket: it answers from the event loop, even while the backing or the mount hangs.

All resources are bounded: the size of a request, the time for it to arrive, connections, and requests that wait for the
backing. Requests that only read never wait.
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

import msgspec
import trio

from tmemfs.fuse.virtualfiles import InvalidInput
from tmemfs.kernel.mounttable import mount_table
from tmemfs.lifecycle.controlsocket import MAX_REQUEST, Answer, Request, directories, peer, socket_name
from tmemfs.statefiles import make_private
from tmemfs.virtual.controlfiles import ControlFiles

log = logging.getLogger(__name__)

BACKLOG = 64
MAX_CONNECTIONS = 64
MAX_CHANGES = 16  # requests that change something, at once
REQUEST_SECONDS = 5.0  # for a request to arrive, and for its answer to be sent
REMOVE_SECONDS = 2.0  # the end of the mount waits no longer for the removal of the socket
_ACCEPT_RETRY_SECONDS = 0.1
_LOCK_RETRY_SECONDS = 0.05
_LOCK_ATTEMPTS = 40


class ControlServer:
    """The control socket of one mount. A thread creates and removes its file, which may be on a disk."""

    def __init__(self, control: ControlFiles) -> None:
        self._control = control
        self._listener: socket.socket | None = None
        self._directory = -1
        self._name = ""
        self._inode = 0
        self._connections = 0
        self._changes = 0
        self._scope = trio.CancelScope()
        self._stopped = trio.Event()
        self._limiter = trio.CapacityLimiter(1)  # threads of trio's default limiter may all hang in the backing

    async def run(self, device: str, task_status: trio.TaskStatus[Path] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen and answer until stopped; report the socket's path once it listens. Raises OSError if it cannot."""
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
        """Stop answering and wait until the socket is removed. `run` must have been called before."""
        self._scope.cancel()
        await self._stopped.wait()

    def _open(self, device: str) -> Path:
        """Listen; return the socket's path. Raises OSError when none of the directories can be used."""
        if not device:
            raise FileNotFoundError(errno.ENOENT, "the mount is not in the mount table")
        first_error: OSError | None = None
        for directory in directories(os.geteuid()):
            try:
                self._directory = _private_directory(directory)
            except OSError as error:
                first_error = first_error or error
                continue
            with _locked(self._directory) as is_locked:
                if is_locked:
                    _remove_stale(self._directory)
                self._listen(socket_name(device))
            return directory / self._name
        assert first_error is not None
        raise first_error

    def _listen(self, name: str) -> None:
        """Listen under a temporary name, then rename: so a socket that refuses connections is stale."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        temporary = f".{os.getpid()}"
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=self._directory)
            listener.bind(f"/proc/self/fd/{self._directory}/{temporary}")
            os.chmod(temporary, 0o600, dir_fd=self._directory)
            listener.listen(BACKLOG)
            self._inode = _inode_of(temporary, self._directory)
            os.rename(temporary, name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        except BaseException:
            listener.close()
            raise
        self._listener, self._name = listener, name

    def _remove(self) -> None:
        """Stop listening, and remove the socket if it has not been replaced."""
        assert self._listener is not None
        with contextlib.suppress(OSError), _locked(self._directory, attempts=1) as is_locked:
            # Without the lock it stays, and the next mount removes it as stale.
            if is_locked and _inode_of(self._name, self._directory) == self._inode:
                os.unlink(self._name, dir_fd=self._directory)
        self._listener.close()
        os.close(self._directory)

    async def _accept(self) -> None:
        """Accept connections."""
        assert self._listener is not None
        listener = trio.socket.from_stdlib_socket(self._listener)
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    connection, _ = await listener.accept()
                except OSError as error:
                    log.warning("cannot accept a control connection: %s", error.strerror)
                    await trio.sleep(_ACCEPT_RETRY_SECONDS)
                    continue
                if self._connections >= MAX_CONNECTIONS:
                    connection.close()
                    continue
                self._connections += 1
                nursery.start_soon(self._serve, connection)

    async def _serve(self, connection: trio.socket.SocketType) -> None:
        """Read one request and answer it."""
        try:
            with connection:
                answer = await self._answer(connection)
                with trio.move_on_after(REQUEST_SECONDS):
                    await trio.SocketStream(connection).send_all(msgspec.msgpack.encode(answer))
        except (OSError, trio.BrokenResourceError):
            pass  # the client has gone
        except Exception:
            log.exception("a control request failed unexpectedly")
        finally:
            self._connections -= 1

    async def _answer(self, connection: trio.socket.SocketType) -> Answer:
        """Read a request, check who sent it, and carry it out."""
        content = bytearray()
        with trio.move_on_after(REQUEST_SECONDS) as receiving:
            while len(content) <= MAX_REQUEST and (piece := await connection.recv(MAX_REQUEST)):
                content += piece
        if receiving.cancelled_caught or len(content) > MAX_REQUEST:
            return Answer(error="the request is too long or does not end", misused=True)
        _, uid = peer(connection)  # after reading: a close with unread data would discard the answer
        if uid not in (0, os.geteuid()):
            return Answer(error=f"only root and uid {os.geteuid()} may ask: use sudo")
        try:
            request = msgspec.msgpack.decode(content, type=Request)
        except ValueError as error:  # a text that is not UTF-8 raises no DecodeError
            return Answer(error=f"the request is not understood: {error}", misused=True)
        return await self._carry_out(request)

    async def _carry_out(self, request: Request) -> Answer:
        """Read or write a control file; refuse a write while MAX_CHANGES others have not ended."""
        name = request.name.encode(errors="replace")
        if request.data is not None and self._changes >= MAX_CHANGES:
            return Answer(error=f"{self._changes} requests wait for the backing already: try again later")
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
    """Open a directory with mode 0700 that belongs to us; create it if it is missing. Raises OSError."""
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
def _locked(directory: int, attempts: int = _LOCK_ATTEMPTS) -> Iterator[bool]:
    """Lock a directory while sockets in it are replaced or removed; yield False if another process keeps it locked."""
    for attempt in range(attempts):
        if attempt:
            time.sleep(_LOCK_RETRY_SECONDS)
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
    """Remove sockets that refuse connections: of killed mounts. Keep those of mounts that are still in the table."""
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
                continue  # the backlog is full: it is in use
