"""One accepted connection: its frames, its send queue and its descriptor, all bounded.

`receive`, `send` and `flush` return at once, so tmemd can drain a guest's socket in the middle of a decision. Only the
methods at the end wait.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import trio

from tmem.lending.daemon.ratelimits import FRAMES_BURST, FRAMES_PER_SECOND, TokenBucket
from tmem.lending.protocol.messages import Answer, FromGuest, ToGuest, Verb
from tmem.lending.protocol.wire import ProtocolError, encode, tmemd_decoder

VERB_FRAMES = 20  # what a verb of tmemctl counts as: its answer may be long
MAX_QUEUED = 4 << 20  # bytes that wait for a slow reader
READ_BYTES = 1 << 16
_TRUNCATED = int(socket.MSG_CTRUNC)  # testing an enum member costs more than the rest of the test
_CONTROL = socket.CMSG_SPACE(array.array("i").itemsize)  # space for one descriptor, by alignment for two


class CutOff(Exception):
    """The peer broke a rule, so its connection is closed. `kind` names the counter."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class Ended(Exception):
    """The peer closed the connection."""


class DescriptorCloser:
    """Closes descriptors that users sent, and counts the closes that hang.

    Closing a file of a FUSE filesystem waits for its server, which may be the sender. So it is done in a thread.
    """

    def __init__(self) -> None:
        self._threads: dict[int, list[threading.Thread]] = {}

    def close(self, uid: int, fd: int) -> None:
        """Close a descriptor that a user sent."""
        try:
            fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError:
            thread = threading.Thread(target=_close, args=(fd,), daemon=True)
            thread.start()
            self._threads.setdefault(uid, []).append(thread)
        else:
            os.close(fd)  # a memfd, or a file in a tmpfs

    def hanging(self, uid: int) -> int:
        """Return how many descriptors of a user are not closed yet."""
        running = [thread for thread in self._threads.pop(uid, ()) if thread.is_alive()]
        if running:
            self._threads[uid] = running
        return len(running)


def _close(fd: int) -> None:
    with contextlib.suppress(OSError):  # an error from the server of the file
        os.close(fd)


