"""The connection of a guest to tmemd: found or refused in one line, lost, and found again with what is held."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.lending.guest.pooledguest import SLAB_PAGES, noise
from tmem import SLAB_SIZE, Tmem
from tmem.lending.guest.borrowedarena import BorrowedArena
from tmem.lending.guest.borrower import Borrower
from tmem.lending.guest.client import Client
from tmem.lending.guest.handshake import Declined, Unreachable, register
from tmem.lending.protocol.kind import Kind
from tmem.lending.protocol.messages import (
    Ask,
    Claim,
    Confirm,
    Evicted,
    FromGuest,
    Hello,
    Lend,
    Refused,
    Return,
    Revoke,
    Taken,
    ToGuest,
    Welcome,
)
from tmem.lending.protocol.runs import slabs_of
from tmem.lending.protocol.wire import encode, tmemd_decoder
from tmemcommon.wakeup import Wakeup

SECONDS = 90.0


class Lender:
    """One connection, as tmemd sees it."""

    def __init__(self, connection: socket.socket, memfd: int) -> None:
        self.memfd = memfd
        self._socket = trio.socket.from_stdlib_socket(connection)
        self._decoder = tmemd_decoder()
        self._waiting: list[FromGuest] = []

    def feed(self, data: bytes) -> None:
        """Decode what came with the memfd."""
        self._waiting += [message for message in self._decoder.feed(data) if isinstance(message, FromGuest)]

    async def hear(self, kind: type[FromGuest]) -> FromGuest:
        """Wait for a message of a kind, passing over others."""
        while True:
            for place, message in enumerate(self._waiting):
                if isinstance(message, kind):
                    del self._waiting[: place + 1]
                    return message
            data = await self._socket.recv(65536)
            assert data, f"the guest went instead of sending {kind.__name__}"
            self.feed(data)

    async def say(self, *messages: ToGuest) -> None:
        """Send messages in one piece."""
        await self._socket.send(b"".join(map(encode, messages)))

    async def lend(self, first: int, count: int, serial: int) -> None:
        """Populate slabs and lend them."""
        os.posix_fallocate(self.memfd, first * SLAB_SIZE, count * SLAB_SIZE)
        await self.say(Lend(((first, count),), serial))

    def leave(self) -> None:
        """End the connection."""
        self._socket.close()
        os.close(self.memfd)


class Fixture:
    """A guest, and the place where its tmemd listens."""

    def __init__(self, path: Path) -> None:
        self.path = path
        wanted = Wakeup()
        self.source = BorrowedArena(64, wanted.set)
        self.tmem = Tmem(self.source)
        self.pool = self.tmem.new_pool()
        self.borrower = Borrower(self.source, self.tmem, "/mnt")
        self.client = Client(os.fspath(path), self.borrower, wanted)
        self._listener: socket.socket | None = None

    def listen(self) -> None:
        """Begin to listen."""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(os.fspath(self.path))
        self._listener.listen()

    def stop_listening(self) -> None:
        """Stop, as a killed tmemd does: the socket's file stays for the next one to remove."""
        assert self._listener is not None
        self._listener.close()
        self.path.unlink()

    async def accept(self, *answer: ToGuest) -> Lender:
        """Accept the next guest."""
        listener = self._listener
        assert listener is not None
        connection = await trio.to_thread.run_sync(lambda: listener.accept()[0], abandon_on_cancel=True)
        data, fds, _, _ = socket.recv_fds(connection, 65536, 1)
        connection.setblocking(False)
        lender = Lender(connection, fds[0])
        lender.feed(data)
        if answer:
            await lender.say(*answer)
        return lender

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[Lender]:
        """Run the guest on its first connection."""
        async with trio.open_nursery() as nursery:
            lenders: list[Lender] = []

            async def welcome() -> None:
                lenders.append(await self.accept(Welcome(1, 64, 32)))

            nursery.start_soon(welcome)
            await trio.to_thread.run_sync(self.client.connect)
            while not lenders:
                await trio.sleep(0.001)
            nursery.start_soon(self.client.run)
            yield lenders[0]
            self.borrower.check()
            self.tmem.check()
            nursery.cancel_scope.cancel()


