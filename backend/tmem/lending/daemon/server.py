"""Accepts connections, bounds them, and serves each as a guest or as tmemctl, depending on its first message."""

from __future__ import annotations

import logging
import os
import resource
import socket
import time
from collections import Counter
from functools import partial

import trio

from tmem.lending.daemon import processes
from tmem.lending.daemon.broker import Broker
from tmem.lending.daemon.connection import Connection, CutOff, DescriptorCloser, Ended
from tmem.lending.daemon.processes import Process
from tmem.lending.daemon.ratelimits import FrameLimits, about_user
from tmem.lending.lender.actions import Refusal
from tmem.lending.protocol.messages import Evicted, FromGuest, Hello, Refused, Verb

log = logging.getLogger(__name__)

# Connections and descriptors are reserved for root and tmemd's own user, so that they can always use tmemctl.
MAX_CONNECTIONS = 1024
RESERVED_CONNECTIONS = 64
MAX_CONNECTIONS_PER_USER = 128
RESERVED_DESCRIPTORS = 128
MAX_CLOSING_PER_USER = 4  # hanging closes of descriptors; each open connection may add one
FIRST_MESSAGE_SECONDS = 5.0
IDLE_SECONDS = 60.0  # after which a silent tmemctl is cut off
ANSWER_SECONDS = 5.0  # for tmemctl to read an answer
_GOODBYE_SECONDS = 1.0

# Each reason to close a connection has a counter; all are shown from the start.
COUNTERS = (
    "connections",
    "connections_refused",
    "guests_refused",
    "cut_off_malformed",
    "cut_off_flooding",
    "cut_off_slow",
    "cut_off_silent",
    "cut_off_foreign_descriptors",
    "cut_off_faulty",
)


