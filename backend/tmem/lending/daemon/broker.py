"""Between the lender, which decides, and the guests: who is connected, whose process runs, what is carried out.

Everything but the waiting is one stretch without an await: a message of a guest is heard, decided on and sent off
before anybody else is. Three tasks wait: for the lender's next deadline, for the next audit, and one for the end of
each guest's process.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import trio

from tmem.arena import SLAB_SIZE
from tmem.lending.daemon import memfds
from tmem.lending.daemon.arenas import Arenas
from tmem.lending.daemon.connection import Connection, CutOff, Ended
from tmem.lending.daemon.executor import Executor, Work
from tmem.lending.daemon.holdings import Holdings, Record
from tmem.lending.daemon.jobs import Result
from tmem.lending.daemon.loglines import about
from tmem.lending.daemon.processes import Process, duplicate
from tmem.lending.daemon.waiting import flush, hang_up
from tmem.lending.lender import verbs
from tmem.lending.lender.actions import (
    Action,
    CountPopulated,
    DrainSocket,
    FindHoles,
    GuestFault,
    HangUp,
    Populate,
    Punch,
    Refusal,
    Send,
)
from tmem.lending.lender.lender import Lender
from tmem.lending.protocol.messages import Answer, Done, Failed, FromGuest, Hello, Resize, Totals, Verb
from tmem.lending.protocol.runs import count
from tmemcommon.headroom import Headroom
from tmemcommon.sizes import ConfigError, check_ram

log = logging.getLogger(__name__)

AUDIT_SECONDS = 1.0


@dataclass(slots=True)
class Guest:
    """A guest's process, and its connection while there is one."""

    token: bytes
    process: Process
    connection: Connection | None = None


