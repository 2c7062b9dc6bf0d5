"""A client of tmemd that says anything: frames of every kind in every order, and bytes that are none. Seeded."""

from __future__ import annotations

import contextlib
import os
import random
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.lending.fakeguest import make_arena
from tmem.lending.protocol import messages as m
from tmem.lending.protocol.runs import Runs
from tmem.lending.protocol.wire import encode

Words = tuple[Callable[[], m.Message], ...]

SLABS = 256
_LENGTH = 4


class Fuzzer:
    """Connections one after the other, each with some frames; `sent` counts the frames."""

    def __init__(self, path: Path, seed: int, waits: Sequence[float]) -> None:
        """Begin; `waits` are what it waits for answers: long ones lead further, short ones to more frames."""
        self.sent = 0
        self._serials = 0
        self._path = path
        self._waits = waits
        self._rng = random.Random(seed)
        self._guests = {self._rng.randbytes(16): make_arena(SLABS) for _ in range(4)}
        coin, serial, number = self._coin, self._serial, self._number
        bad: Words = (
            self._hello,
            lambda: m.Claim(self._runs(), coin(), coin()),
            lambda: m.Ask(serial(), self._rng.randint(1, m.MAX_ASK), coin()),
            lambda: m.Return(self._runs(), coin(), self._rng.choice((0, 1, 2, 7))),
            lambda: m.Return((), answer=serial()),
            lambda: m.Confirm(serial()),
        )
        good: Words = (
            lambda: m.Ask(self._next(), self._rng.randint(1, 64), coin(), age=self._rng.random() * 1e3),
            lambda: m.Ask(self._next(), self._rng.randint(1, 16)),
            lambda: m.Report(self._rng.choice((None, 0.0, 1e9)), *(self._rng.randrange(1 << 40) for _ in range(6))),
        )
        self._guests_words = bad + good * 20
        self._verbs: Words = (
            m.List,
            m.AskTotals,
            lambda: m.SetLimits(number(), self._rng.choice((None, 0.5)), self._slabs(), self._slabs(), self._slabs()),
            lambda: m.Freeze(self._rng.choice(("", "1", "/mnt/fuzz"))),
            *(m.Thaw,) * 6,
            lambda: m.Drain(number()),
            lambda: m.TakeBack(number(), self._rng.randint(1, 300), coin()),
            lambda: m.Resize(self._rng.randint(1, 512)),
        )
        self._anything: Words = (*self._guests_words, *self._verbs, lambda: m.Deny(1, "no"))

    def close(self) -> None:
        """Close the arenas."""
        for arena in self._guests.values():
            os.close(arena)

    def connection(self) -> None:
        """Connect, say something, and hang up in some way."""
        rng = self._rng
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
            stream.connect(os.fspath(self._path))
            stream.settimeout(30.0)
            with contextlib.suppress(OSError):
                words = self._greet(stream)
                for _ in range(rng.randint(0, 20)):
                    self._say(stream, [self._frame(words) for _ in range(rng.randint(1, 8))])
                if rng.random() < 0.3:
                    stream.sendall(self._frame(words)[: rng.randint(1, 20)])

    def _greet(self, stream: socket.socket) -> Words:
        """Begin as a guest, with the arena, something else or nothing, or as a person; give what to go on with."""
        choice = self._rng.random()
        if choice < 0.1:
            return self._verbs
        if choice < 0.15:
            return self._anything
        hello = self._hello()
        arena = self._guests[hello.token]
        fds = [arena] if choice < 0.96 else self._rng.choice(([], [0], [0] * 5, [arena] * 2))
        socket.send_fds(stream, [encode(hello)], fds)
        self.sent += 1
        if self._rng.random() < 0.5:
            stream.recv(1 << 16)  # the answer to it
        if hello.again and self._rng.random() < 0.8:
            self._say(stream, [encode(m.Claim((), False, False)), encode(m.Claim((), True, True))])
        self._serials = 0
        return self._guests_words

    def _say(self, stream: socket.socket, frames: list[bytes]) -> None:
        stream.sendall(b"".join(frames))
        self.sent += len(frames)
        stream.settimeout(self._rng.choice(self._waits))
        with contextlib.suppress(TimeoutError, BlockingIOError):
            stream.recv(1 << 16)
        stream.settimeout(30.0)

    def _frame(self, words: Words) -> bytes:
        """Make a frame that fits in one way or another; now and then one that is out of place, or none at all."""
        rng = self._rng
        frame = encode(rng.choice(self._anything if rng.random() < 0.005 else words)())
        if rng.random() < 0.99:
            return frame
        return rng.choice((self._flip, self._cut, self._grow, self._noise))(bytearray(frame))

    def _flip(self, frame: bytearray) -> bytes:
        for _ in range(self._rng.randint(1, 3)):
            frame[self._rng.randrange(_LENGTH, len(frame))] ^= 1 << self._rng.randrange(8)
        return bytes(frame)

    def _cut(self, frame: bytearray) -> bytes:
        body = frame[_LENGTH : self._rng.randint(_LENGTH, len(frame))]
        return len(body).to_bytes(_LENGTH, "little") + bytes(body)

    def _grow(self, frame: bytearray) -> bytes:
        body = bytes(frame[_LENGTH:]) + self._rng.randbytes(self._rng.randint(1, 40))
        return len(body).to_bytes(_LENGTH, "little") + body

    def _noise(self, frame: bytearray) -> bytes:
        body = self._rng.randbytes(self._rng.choice((0, 1, 2, 10, 300)))
        length = len(body) if self._rng.random() < 0.9 else self._rng.getrandbits(32)
        return length.to_bytes(_LENGTH, "little") + body

    def _hello(self) -> m.Hello:
        rng = self._rng
        version = m.VERSION if rng.random() < 0.98 else 77
        slabs = SLABS if rng.random() < 0.98 else rng.randint(1, 1 << 20)
        persistent, name = rng.choice((None, 0, 8, SLABS)), rng.choice(("/mnt/fuzz", "7", "x" * 512, "\n"))
        token = rng.choice(list(self._guests))
        return m.Hello(version, token, name, slabs, persistent, again=rng.random() < 0.7)

    def _runs(self) -> Runs:
        runs, end = [], 0
        for _ in range(self._rng.choice((0, 1, 1, 1, 2, 9))):
            first = end + self._rng.randint(0, 20)
            end = first + self._rng.choice((1, 1, 2, 16, 64))
            runs.append((first, end - first))
        return tuple(runs)

    def _number(self) -> str:
        return str(self._rng.randint(1, 20))

    def _serial(self) -> int:
        return self._rng.choice((1, 2, 3, 4, 5, 0xFFFFFFFF))

    def _next(self) -> int:
        self._serials += 1
        return self._serials

    def _slabs(self) -> int | None:
        return self._rng.choice((None, 0, 1, 64, SLABS, m.MAX_SLABS))

    def _coin(self) -> bool:
        return self._rng.random() < 0.5
