"""A guest of tmemd without a pool: it speaks the protocol synchronously and does nothing by itself."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from pathlib import Path
from typing import Self, TypeVar, overload

from tmem.arena import SLAB_SIZE
from tmem.lending.protocol import messages as m
from tmem.lending.protocol.runs import runs_of, slabs_of
from tmem.lending.protocol.wire import encode, guest_decoder

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

SECONDS = 60.0

M = TypeVar("M")
N = TypeVar("N")


def make_arena(slabs: int, seals: int = SEALS) -> int:
    """Return a sealed memfd of `slabs` slabs."""
    fd = os.memfd_create("tmem-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, slabs * SLAB_SIZE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


class Denied(Exception):
    """tmemd lends nothing now."""


class GuestRefused(Exception):
    """tmemd does not take this guest."""


class SyncGuest:
    """A connection, an arena, and its lent slabs. It answers a Revoke only when the caller says so."""

    def __init__(self, path: Path, slabs: int = 256, name: str = "/mnt/fake", persistent: int | None = 0) -> None:
        self.path, self.slabs, self.name, self.persistent_cap = path, slabs, name, persistent
        self.token = os.urandom(16)
        self.fd = make_arena(slabs)
        self.held: set[int] = set()
        self.persistent: set[int] = set()
        self.number = -1
        self.limits: m.Limits | None = None
        self._serial = 0
        self._socket: socket.socket | None = None
        self.messages: list[m.ToGuest] = []

    @property
    def socket(self) -> socket.socket:
        """The connection."""
        assert self._socket is not None
        return self._socket

    def join(self, again: bool = False) -> Self:
        """Connect and register; with `again` claim what is held. Raises GuestRefused."""
        self.messages.clear()
        self._decoder = guest_decoder()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(SECONDS)
        self._socket.connect(os.fspath(self.path))
        hello = m.Hello(m.VERSION, self.token, self.name, self.slabs, self.persistent_cap, again)
        socket.send_fds(self._socket, [encode(hello)], [self.fd])
        if again:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused already: the answer says why
                self.send(m.Claim(runs_of(self.held), persistent=False, last=False))
                self.send(m.Claim(runs_of(self.persistent), persistent=True, last=True))
        answer = self.expect(m.Welcome, m.Refused)
        if isinstance(answer, m.Refused):
            raise GuestRefused(answer.reason)
        self.number = answer.guest
        return self

    def send(self, message: m.FromGuest) -> None:
        """Send a message."""
        self.socket.sendall(encode(message))

    def ask(self, slabs: int, persistent: bool = False) -> set[int]:
        """Ask once and return the lent slabs. Raises Denied when there are none."""
        self._serial += 1
        self.send(m.Ask(self._serial, slabs, persistent))
        got: set[int] = set()
        while True:
            answer = self.expect(m.Lend, m.Deny)
            if isinstance(answer, m.Deny):
                if got:
                    return got
                raise Denied(answer.reason)
            got |= set(slabs_of(answer.runs)) & (self.persistent if persistent else self.held)
            if answer.done:
                return got

    def give(self, slabs: set[int], answer: int = 0, persistent: bool = False) -> None:
        """Return slabs to tmemd."""
        held = self.persistent if persistent else self.held
        assert slabs <= held
        held -= slabs
        self.send(m.Return(runs_of(slabs), persistent, answer, last=True))

    @overload
    def expect(self, kind: type[M], /) -> M: ...

    @overload
    def expect(self, kind: type[M], other: type[N], /) -> M | N: ...

    def expect(self, *kinds: type[object]) -> object:
        """Return the next message of one of these kinds; confirm each Taken meanwhile."""
        while True:
            for number, message in enumerate(self.messages):
                if isinstance(message, kinds):
                    del self.messages[number]
                    return message
            self._receive()

    def answer_revokes(self) -> None:
        """Answer the Revokes that have arrived."""
        self.settle()
        revokes = [message for message in self.messages if isinstance(message, m.Revoke)]
        self.messages = [message for message in self.messages if not isinstance(message, m.Revoke)]
        for revoke in revokes:
            self.give_for(revoke)

    def give_for(self, revoke: m.Revoke) -> int:
        """Answer a Revoke with the lowest slabs; return how many."""
        held = self.persistent if revoke.persistent else self.held
        given = set(sorted(held)[: revoke.slabs])
        self.give(given, revoke.serial, revoke.persistent)
        return len(given)

    def settle(self) -> None:
        """Handle what has arrived, without waiting."""
        self.socket.setblocking(False)
        try:
            while True:
                self._receive()
        except BlockingIOError:
            pass
        finally:
            self.socket.settimeout(SECONDS)

    def leave(self) -> None:
        """Close the connection; keep the arena and the slabs."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def close(self) -> None:
        """Close the connection and the arena."""
        self.leave()
        os.close(self.fd)

    def populated_slabs(self) -> float:
        """Return how many slabs of the arena are populated."""
        return os.fstat(self.fd).st_blocks * 512 / SLAB_SIZE

    def _receive(self) -> None:
        data = self.socket.recv(1 << 16)
        if not data:
            raise ConnectionResetError("tmemd hung up")
        for message in self._decoder.feed(data):
            if isinstance(message, m.Lend):  # at once: the next message may take it
                new = set(slabs_of(message.runs))
                assert not new & (self.held | self.persistent), "a slab was lent twice"
                (self.persistent if message.persistent else self.held).update(new)
                self.messages.append(message)
            elif isinstance(message, m.Taken):
                taken = set(slabs_of(message.runs))
                assert not taken & self.persistent, "a persistent slab was taken"
                self.held -= taken
                self.send(m.Confirm(message.serial))
            elif isinstance(message, m.Limits):
                self.limits = message
            else:
                self.messages.append(message)
