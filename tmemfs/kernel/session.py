"""The session with the kernel: the handshake that makes shared mmap work on files opened with direct I/O.

pyfuse3 cannot set the flags of the INIT reply. So libfuse gets one end of a socketpair as its device; this
module sits on the other end, forwards INIT from /dev/fuse, sets the flags in the reply, and then has the
descriptor that libfuse reads replaced (dup2) by /dev/fuse itself. From then on libfuse and the kernel talk
directly: nothing is relayed, nothing costs.

The replacement must happen while no task waits on the old descriptor: it is done inside the handler of a
FORGET that this module sends for an inode that cannot exist. pyfuse3 calls handlers in the same step in which
it read the request, so between that read and the dup2 there is no await; one checkpoint there would leave a
task waiting for a socket that is gone, and the mount would hang.

Two alternatives lost: relaying every request costs a copy and a wake-up each; a patched pyfuse3 would have to
be built and kept.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import struct
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pyfuse3
import trio

from tmemfs.config import MountConfig
from tmemfs.kernel import eager
from tmemfs.kernel.kernelmount import mount_fuse, unmount

log = logging.getLogger(__name__)

# linux/fuse.h
_OPCODE_FORGET = 2
_OPCODE_INIT = 26
_IN_HEADER = struct.Struct("=IIQQIIIHH")  # len opcode unique nodeid uid gid pid total_extlen padding
_INIT_IN = struct.Struct("=IIIII")  # major minor max_readahead flags flags2
_OUT_HEADER = struct.Struct("=IiQ")  # len error unique
_INIT_OUT = struct.Struct("=IIIIHHIIHHI")  # major minor max_readahead flags max_background congestion ... flags2
_DONT_MASK = 1 << 6
_HANDLE_KILLPRIV = 1 << 19
_INIT_EXT = 1 << 30
_DIRECT_IO_ALLOW_MMAP = 1 << 4  # in flags2

_SENTINEL_INODE = (1 << 64) - 2
_MESSAGE_BYTES = 1 << 16
_HANDSHAKE_SECONDS = 15.0
# A stuck request holds a task: a few hundred readers of a hanging server must not stop the others. Nor may it be the
# kernel that stops them: of background requests (faults of mappings, asynchronous I/O, so also what a loop device does
# for swap) it has 12 under way by default, and all others wait for these.
_MAX_TASKS = 4096
_CONGESTION = _MAX_TASKS * 3 // 4
_MIN_TASKS = 2
_ALIVE_SECONDS = 1.0
_GRACE_SECONDS = 1.0

Forgets = Sequence[tuple[int, int]]


class HandshakeError(Exception):
    """Report that the kernel or libfuse did not take part in the handshake."""


class Session:
    """Be one mounted FUSE connection, from mount to its end."""

    def __init__(self, operations: pyfuse3.Operations, config: MountConfig) -> None:
        self.mountpoint: Path = config.mountpoint
        self.shared_mmap = False
        self.ended = trio.Event()
        self._operations = operations
        self._config = config
        self._fsname = config.options.fsname or os.fspath(config.source)
        self._device = -1  # /dev/fuse, until the switch
        self._libfuse = -1  # the number libfuse reads from: a socket, after the switch /dev/fuse
        self._relay: socket.socket | None = None
        self._request = b""
        self._switched = trio.Event()

    @classmethod
    def open(cls, operations: pyfuse3.Operations, config: MountConfig) -> Session:
        """Mount, and prepare the handshake; plainly through libfuse where it cannot be prepared."""
        session = cls(operations, config)
        session._device = mount_fuse(session._fsname, config.mountpoint, config.options)
        try:
            session._prepare()
        except (HandshakeError, OSError, RuntimeError) as error:
            session._open_plainly(error)
        return session

    def _prepare(self) -> None:
        """Read INIT, give libfuse a socket for a device and pass INIT on to it."""
        self._request = _receive_init(self._device)
        relay, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        relay.setblocking(False)
        self._relay = relay
        # libfuse owns this number from now on and closes it at the end of the session.
        self._libfuse = theirs.detach()
        pyfuse3.init(self._operations, f"/dev/fd/{self._libfuse}", self._config.options.libfuse_words())
        relay.send(self._request)

    def _open_plainly(self, reason: Exception) -> None:
        """Mount again, by libfuse alone."""
        log.warning("shared mmap is off: the handshake with the kernel failed (%s)", reason)
        self._close_handshake()
        self._libfuse = -1
        unmount(self.mountpoint, lazy=True)
        words = self._config.options.plain_words(self._fsname)
        pyfuse3.init(self._operations, os.fspath(self.mountpoint), words)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until the kernel ends the connection; started as soon as the mount answers.

        `ended` is set when no request will come any more. Handlers that hang in the backing may still be
        running then; they end with the task that runs this.
        """
        try:
            if self._relay is not None:
                try:
                    await self._serve(task_status)
                    return
                except HandshakeError as error:
                    pyfuse3.close(unmount=False)
                    self._open_plainly(error)
            await self._serve(task_status)
        finally:
            self.ended.set()

    async def _serve(self, task_status: trio.TaskStatus[None]) -> None:
        """Run the main loop, the handshake first if there is one."""
        failure: HandshakeError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._main_loop, nursery)
            if self._relay is not None:
                try:
                    with trio.fail_after(_HANDSHAKE_SECONDS):
                        await self._shake_hands(self._relay)
                except (trio.TooSlowError, OSError, HandshakeError) as error:
                    failure = HandshakeError(str(error) or "no answer from libfuse")
                    nursery.cancel_scope.cancel()
            if failure is None:
                task_status.started()
                nursery.start_soon(self._watch_connection)
        if failure is not None:
            raise failure

    async def _main_loop(self, nursery: trio.Nursery) -> None:
        """Run pyfuse3 until the connection ends."""
        eager.install()
        await pyfuse3.main(_MIN_TASKS, _MAX_TASKS)
        self.ended.set()
        nursery.cancel_scope.cancel()

    async def _shake_hands(self, relay: socket.socket) -> None:
        """Pass the INIT reply on with our flags in it, then have libfuse's descriptor replaced."""
        await trio.lowlevel.wait_readable(relay)
        reply, self.shared_mmap = patch_init(self._request, relay.recv(_MESSAGE_BYTES))
        os.write(self._device, reply)
        if not self.shared_mmap:
            log.warning("shared mmap is off: this kernel does not offer it for direct I/O (Linux 6.6 does)")
        original = self._operations.forget
        setattr(self._operations, "forget", self._forget_hook(original))  # noqa: B010
        relay.send(_IN_HEADER.pack(48, _OPCODE_FORGET, 0, _SENTINEL_INODE, 0, 0, 0, 0, 0) + bytes(8))
        await self._switched.wait()

    def _forget_hook(
        self, original: Callable[[Forgets], Awaitable[None]]
    ) -> Callable[[Forgets], Awaitable[None] | None]:
        """Build the `forget` that switches at the sentinel and then removes itself.

        A plain function on purpose: what it does happens inside the call, not when its result is awaited.
        """

        def forget(inodes: Forgets) -> Awaitable[None] | None:
            if (_SENTINEL_INODE, 0) not in inodes:
                return original(inodes)
            os.dup2(self._device, self._libfuse, inheritable=False)
            delattr(self._operations, "forget")
            self._close_handshake()
            self._switched.set()
            return None

        return forget

    async def _watch_connection(self) -> None:
        """Notice an aborted connection even while every handler hangs.

        pyfuse3's loop ends only after its last handler. A look a second at the descriptor costs nothing on
        the path of a request; waiting on it for errors only would wake this task with every request.
        """
        if self._libfuse < 0:
            return
        poll = select.poll()
        poll.register(self._libfuse, 0)
        while not poll.poll(0):
            await trio.sleep(_ALIVE_SECONDS)
        with trio.move_on_after(_GRACE_SECONDS):
            await self.ended.wait()
        if not self.ended.is_set():
            log.warning("the connection has ended while requests were still waiting for the backing directory")
        self.ended.set()

    def cut_off(self) -> None:
        """Make every request fail by closing the device, which aborts the connection.

        Not by ending the process: a thread that hangs in the backing may keep it, and so the device, for as long.
        """
        if self._libfuse >= 0 and not self.ended.is_set():
            null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            os.dup2(null, self._libfuse, inheritable=False)  # the number is libfuse's
            os.close(null)
        self.ended.set()

    def _close_handshake(self) -> None:
        """Close what only the handshake needed."""
        if self._relay is not None:
            self._relay.close()
            self._relay = None
        if self._device >= 0:
            os.close(self._device)
            self._device = -1