class Connection:
    """The socket of one peer, with its partial frame, its send queue, and the descriptor of its first bytes."""

    def __init__(
        self,
        stream: socket.socket,
        now: float,
        shared: Sequence[TokenBucket] = (),
        close_descriptor: Callable[[int], None] = os.close,
    ) -> None:
        """Take an accepted socket; `shared` are its user's buckets, `close_descriptor` closes what the peer sent."""
        stream.setblocking(False)
        self._socket = stream
        self._decoder = tmemd_decoder()
        self._queue: deque[bytes] = deque()
        self._queued_bytes = 0
        self._own = TokenBucket(FRAMES_PER_SECOND, FRAMES_BURST, now)
        self._shared = shared
        self.close_descriptor = close_descriptor
        self._descriptor: int | None = None
        self._anything_read = False
        self.is_flushing = False  # a task is in flush_all

    def fileno(self) -> int:
        """Return the descriptor of the socket; -1 once closed."""
        return self._socket.fileno()

    @property
    def queued_bytes(self) -> int:
        """Bytes that wait for the peer to read."""
        return self._queued_bytes

    def receive(self, now: float) -> list[FromGuest | Verb]:
        """Read once and return the complete messages; none if there was nothing to read.

        Raises CutOff if the peer broke a rule, Ended at the end of the stream.
        """
        try:
            # Without space for them the kernel drops later descriptors, so that none has to be closed here.
            space = 0 if self._anything_read else _CONTROL
            data, control, flags, _ = self._socket.recvmsg(READ_BYTES, space, socket.MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return []
        except OSError as error:
            raise Ended(str(error)) from None
        if control or flags & _TRUNCATED:
            self._keep_descriptor(control, bool(flags & _TRUNCATED))
        try:
            if not data:
                self._decoder.end()
                raise Ended("closed by the peer")
            self._anything_read = True
            messages = self._decoder.feed(data)
        except ProtocolError as error:
            raise CutOff("malformed", str(error)) from None
        self._spend(sum(VERB_FRAMES if isinstance(message, Verb) else 1 for message in messages), now)
        return messages

    def delay(self, now: float) -> float:
        """Return the seconds to wait before `receive`, because the limits that the user shares are reached."""
        return max((bucket.delay(now) for bucket in self._shared), default=0.0)

    def _spend(self, frames: int, now: float) -> None:
        """Count frames against the limits of this peer, its user and all users."""
        for bucket in (self._own, *self._shared):
            bucket.spend(now, frames)
        if self._own.delay(now) > 0:
            raise CutOff("flooding", f"more than {FRAMES_PER_SECOND:.0f} frames a second")

    def _keep_descriptor(self, control: list[tuple[int, int, bytes]], truncated: bool) -> None:
        """Keep a single descriptor of the first bytes; otherwise close all and raise CutOff."""
        numbers = array.array("i")
        for level, kind, data in control:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
        if not numbers and not truncated:
            return
        if len(numbers) == 1 and not truncated and not self._anything_read:
            self._descriptor = numbers[0]
            return
        for number in numbers:
            self.close_descriptor(number)
        surplus = numbers or self._anything_read
        reason = "it sent descriptors that are not expected" if surplus else "tmemd has no free descriptor for its own"
        raise CutOff("foreign_descriptors", reason)

    def take_descriptor(self) -> int | None:
        """Return the descriptor that was sent with the first bytes; the caller closes it."""
        taken, self._descriptor = self._descriptor, None
        return taken

    def send(self, message: ToGuest | Answer) -> None:
        """Send what the socket takes now and queue the rest. Raises CutOff if the peer does not read, Ended."""
        frame = encode(message)
        if self._queued_bytes + len(frame) > MAX_QUEUED:
            raise CutOff("slow", "the peer does not read what it is sent")
        self._queue.append(frame)
        self._queued_bytes += len(frame)
        if len(self._queue) == 1:
            self.flush()

    def flush(self) -> None:
        """Send from the queue what the socket takes now. Raises Ended."""
        while self._queue:
            frame = self._queue[0]
            try:
                sent = self._socket.send(frame, socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                raise Ended(str(error)) from None
            self._queued_bytes -= sent
            if sent < len(frame):
                self._queue[0] = frame[sent:]
                return
            self._queue.popleft()

    def close(self) -> None:
        """Close the socket and the descriptor; a second call does nothing."""
        descriptor = self.take_descriptor()
        if descriptor is not None:
            self.close_descriptor(descriptor)
        self._queue.clear()
        self._queued_bytes = 0
        self._socket.close()

    def check(self) -> None:
        """Raise AssertionError unless the queued bytes are counted right and bounded."""
        assert self._queued_bytes == sum(map(len, self._queue)) <= MAX_QUEUED, "queued bytes are miscounted"

    # For trio's tasks.

    async def flush_all(self) -> None:
        """Send the whole queue, as fast as the peer reads; return early if the connection ends."""
        try:
            while self._queue and self.fileno() >= 0:
                await trio.lowlevel.wait_writable(self)
                self.flush()
        except (trio.ClosedResourceError, Ended):
            pass  # the task that reads sees the end, too
        finally:
            self.is_flushing = False

    async def wait_readable(self) -> None:
        """Wait until there is something to read and the user's limits allow it.

        Raises ClosedResourceError if the connection is closed here.
        """
        if self.fileno() < 0:
            raise trio.ClosedResourceError("closed before the wait")
        await trio.lowlevel.wait_readable(self)
        while delay := self.delay(time.monotonic()):
            await trio.sleep(delay)
        if self.fileno() < 0:
            raise trio.ClosedResourceError("closed during the wait")

    def hang_up(self) -> None:
        """Close the connection and wake the tasks that wait for it."""
        if self.fileno() >= 0:
            trio.lowlevel.notify_closing(self)
            self.close()