def run(test: Callable[[Fixture], Awaitable[None]], tmp_path: Path) -> None:
    async def bounded() -> None:
        with trio.fail_after(SECONDS):
            await test(fixture)

    fixture = Fixture(tmp_path / "socket")
    fixture.listen()
    try:
        trio.run(bounded)
    finally:
        fixture.source.close()


def test_no_tmemd_is_said_at_once(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path / "nobody")
    with pytest.raises(Unreachable, match="No such file"):
        fixture.client.connect()
    fixture.listen()
    fixture._listener.close()  # type: ignore[union-attr]
    with pytest.raises(Unreachable, match="refused"):
        fixture.client.connect()
    fixture.source.close()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (encode(Refused("everything is promised: make tmemd larger")), Declined),
        (encode(Lend(((0, 1),), 1)), Unreachable),
        (b"\xff" * 64, Unreachable),
        (b"SSH-2.0-OpenSSH_9.2\r\n", Unreachable),
        (b"", Unreachable),
    ],
)
def test_who_is_no_tmemd_or_refuses_is_told_apart(tmp_path: Path, answer: bytes, error: type[Exception]) -> None:
    async def test(fixture: Fixture) -> None:
        async with trio.open_nursery() as nursery:

            async def peer() -> None:
                lender = await fixture.accept()
                await lender._socket.send(answer)
                lender.leave()

            nursery.start_soon(peer)
            with pytest.raises(error):
                await trio.to_thread.run_sync(fixture.client.connect)
        assert not fixture.client.connected

    run(test, tmp_path)


@pytest.mark.parametrize(
    ("answer", "error", "reason"),
    [
        (encode(Refused("everything is promised: make tmemd larger")), Declined, "everything is promised"),
        (b"", Unreachable, "closed the connection without an answer"),
    ],
)
def test_who_declines_and_hangs_up_without_reading_is_heard(
    tmp_path: Path, answer: bytes, error: type[Exception], reason: str
) -> None:
    fixture = Fixture(tmp_path / "socket")
    fixture.listen()
    assert fixture._listener is not None
    fixture._listener.settimeout(SECONDS)
    # More than the socket takes: it is still being sent when the other side hangs up.
    claims = [Claim(tuple((slab, 1) for slab in range(0, 8192, 2)), False, False)] * 64
    greeting = [*fixture.borrower.greeting(), *claims]
    failures: list[Exception] = []

    def call() -> None:
        try:
            register(os.fspath(fixture.path), greeting, fixture.source.fd)
        except (Declined, Unreachable) as failure:
            failures.append(failure)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    try:
        connection, _ = fixture._listener.accept()
        with connection:
            connection.send(answer)
        thread.join(SECONDS)
    finally:
        fixture._listener.close()
        fixture.source.close()
    (failure,) = failures
    assert isinstance(failure, error)
    assert reason in str(failure)


def test_a_guest_asks_is_lent_is_revoked_and_loses(tmp_path: Path) -> None:
    async def test(fixture: Fixture) -> None:
        async with fixture.connected() as lender:
            assert not fixture.pool.put(1, 0, noise(0))
            ask = await lender.hear(Ask)
            assert isinstance(ask, Ask)
            await lender.lend(0, 4, ask.serial)
            while not fixture.pool.put(1, 0, noise(0)):
                await trio.sleep(0.001)
            for index in range(4 * SLAB_PAGES):
                fixture.pool.put(1, index, noise(index))
            await lender.say(Revoke(1, 1))
            answer = await lender.hear(Return)
            assert isinstance(answer, Return)
            assert (len(slabs_of(answer.runs)), answer.answer, answer.last) == (1, 1, True)
            left = sorted({0, 1, 2, 3} - set(slabs_of(answer.runs)))
            await lender.say(Taken(((left[0], 1),), 8))
            assert await lender.hear(Confirm) == Confirm(8)
            assert fixture.source.held(Kind.EPHEMERAL) == 2

    run(test, tmp_path)


