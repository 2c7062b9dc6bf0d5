"""Keeps a guest connected to tmemd: a thin trio adapter over Borrower.

The pool never waits for it; it works between requests of the mount. A reader handles messages, one at a time and in
order. A sender answers Revokes in small steps and sends. A connection that ends is read to its end before the guest
claims what it holds on a new one, because Lends and Takens may still be in the old socket.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence

import trio

from tmem.lending.guest.borrower import TICK, Borrower
from tmem.lending.guest.handshake import CHUNK, Declined, Registered, Unreachable, WasEvicted, register
from tmem.lending.protocol.messages import Taken, ToGuest
from tmem.lending.protocol.wire import ProtocolError, encode
from tmemcommon.wakeup import Wakeup

log = logging.getLogger(__name__)

MIN_PAUSE = 0.1  # seconds between attempts to reconnect
MAX_PAUSE = 0.5
SHORT_CONNECTION = 0.5  # seconds: tmemd accepted the guest and hung up at once
MAX_PAUSE_DECLINED = 5.0  # after a refusal that will not change soon


class Client:
    """The connection of one guest."""

    def __init__(self, path: str, borrower: Borrower, wanted: Wakeup, owner: int | None = None) -> None:
        """`path` is tmemd's socket; root, this user or `owner` must listen there.

        The borrower's source sets `wanted` when there is something to send.
        """
        self.path = path
        self._owner = owner
        self.borrower = borrower
        self.connected = False
        self._first: Registered | None = None
        self._wanted = wanted
        self._limiter = trio.CapacityLimiter(1)  # trio's default may be full of threads that hang

    @property
    def state(self) -> str:
        """The state of the connection: connected, disconnected or evicted."""
        return "evicted" if self.borrower.evicted else "connected" if self.connected else "disconnected"

    def connect(self) -> None:
        """Register for the first time. Raises Unreachable or Declined."""
        self._first = self._register()
        self.borrower.on_welcome(self._first.welcome)
        self.connected = True

    def _register(self) -> Registered:
        return register(self.path, self.borrower.greeting(), self.borrower.source.fd, self._owner)

    async def run(self) -> None:
        """Serve the connection and reconnect when it ends, until the guest is evicted."""
        registered, pause = self._first, 0.0
        while True:
            if registered is None:
                try:
                    registered = await self._reconnect()
                except WasEvicted:
                    self.borrower.on_evicted()
                    break
                self.borrower.on_welcome(registered.welcome)
                self.connected = True
                log.info("registered again with tmemd at %s", self.path)
            began = trio.current_time()
            try:
                await self._serve(registered)
            except* (OSError, ProtocolError, trio.ClosedResourceError, trio.BrokenResourceError) as ended:
                log.warning("the connection to tmemd ended: %s", "; ".join(str(error) for error in ended.exceptions))
            self.connected = False
            registered = None
            if self.borrower.evicted:
                break
            # Back off if tmemd accepts the guest and hangs up at once.
            short = trio.current_time() - began < SHORT_CONNECTION
            pause = min(max(2 * pause, MIN_PAUSE), MAX_PAUSE_DECLINED) if short else 0.0
            await trio.sleep(pause)
        log.error("tmemd at %s has evicted this mount, which has no pool from now on: mount it again", self.path)
        await self._drop_evicted()

    async def _drop_evicted(self) -> None:
        while self.borrower.drop_evicted():
            await trio.lowlevel.checkpoint()

    async def _reconnect(self) -> Registered:
        """Try until tmemd accepts the guest. Raises WasEvicted."""
        pause = MIN_PAUSE
        last_error = ""
        while True:
            try:
                # Not in the thread, because the slabs on loan must not change while they are listed.
                greeting = self.borrower.greeting()
                return await trio.to_thread.run_sync(
                    register,
                    self.path,
                    greeting,
                    self.borrower.source.fd,
                    self._owner,
                    abandon_on_cancel=True,
                    limiter=self._limiter,
                )
            except WasEvicted:
                raise
            except (Unreachable, Declined) as error:
                final = isinstance(error, Declined) and not error.retry
                most = MAX_PAUSE_DECLINED if final else MAX_PAUSE
                if str(error) != last_error:
                    last_error = str(error)
                    log.warning("tmemd at %s: %s; the slabs on loan stay in use; trying again", self.path, last_error)
            await trio.sleep(pause)
            pause = min(2 * pause, most)

    async def _serve(self, registered: Registered) -> None:
        """Exchange messages until the connection ends. Always raises."""
        registered.connection.setblocking(False)
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(registered.connection))
        async with stream, trio.open_nursery() as nursery:
            await self._handle(registered.messages)
            nursery.start_soon(self._send_all, stream)
            while data := await stream.receive_some(CHUNK):
                await self._handle(registered.decoder.feed(data))
            registered.decoder.end()
            raise ConnectionResetError(f"closed by tmemd at {os.fspath(self.path)}")

    async def _handle(self, messages: Sequence[ToGuest]) -> None:
        for message in messages:
            self.borrower.on_message(trio.current_time(), message)
            if isinstance(message, Taken):
                # Dropping the pages took some ms, and many Takens may follow after a stop, so let the mount's requests
                # run. A get from a slab that a later Taken names is a miss; a put there is dropped with the slab.
                await trio.lowlevel.checkpoint()
            elif self.borrower.evicted:
                await self._drop_evicted()
                return
        self._wanted.set()

    async def _send_all(self, stream: trio.SocketStream) -> None:
        """Answer Revokes, tick and send. A tmemd that does not read blocks only this task."""
        borrower = self.borrower
        next_tick = _next_tick()
        while True:
            if borrower.has_open_revoke:
                borrower.answer_revoke()
            if trio.current_time() >= next_tick:
                borrower.tick()
                next_tick = _next_tick()
            messages = borrower.outgoing(trio.current_time())
            if messages:
                try:
                    await stream.send_all(b"".join(map(encode, messages)))
                except trio.BrokenResourceError:
                    return  # the reader still reads the socket to its end
                continue
            if borrower.has_open_revoke:
                await trio.lowlevel.checkpoint()
                continue
            with trio.move_on_at(min(next_tick, borrower.deadline() or next_tick)):
                await self._wanted.wait()


def _next_tick() -> float:
    """Return the time of the next tick, at least half a TICK away.

    Ticks are multiples of TICK on the machine's clock, so that all guests report at the same moment: tmemd wakes once
    for all of them. Waking for each costs it several times as much.
    """
    minimum = TICK / 2
    return trio.current_time() + minimum + TICK - (time.monotonic() + minimum) % TICK