class Server:
    """Serves a listening socket: guests until they hang up, tmemctl as long as it sends verbs."""

    def __init__(
        self, listener: socket.socket, broker: Broker, counters: Counter[str], trusted: frozenset[int]
    ) -> None:
        self._listener = listener
        self._broker = broker
        self._counters = counters
        counters.update(dict.fromkeys(COUNTERS, 0))
        self._of_user: Counter[int] = Counter()  # connections
        self._trusted = trusted
        self._limits = FrameLimits(trusted, time.monotonic())
        self._closer = DescriptorCloser()

    async def run(self) -> None:
        """Accept connections until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                await trio.lowlevel.wait_readable(self._listener)
                try:
                    stream, _ = self._listener.accept()
                except (BlockingIOError, ConnectionError):
                    continue
                except OSError as error:
                    log.warning("a connection cannot be accepted: %s", error)
                    await trio.sleep(0.1)  # no free descriptors: wait until some are closed
                    continue
                self._admit(stream, nursery)

    def _admit(self, stream: socket.socket, nursery: trio.Nursery) -> None:
        """Serve a connection, unless a bound is reached or its process cannot be identified."""
        found = processes.peer(stream)
        if found is None:
            self._counters["connections_refused"] += 1
            # The peer only sees that the connection ends, so this line is the only explanation.
            unseen = "its process has ended, or /proc hides it (hidepid, a container)"
            log.warning("a connection is refused: %s", unseen, extra=about_user(None))
            stream.close()
            return
        process, pidfd = found
        if (reason := self._refusal(process.uid, stream.fileno())) is not None:
            self._counters["connections_refused"] += 1
            words = "a connection (pid %d, uid %d) is refused: %s"
            log.warning(words, process.pid, process.uid, reason, extra=about_user(process.uid))
            os.close(pidfd)
            stream.close()
            return
        self._counters["connections"] += 1
        self._of_user[process.uid] += 1
        now = time.monotonic()
        shared = self._limits.on_connect(process.uid, self._of_user, now)
        close_descriptor = partial(self._closer.close, process.uid)
        nursery.start_soon(self._serve, Connection(stream, now, shared, close_descriptor), process, pidfd)

    def _refusal(self, uid: int, fd: int) -> str | None:
        """Return why a user may not have another connection, whose descriptor is `fd`; None if it may."""
        if uid in self._trusted:
            return "too many are open" if self._of_user.total() >= MAX_CONNECTIONS else None
        if self._of_user[uid] >= MAX_CONNECTIONS_PER_USER:
            return "too many of its user are open"
        if self._closer.hanging(uid) >= MAX_CLOSING_PER_USER:
            return "closing the descriptors that its user sent hangs"
        others = sum(count for user, count in self._of_user.items() if user not in self._trusted)
        if others >= MAX_CONNECTIONS - RESERVED_CONNECTIONS:
            return "too many are open"
        # The kernel gives out the lowest free number, so it shows how many are in use.
        if fd >= resource.getrlimit(resource.RLIMIT_NOFILE)[0] - RESERVED_DESCRIPTORS:
            return "the remaining descriptors are reserved for root (ulimit -n)"
        return None

    async def _serve(self, connection: Connection, process: Process, pidfd: int) -> None:
        """Serve one connection to its end."""
        try:
            await self._serve_peer(connection, process, pidfd)
        except (Ended, trio.ClosedResourceError):
            pass
        except CutOff as error:
            self._counters[f"cut_off_{error.kind}"] += 1
            words = "a client (pid %d, uid %d) is cut off: %s"
            log.warning(words, process.pid, process.uid, error, extra=about_user(process.uid))
        finally:
            connection.hang_up()
            self._of_user[process.uid] -= 1
            if not self._of_user[process.uid]:
                del self._of_user[process.uid]

    async def _serve_peer(self, connection: Connection, process: Process, pidfd: int) -> None:
        """Wait for the first message, then serve a guest or tmemctl."""
        try:
            messages = await _receive(connection, FIRST_MESSAGE_SECONDS)
            first = messages[0]
            if isinstance(first, Hello):
                number = self._broker.join(connection, process, pidfd, first)
        except Refusal as refusal:
            self._counters["guests_refused"] += 1
            words = "a guest (pid %d, uid %d) is refused: %s"
            log.warning(words, process.pid, process.uid, refusal, extra=about_user(process.uid))
            text = str(refusal)
            connection.send(Evicted(text) if refusal.evicted else Refused(text, refusal.retry))
            with trio.move_on_after(_GOODBYE_SECONDS):
                await connection.flush_all()
            return
        finally:
            os.close(pidfd)
        if isinstance(first, Hello):
            await self._serve_guest(connection, number, messages[1:])
        else:
            await self._serve_tmemctl(connection, process.uid, messages)

    async def _serve_guest(self, connection: Connection, number: int, messages: list[FromGuest | Verb]) -> None:
        """Handle a guest's messages until its connection ends."""
        try:
            self._broker.handle(number, messages)
            while True:
                await connection.wait_readable()
                self._broker.receive(number)
        finally:
            self._broker.on_disconnected(number, connection)

    async def _serve_tmemctl(self, connection: Connection, uid: int, messages: list[FromGuest | Verb]) -> None:
        """Answer verbs until no more come."""
        while True:
            for message in messages:
                if not isinstance(message, Verb):
                    raise CutOff("malformed", "a message of a guest without a Hello")
                for answer in self._broker.answer(message, uid):
                    connection.send(answer)
                    with trio.move_on_after(ANSWER_SECONDS):
                        await connection.flush_all()
                    if connection.queued_bytes:
                        raise CutOff("slow", "an answer is not read")
            messages = await _receive(connection, IDLE_SECONDS)


async def _receive(connection: Connection, seconds: float) -> list[FromGuest | Verb]:
    """Wait for at least one message. Raises CutOff if none comes in time."""
    with trio.move_on_after(seconds):
        while True:
            await connection.wait_readable()
            messages = connection.receive(time.monotonic())
            if messages:
                return messages
    raise CutOff("silent", f"no message within {seconds:g} s")
