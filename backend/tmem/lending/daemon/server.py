"""Accept connections, bound them, and find out from the first message whether a guest or a person is there."""

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
from tmem.lending.daemon.budget import Budgets
from tmem.lending.daemon.connection import Connection, CutOff, Ended
from tmem.lending.daemon.loglines import about
from tmem.lending.daemon.memfds import Disposal
from tmem.lending.daemon.processes import Process
from tmem.lending.daemon.waiting import flush, hang_up, readable
from tmem.lending.lender.actions import Refusal
from tmem.lending.protocol.messages import Answer, Evicted, FromGuest, Hello, Refused, Verb

log = logging.getLogger(__name__)

# Root and the user that runs tmemd always have some: who locks them out can lock out whoever would help.
MAX_CONNECTIONS = 1024
RESERVED_CONNECTIONS = 64
MAX_CONNECTIONS_OF_ONE_USER = 128
RESERVED_DESCRIPTORS = 128
MAX_CLOSING_OF_ONE_USER = 4  # descriptors; each connection that is open already may add one
FIRST_MESSAGE_SECONDS = 5.0
SILENT_SECONDS = 60.0  # after which somebody with tmemctl makes room for others
ANSWER_SECONDS = 5.0  # that somebody has to read an answer
_GOODBYE_SECONDS = 1.0

# Every reason to end a connection has a counter of its own, and all are there from the start.
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
    """Serve a listening socket: guests until they hang up, people for as long as they ask."""

    def __init__(
        self, listener: socket.socket, broker: Broker, counters: Counter[str], trusted: frozenset[int]
    ) -> None:
        self._listener = listener
        self._broker = broker
        self._counters = counters
        counters.update(dict.fromkeys(COUNTERS, 0))
        self._of_user: Counter[int] = Counter()
        self._trusted = trusted
        self._budgets = Budgets(trusted, time.monotonic())
        self._disposal = Disposal()

    async def run(self) -> None:
        """Accept until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                await trio.lowlevel.wait_readable(self._listener)
                try:
                    stream, _ = self._listener.accept()
                except (BlockingIOError, ConnectionError):
                    continue
                except OSError as error:
                    log.warning("a connection cannot be accepted: %s", error)
                    await trio.sleep(0.1)  # no descriptors: wait for some to be closed
                    continue
                self._welcome(stream, nursery)

    def _welcome(self, stream: socket.socket, nursery: trio.Nursery) -> None:
        """Serve a connection if there is room for it and its process is to be seen."""
        found = processes.peer(stream)
        if found is None:
            self._counters["connections_refused"] += 1
            # A guest hears nothing but the end of its connection, so this is where one finds out why.
            unseen = "its process has ended, or /proc hides it (hidepid, a container)"
            log.warning("a connection is refused: %s", unseen, extra=about(None))
            stream.close()
            return
        process, pidfd = found
        if (reason := self._no_room(process.uid, stream.fileno())) is not None:
            self._counters["connections_refused"] += 1
            words = "a connection (pid %d, uid %d) is refused: %s"
            log.warning(words, process.pid, process.uid, reason, extra=about(process.uid))
            os.close(pidfd)
            stream.close()
            return
        self._counters["connections"] += 1
        self._of_user[process.uid] += 1
        now = time.monotonic()
        budgets = self._budgets.of(process.uid, self._of_user, now)
        dispose = partial(self._disposal.dispose, process.uid)
        nursery.start_soon(self._serve, Connection(stream, now, budgets, dispose), process, pidfd)

    def _no_room(self, uid: int, fd: int) -> str | None:
        """Say why a user may not have another connection, which has that descriptor; None where it may."""
        if uid in self._trusted:
            return "too many are open" if self._of_user.total() >= MAX_CONNECTIONS else None
        if self._of_user[uid] >= MAX_CONNECTIONS_OF_ONE_USER:
            return "too many of its user are open"
        if self._disposal.hanging(uid) >= MAX_CLOSING_OF_ONE_USER:
            return "closing what its user sent does not return"
        others = sum(count for user, count in self._of_user.items() if user not in self._trusted)
        if others >= MAX_CONNECTIONS - RESERVED_CONNECTIONS:
            return "too many are open"
        # The lowest number that is free tells how many are in use.
        if fd >= resource.getrlimit(resource.RLIMIT_NOFILE)[0] - RESERVED_DESCRIPTORS:
            return "the descriptors that are left are root's (ulimit -n)"
        return None

    async def _serve(self, connection: Connection, process: Process, pidfd: int) -> None:
        """Serve one connection to its end."""
        try:
            await self._converse(connection, process, pidfd)
        except (Ended, trio.ClosedResourceError):
            pass
        except CutOff as error:
            self._counters[f"cut_off_{error.kind}"] += 1
            words = "a client (pid %d, uid %d) is cut off: %s"
            log.warning(words, process.pid, process.uid, error, extra=about(process.uid))
        finally:
            hang_up(connection)
            self._of_user[process.uid] -= 1
            if not self._of_user[process.uid]:
                del self._of_user[process.uid]

    async def _converse(self, connection: Connection, process: Process, pidfd: int) -> None:
        """Take the first message and go on with who sent it."""
        try:
            messages = await _receive(connection, FIRST_MESSAGE_SECONDS)
            first = messages[0]
            if isinstance(first, Hello):
                number = self._broker.join(connection, process, pidfd, first)
        except Refusal as refusal:
            self._counters["guests_refused"] += 1
            words = "a guest (pid %d, uid %d) is refused: %s"
            log.warning(words, process.pid, process.uid, refusal, extra=about(process.uid))
            text = str(refusal)
            await _say(connection, Evicted(text) if refusal.evicted else Refused(text, refusal.retry))
            return
        finally:
            os.close(pidfd)
        if isinstance(first, Hello):
            await self._serve_guest(connection, number, messages[1:])
        else:
            await self._serve_person(connection, process.uid, messages)

    async def _serve_guest(self, connection: Connection, number: int, messages: list[FromGuest | Verb]) -> None:
        """Hear a guest until its connection ends."""
        try:
            self._broker.hear(number, messages)
            while True:
                await readable(connection)
                self._broker.receive(number)
        finally:
            self._broker.disconnected(number, connection)

    async def _serve_person(self, connection: Connection, uid: int, messages: list[FromGuest | Verb]) -> None:
        """Answer verbs until no more come."""
        while True:
            for message in messages:
                if not isinstance(message, Verb):
                    raise CutOff("malformed", "a message of a guest without a Hello")
                for answer in self._broker.answer(message, uid):
                    connection.send(answer)
                    with trio.move_on_after(ANSWER_SECONDS):
                        await flush(connection)
                    if connection.queued_bytes:
                        raise CutOff("slow", "an answer is not read")
            messages = await _receive(connection, SILENT_SECONDS)


async def _receive(connection: Connection, seconds: float) -> list[FromGuest | Verb]:
    """Wait for at least one message. Raises CutOff for one that does not come in time."""
    with trio.move_on_after(seconds):
        while True:
            await readable(connection)
            messages = connection.receive(time.monotonic())
            if messages:
                return messages
    raise CutOff("silent", f"no message within {seconds:g} s")


async def _say(connection: Connection, message: Answer | Refused | Evicted) -> None:
    """Send a last message, and give its reader a moment."""
    connection.send(message)
    with trio.move_on_after(_GOODBYE_SECONDS):
        await flush(connection)