class Broker:
    """Carry messages to the lender and its decisions out. `run` must be running."""

    def __init__(
        self, lender: Lender, arenas: Arenas, holdings: Holdings, counters: Counter[str], reserve: int
    ) -> None:
        """`reserve` bytes of the machine's memory are left alone."""
        self._lender = lender
        self._arenas = arenas
        self._holdings = holdings
        self._counters = counters
        self._executor = Executor(arenas, reserve, self._done, self._hangs)
        self._headroom = Headroom(reserve)
        self._guests: dict[int, Guest] = {}
        self._actions: deque[Action] = deque()
        self._performing = False
        self._unwritten = False
        self._sooner = trio.Event()
        self._woken_at = math.inf
        self._nursery: trio.Nursery | None = None

    async def run(
        self, away: Iterable[tuple[Record, int]], task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Work until cancelled; `away` are the guests of the tmemd before, each with a pidfd that is closed here."""
        by_token = {record.holding.token: (record.process, pidfd) for record, pidfd in away}
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for number, holding in self._lender.guests_away().items():
                process, pidfd = by_token[holding.token]
                self._guests[number] = Guest(holding.token, process)
                nursery.start_soon(self._watch, number, pidfd)
            nursery.start_soon(self._executor.run)
            nursery.start_soon(self._keep_deadlines)
            nursery.start_soon(self._audit)
            task_status.started()

    # What guests and people want.

    def join(self, connection: Connection, process: Process, pidfd: int, hello: Hello) -> int:
        """Register a guest and give its number. Raises Refusal."""
        fd = connection.take_descriptor()
        if fd is None:
            raise Refusal("no arena came with the Hello")
        watched = -1
        try:
            self._inspect(fd, process, hello)
            watched = duplicate(pidfd)
            number, actions = self._lender.join(time.monotonic(), hello, process.uid, process.pid)
            if self._arenas.get(number) is None:
                self._arenas.adopt(number, fd, hello.slabs, process.uid)
                fd = -1
            assert self._nursery is not None
            if number not in self._guests:
                self._guests[number] = Guest(hello.token, process)
                self._nursery.start_soon(self._watch, number, watched)
                watched = -1
        finally:
            if fd >= 0:
                connection.dispose(fd)
            if watched >= 0:
                os.close(watched)
        self._guests[number].connection = connection
        # The name is somebody else's text: quoted, it stays on its line.
        words = "guest %d has joined: %r, pid %d, uid %d"
        log.info(words, number, hello.name, process.pid, process.uid, extra=about(process.uid))
        self._unwritten = True
        self._perform(actions)
        return number

    def receive(self, number: int) -> None:
        """Read once what a guest sent and act on it."""
        guest = self._guests.get(number)
        if guest is None or guest.connection is None:
            return
        try:
            self._hear(number, guest.connection.receive(time.monotonic()))
        except (CutOff, GuestFault, Ended) as error:
            self._cut(number, error)

    def hear(self, number: int, messages: Iterable[FromGuest | Verb]) -> None:
        """Act on what a guest sent together with its Hello."""
        try:
            self._hear(number, messages)
        except (CutOff, GuestFault) as error:
            self._cut(number, error)

    def disconnected(self, number: int, connection: Connection) -> None:
        """Note that a guest's connection has ended; the guest keeps what it holds as long as its process runs."""
        guest = self._guests.get(number)
        if guest is not None and guest.connection is connection:
            guest.connection = None
            self._perform(self._lender.on_disconnected(time.monotonic(), number))

    def answer(self, verb: Verb, uid: int) -> list[Answer]:
        """Carry out what somebody asked for with tmemctl."""
        trusted = uid in (0, os.geteuid())
        if trusted and isinstance(verb, Resize):
            try:
                check_ram("size", verb.slabs * SLAB_SIZE)
            except ConfigError as error:
                return [Failed(str(error))]
        answers, actions = verbs.answer(self._lender, time.monotonic(), verb, uid, trusted)
        self._perform(actions)
        if isinstance(answers[-1], Done):
            log.info("uid %d (sizes in slabs): %r", uid, verb, extra=about(uid))
            self._unwritten = True
            self.flush_holdings()  # what was set outlives us
        return [self._with_counters(answer) if isinstance(answer, Totals) else answer for answer in answers]

    def flush_holdings(self) -> None:
        """Put down what guests hold, if that changed."""
        if self._unwritten:
            self._unwritten = False
            self._holdings.write(self._records())

    def check(self) -> None:
        """Raise AssertionError unless the ledger is right and every connection within its bounds."""
        self._lender.check()
        for guest in self._guests.values():
            if guest.connection is not None:
                guest.connection.check()

    # Carrying out.

    def _perform(self, actions: Iterable[Action]) -> None:
        """Carry actions out in the order in which they were decided, also those that come of them."""
        self._actions.extend(actions)
        if self._performing:
            return
        self._performing = True
        try:
            while self._actions:
                self._do(self._actions.popleft())
        finally:
            self._performing = False
        deadline = self._lender.deadline()
        if deadline is not None and deadline < self._woken_at:
            self._sooner.set()

    def _do(self, action: Action) -> None:
        if isinstance(action, Send):
            self._send(action)
        elif isinstance(action, DrainSocket):
            self._read_dry(action.guest)
        elif isinstance(action, HangUp):
            self._hang_up(action.guest)
        else:
            self._unwritten = True
            if isinstance(action, Populate) and action.guest in self._guests:
                token, slabs = self._guests[action.guest].token, count(action.runs)
                self._holdings.cover(token, action.kind, slabs, self._records)
            self._executor.submit(action)

    def _send(self, action: Send) -> None:
        guest = self._guests.get(action.guest)
        if guest is None or guest.connection is None or guest.connection.fileno() < 0:
            return
        try:
            guest.connection.send(action.message)
            self._flush_later(guest.connection)
        except CutOff as error:
            self._cut(action.guest, error)
        except Ended:
            pass  # what it said before it hung up is still to be read, and then its end

    def _hang_up(self, number: int) -> None:
        guest = self._guests.get(number)
        if guest is not None and guest.connection is not None:
            hang_up(guest.connection)
            guest.connection = None

    def _read_dry(self, number: int) -> None:
        """Read all that the socket holds: a guest that was stopped may have answered before."""
        guest = self._guests.get(number)
        if guest is not None and guest.connection is not None and guest.connection.fileno() >= 0:
            try:
                connection = guest.connection
                # One whose user has sent more than it may is not read: then its slabs are taken, and that is all.
                while not connection.delay(time.monotonic()) and (messages := connection.receive(time.monotonic())):
                    self._hear(number, messages)
            except (CutOff, GuestFault, Ended) as error:
                self._cut(number, error)
        self._perform(self._lender.on_socket_drained(time.monotonic(), number))

    def _hear(self, number: int, messages: Iterable[FromGuest | Verb]) -> None:
        for message in messages:
            if isinstance(message, Verb):
                raise CutOff("malformed", "a guest used a verb of tmemctl")
            self._perform(self._lender.on_message(time.monotonic(), number, message))

    def _cut(self, number: int, error: Exception) -> None:
        """End a guest's connection; whoever waits for it is woken and says that it is disconnected."""
        guest = self._guests[number]
        if isinstance(error, CutOff | GuestFault):
            kind = error.kind if isinstance(error, CutOff) else "faulty"
            self._counters[f"cut_off_{kind}"] += 1
            words = "guest %d (pid %d) is cut off: %s"
            log.warning(words, number, guest.process.pid, error, extra=about(guest.process.uid))
        if guest.connection is not None:
            hang_up(guest.connection)

    def _flush_later(self, connection: Connection) -> None:
        if connection.queued_bytes and not connection.is_flushing:
            connection.is_flushing = True
            assert self._nursery is not None
            self._nursery.start_soon(flush, connection)

    # What is found out.

    def _inspect(self, fd: int, process: Process, hello: Hello) -> None:
        """Raise Refusal unless a guest may come with this memfd, and under this token."""
        try:
            memfds.validate(fd, hello.slabs)
        except memfds.MemfdRefused as error:
            raise Refusal(str(error)) from None
        known = next((number for number, guest in self._guests.items() if guest.token == hello.token), None)
        if known is not None and self._guests[known].process != process:
            raise Refusal("the token is another process's: make one of your own")
        identity = memfds.identity(fd)
        arena = None if known is None else self._arenas.get(known)
        if self._arenas.owner(identity) not in (None, known) or (arena is not None and arena.identity != identity):
            raise Refusal("the arena is not the one that this guest registered before")

    def _done(self, work: Work, result: Result) -> None:
        """Tell the lender what came of a decision."""
        now, lender = time.monotonic(), self._lender
        if isinstance(work, Populate):
            self._perform(lender.on_populated(now, work.guest, work.batch, result.runs))
        elif isinstance(work, FindHoles):
            self._perform(lender.on_holes_found(now, work.guest, result.runs))
        elif isinstance(work, CountPopulated):
            self._perform(lender.on_audited(now, work.guest, work.held, result.populated_bytes))
        elif not isinstance(work, Punch):
            self._unwritten = True
            self._perform(lender.on_closed(now, work.guest))
        elif work.freed:
            self._perform(lender.on_punched(now, work.guest, work.freed))

    def _hangs(self, number: int, does: bool) -> None:
        self._perform(self._lender.on_hang(time.monotonic(), number, does))

    async def _watch(self, number: int, pidfd: int) -> None:
        """Wait for the end of a guest's process, then free what it held."""
        try:
            await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)
        guest = self._guests.pop(number)
        if guest.connection is not None:
            hang_up(guest.connection)
        log.info("guest %d (pid %d) has ended", number, guest.process.pid, extra=about(guest.process.uid))
        self._perform(self._lender.on_process_ended(time.monotonic(), number))

    async def _keep_deadlines(self) -> None:
        """Wake the lender when it wants to be woken."""
        while True:
            deadline = self._lender.deadline()
            self._woken_at = math.inf if deadline is None else deadline
            self._sooner = trio.Event()
            with trio.move_on_after(max(0.0, self._woken_at - time.monotonic())):
                await self._sooner.wait()
            if time.monotonic() >= self._woken_at:
                self._perform(self._lender.wake(time.monotonic()))

    async def _audit(self) -> None:
        """Have what is real compared with what is lent, and put down what changed."""
        while True:
            await trio.sleep(AUDIT_SECONDS)
            self._perform(self._lender.audit())
            pinned = await trio.to_thread.run_sync(self._headroom.pinned)
            if pinned is not None:
                self._perform(self._lender.on_pinned(time.monotonic(), pinned))
            self.flush_holdings()

    # What is told.

    def _records(self) -> Iterator[Record]:
        processes = {guest.token: guest.process for guest in self._guests.values()}
        for holding in self._lender.holdings():
            if holding.token in processes:
                yield Record.of(holding, processes[holding.token], self._holdings.credit)

    def _with_counters(self, totals: Totals) -> Totals:
        own = {
            **self._counters,
            "holdings_writes": self._holdings.writes,
            "holdings_failures": self._holdings.failures,
        }
        return Totals({**totals.counters, **own})