def test_requests_are_answered_between_the_steps_of_what_was_taken(tmp_path: Path) -> None:
    async def test(fixture: Fixture) -> None:
        async with fixture.connected() as lender, trio.open_nursery() as nursery:
            fixture.pool.put(1, 0, noise(0))
            ask = await lender.hear(Ask)
            assert isinstance(ask, Ask)
            await lender.lend(0, 6, ask.serial)
            while fixture.source.held(Kind.EPHEMERAL) < 6:
                await trio.sleep(0.001)
            for index in range(6 * SLAB_PAGES):  # so that none is returned because no page uses it
                fixture.pool.put(1, index, noise(index))
            held: list[int] = []

            async def request() -> None:
                while not held or held[-1]:
                    held.append(fixture.source.held(Kind.EPHEMERAL))
                    await trio.lowlevel.checkpoint()

            nursery.start_soon(request)
            while not held:
                await trio.lowlevel.checkpoint()
            await lender.say(*(Taken(((step, 2),), 8 + step) for step in (0, 2, 4)))
            assert [await lender.hear(Confirm) for _ in range(3)] == [Confirm(8), Confirm(10), Confirm(12)]
        # Of two tasks that may run, either may be first: a request may miss one step, never two.
        assert {2, 4} & set(held)

    run(test, tmp_path)


def test_a_lost_tmemd_is_found_again_and_told_what_is_held(tmp_path: Path) -> None:
    async def test(fixture: Fixture) -> None:
        async with fixture.connected() as lender:
            fixture.pool.put(1, 0, noise(0))
            ask = await lender.hear(Ask)
            assert isinstance(ask, Ask)
            await lender.lend(0, 2, ask.serial)
            await lender.lend(2, 2, ask.serial)
            fixture.stop_listening()
            lender.leave()
            while fixture.client.connected:
                await trio.sleep(0.001)
            assert fixture.source.held(Kind.EPHEMERAL) == 4, "what was on its way counts"
            assert fixture.pool.put(1, 0, noise(0)), "the pool goes on with what it has"
            await trio.sleep(0.3)
            fixture.listen()
            lender = await fixture.accept(Welcome(7, 64, 32))
            hello, claim = await lender.hear(Hello), await lender.hear(Claim)
            assert isinstance(hello, Hello)
            assert hello.again
            assert isinstance(claim, Claim)
            assert slabs_of(claim.runs) == [0, 1, 2, 3]
            while not fixture.client.connected:
                await trio.sleep(0.001)
            assert fixture.borrower.counters.reconnects == 1
            for index in range(5 * SLAB_PAGES):
                fixture.pool.put(1, index, noise(index))
            assert isinstance(await lender.hear(Ask), Ask)

    run(test, tmp_path)


def test_a_tmemd_that_sends_garbage_or_refuses_is_tried_again(tmp_path: Path) -> None:
    async def test(fixture: Fixture) -> None:
        async with fixture.connected() as lender:
            await lender.say(Lend(((63, 2),), 1))
            lender = await fixture.accept(Refused("your old connection has not ended", retry=True))
            lender.leave()
            lender = await fixture.accept(Welcome(1, 64, 32), Revoke(1, 9))
            answer = await lender.hear(Return)
            assert isinstance(answer, Return)
            assert answer.last
            assert fixture.client.connected

    run(test, tmp_path)


def test_a_tmemd_that_does_not_read_holds_nobody_up(tmp_path: Path) -> None:
    async def test(fixture: Fixture) -> None:
        async with fixture.connected() as lender:
            await lender.say(Lend(((0, 32),), 1))
            for serial in range(1, 6_000):
                await lender.say(Revoke(serial, 1))
                if serial % 100 == 0:
                    assert fixture.pool.put(1, serial, bytes(4096))
            for _ in range(5_900):
                await lender.hear(Return)

    run(test, tmp_path)


def test_a_guest_evicted_while_away_drops_its_slabs_and_stays_away(tmp_path: Path) -> None:
    async def test(fixture: Fixture) -> None:
        async with fixture.connected() as lender:
            ask = await lender.hear(Ask)
            assert isinstance(ask, Ask)
            await lender.lend(0, 8, ask.serial)
            page = noise(1)
            while not fixture.pool.put(1, 1, page):
                await trio.sleep(0.001)
            lender.leave()
            await fixture.accept(Evicted("gone"))
            source = fixture.source
            while fixture.borrower.drop_evicted() or not fixture.borrower.evicted or source.held(Kind.EPHEMERAL):
                await trio.sleep(0.001)
            assert fixture.client.state == "evicted"
            assert fixture.pool.get(1, 1) is None
            assert not fixture.pool.put(1, 2, page)
            fixture.borrower.check()

    run(test, tmp_path)