def _receive_init(device: int) -> bytes:
    """Read the INIT request that the kernel queued when it mounted."""
    poll = select.poll()
    poll.register(device, select.POLLIN)
    if not poll.poll(_HANDSHAKE_SECONDS * 1000):
        raise HandshakeError("the kernel sent no INIT")
    request = os.read(device, _MESSAGE_BYTES)
    if len(request) < _IN_HEADER.size + 16 or _IN_HEADER.unpack_from(request)[1] != _OPCODE_INIT:
        raise HandshakeError("the kernel's first request is not INIT")
    return request


def patch_init(request: bytes, reply: bytes) -> tuple[bytes, bool]:
    """Set our flags and bounds in libfuse's reply to INIT; tell whether shared mmap is on.

    Only what the kernel offered may be set. FUSE_DONT_MASK: handlers see the mode as the caller gave it and
    the umask next to it, because default ACLs take the umask's place. FUSE_HANDLE_KILLPRIV off: the kernel
    then clears suid and sgid bits itself when a file is written.
    """
    length, error, unique = _OUT_HEADER.unpack_from(reply)
    if error != 0 or length != len(reply) or length < _OUT_HEADER.size + _INIT_OUT.size:
        raise HandshakeError(f"libfuse refused the kernel's INIT ({os.strerror(-error) if error else 'short'})")
    offered = int.from_bytes(request[_IN_HEADER.size + 12 : _IN_HEADER.size + 16], "little")
    offered2 = 0
    if offered & _INIT_EXT and len(request) >= _IN_HEADER.size + _INIT_IN.size:
        offered2 = _INIT_IN.unpack_from(request, _IN_HEADER.size)[4]
    fields = list(_INIT_OUT.unpack_from(reply, _OUT_HEADER.size))
    fields[3] = fields[3] & ~_HANDLE_KILLPRIV | offered & _DONT_MASK
    fields[4:6] = _MAX_TASKS, _CONGESTION  # max_background, congestion_threshold
    shared_mmap = bool(offered2 & _DIRECT_IO_ALLOW_MMAP)
    if shared_mmap:
        fields[3] |= _INIT_EXT
        fields[10] |= _DIRECT_IO_ALLOW_MMAP
    body = _INIT_OUT.pack(*fields) + reply[_OUT_HEADER.size + _INIT_OUT.size :]
    return _OUT_HEADER.pack(length, error, unique) + body, shared_mmap
