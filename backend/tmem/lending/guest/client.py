"""Keep a guest connected to tmemd: a thin trio adapter over Borrower.

The pool never waits for this. What tmemd wants is done between two requests of the mount: a reader takes messages in,
one at a time and in order; a pump pays what is owed in small steps and sends. When the connection ends, the reader has
read the old socket to its end (Lends and Takens that were on their way count), and only then does the guest claim.
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

FIRST_PAUSE = 0.1  # seconds between attempts to find tmemd again
MAX_PAUSE = 0.5
SHORT = 0.5  # seconds of a connection that was none
MAX_PAUSE_DECLINED = 5.0  # it is there and does not want us: that is not forgotten soon


class Client:
    """The connection of one guest."""

    def __init__(self, path: str, borrower: Borrower, wanted: Wakeup, owner: int | None = None) -> None:
        """Prepare to borrow from the tmemd at `path`, which must be root's, this user's or the owner's.

        The borrower's source sets `wanted` when there is something to say to tmemd.
        """
        self.path = path
        self._owner = owner
        self.borrower = borrower
        self.connected = False
        self._first: Registered | None = None
        self._wanted = wanted
        self._limiter = trio.CapacityLimiter(1)  # not trio's: threads that hang in a backing must not stand in the way

    @property
    def state(self) -> str:
        """How it stands with tmemd, in a word."""
        return "evicted" if self.borrower.evicted else "connected" if self.connected else "disconnected"

    def connect(self) -> None:
        """Register for the first time; raise Unreachable or Declined."""
        self._first = self._register()
        self.borrower.welcome(self._first.welcome)
        self.connected = True

    def _register(self) -> Registered:
        return register(self.path, self.borrower.greeting(), self.borrower.source.fd, self._owner)

    async def run(self) -> None:
        """Serve the first connection, and find tmemd again whenever it was lost."""
        registered, pause = self._first, 0.0
        while True:
            if registered is None:
                try:
                    registered = await self._find_again()
                except WasEvicted:
                    self.borrower.evict()
                    break
                self.borrower.welcome(registered.welcome)
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
            # One that takes us in and throws us out again is not asked many times a second.
            short = trio.current_time() - began < SHORT
            pause = min(max(2 * pause, FIRST_PAUSE), MAX_PAUSE_DECLINED) if short else 0.0
            await trio.sleep(pause)
        log.error("tmemd at %s has evicted this mount: it goes on without a pool until it is mounted anew", self.path)
        await self._forget()

    async def _forget(self) -> None:
        while self.borrower.forget():
            await trio.lowlevel.checkpoint()

    async def _find_again(self) -> Registered:
        """Try until tmemd welcomes us. Raises WasEvicted."""
        pause = FIRST_PAUSE
        told = ""
        while True:
            try:
                # Here, not in the thread: what is held must not change while it is listed.
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
                if str(error) != told:
                    told = str(error)
                    log.warning("tmemd at %s: %s; what is held stays in use", self.path, told)
            await trio.sleep(pause)
            pause = min(2 * pause, most)

    async def _serve(self, registered: Registered) -> None:
        """Talk until the connection ends, which is an exception."""
        registered.connection.setblocking(False)
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(registered.connection))
        async with stream, trio.open_nursery() as nursery:
            await self._take_in(registered.messages)
            nursery.start_soon(self._pump, stream)
            while data := await stream.receive_some(CHUNK):
                await self._take_in(registered.decoder.feed(data))
            registered.decoder.end()
            raise ConnectionResetError(f"tmemd ended it ({os.fspath(self.path)})")

    async def _take_in(self, messages: Sequence[ToGuest]) -> None:
        for message in messages:
            self.borrower.received(trio.current_time(), message)
            if isinstance(message, Taken):
                # Its pages took some ms to lose, and many may follow after a stop: the mount's requests are next. What
                # they find in slabs that a later Taken names is a miss, and what they put there is lost with it.
                await trio.lowlevel.checkpoint()
            elif self.borrower.evicted:
                await self._forget()
                return
        self._wanted.set()

    async def _pump(self, stream: trio.SocketStream) -> None:
        """Send what there is to say; a peer that does not read makes nobody else wait."""
        borrower = self.borrower
        next_tick = _next_tick()
        while True:
            if borrower.owes:
                borrower.pay()
            if trio.current_time() >= next_tick:
                borrower.tick()
                next_tick = _next_tick()
            messages = borrower.outgoing(trio.current_time())
            if messages:
                try:
                    await stream.send_all(b"".join(map(encode, messages)))
                except trio.BrokenResourceError:
                    return  # the reader goes on to the end of what was sent to us
                continue
            if borrower.owes:
                await trio.lowlevel.checkpoint()
                continue
            with trio.move_on_at(min(next_tick, borrower.deadline() or next_tick)):
                await self._wanted.wait()


def _next_tick() -> float:
    """Give the time of the next tick, half a TICK away or more.

    Ticks are multiples of TICK on the machine's clock, so that all guests report at one moment: tmemd wakes once for
    all of them, and not for each, which costs it several times as much.
    """
    least = TICK / 2
    return trio.current_time() + least + TICK - (time.monotonic() + least) % TICK
