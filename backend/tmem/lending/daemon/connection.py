"""One accepted connection: frames in, frames out, without waiting, and never more of either than is bounded.

Everything here returns at once, so that tmemd can drain a guest's socket in the middle of a decision: a guest that
was stopped may have answered already. Who waits for the socket, and for how long, is the server's affair.
"""

from __future__ import annotations

import array
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence

from tmem.lending.daemon.budget import FRAMES_A_SECOND, FRAMES_AT_ONCE, Budget
from tmem.lending.protocol.messages import Answer, FromGuest, ToGuest, Verb
from tmem.lending.protocol.wire import ProtocolError, encode, tmemd_decoder

VERB_FRAMES = 20  # what a verb of tmemctl counts as: its answer may be long
MAX_QUEUED = 4 << 20  # bytes that wait for a slow reader
READ = 1 << 16  # bytes at once
_TRUNCATED = int(socket.MSG_CTRUNC)  # an enumeration's member would cost more than the rest of the test
_CONTROL = socket.CMSG_SPACE(array.array("i").itemsize)  # room for one descriptor, by alignment for two


class CutOff(Exception):
    """The peer did what no peer may: its connection ends. `kind` is the counter that it is counted in."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class Ended(Exception):
    """The peer closed the connection."""


class Connection:
    """The socket of one peer, its unfinished frame, its unsent frames, and the descriptor that came with the first."""

    def __init__(
        self,
        stream: socket.socket,
        now: float,
        budgets: Sequence[Budget] = (),
        dispose: Callable[[int], None] = os.close,
    ) -> None:
        """Take an accepted socket; `budgets` are those that its user shares, `dispose` closes what it sent."""
        stream.setblocking(False)
        self._socket = stream
        self._decoder = tmemd_decoder()
        self._queued: deque[bytes] = deque()
        self._queued_bytes = 0
        self._own = Budget(FRAMES_A_SECOND, FRAMES_AT_ONCE, now)
        self._budgets = budgets
        self.dispose = dispose
        self._descriptor: int | None = None
        self._anything_read = False
        self.is_flushing = False  # somebody sends the queue as the peer reads it

    def fileno(self) -> int:
        """Give the number that is waited on; -1 once closed."""
        return self._socket.fileno()

    @property
    def queued_bytes(self) -> int:
        """Bytes that wait for the peer to read."""
        return self._queued_bytes

    def receive(self, now: float) -> list[FromGuest | Verb]:
        """Read once and give the messages that are complete; none when there was nothing to read.

        Raises CutOff for a peer that is to be cut off, Ended at the end of the stream.
        """
        try:
            # Without room for them the kernel drops descriptors; those that are here would have to be closed.
            room = 0 if self._anything_read else _CONTROL
            data, control, flags, _ = self._socket.recvmsg(READ, room, socket.MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return []
        except OSError as error:
            raise Ended(str(error)) from None
        if control or flags & _TRUNCATED:
            self._take_descriptors(control, bool(flags & _TRUNCATED))
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

    def send(self, message: ToGuest | Answer) -> None:
        """Send now what the socket takes and queue the rest. Raises CutOff when the peer does not read, Ended."""
        frame = encode(message)
        if self._queued_bytes + len(frame) > MAX_QUEUED:
            raise CutOff("slow", "the peer does not read what it is sent")
        self._queued.append(frame)
        self._queued_bytes += len(frame)
        if len(self._queued) == 1:
            self.flush()

    def flush(self) -> None:
        """Send of the queue what the socket takes now. Raises Ended."""
        while self._queued:
            frame = self._queued[0]
            try:
                sent = self._socket.send(frame, socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                raise Ended(str(error)) from None
            self._queued_bytes -= sent
            if sent < len(frame):
                self._queued[0] = frame[sent:]
                return
            self._queued.popleft()

    def take_descriptor(self) -> int | None:
        """Hand over the descriptor that came with the first bytes; whoever takes it closes it."""
        taken, self._descriptor = self._descriptor, None
        return taken

    def close(self) -> None:
        """End the connection; harmless when it is closed already."""
        descriptor = self.take_descriptor()
        if descriptor is not None:
            self.dispose(descriptor)
        self._queued.clear()
        self._queued_bytes = 0
        self._socket.close()

    def check(self) -> None:
        """Raise AssertionError unless the queue is as long as is said, and within its bound."""
        assert self._queued_bytes == sum(map(len, self._queued)) <= MAX_QUEUED, "queued bytes are miscounted"

    def _take_descriptors(self, control: list[tuple[int, int, bytes]], truncated: bool) -> None:
        """Keep the one descriptor that comes with the first bytes, close all others and cut off who sends them."""
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
            self.dispose(number)
        surplus = numbers or self._anything_read
        reason = "descriptors were sent that nobody asked for" if surplus else "there is none left for its descriptor"
        raise CutOff("foreign_descriptors", reason)

    def delay(self, now: float) -> float:
        """Give the seconds until its user may send more: to be waited for before `receive`."""
        return max((budget.delay(now) for budget in self._budgets), default=0.0)

    def _spend(self, frames: int, now: float) -> None:
        """Count frames against what a peer, its user and all may send."""
        for budget in (self._own, *self._budgets):
            budget.spend(now, frames)
        if self._own.delay(now) > 0:
            raise CutOff("flooding", f"more than {FRAMES_A_SECOND:.0f} frames a second")
