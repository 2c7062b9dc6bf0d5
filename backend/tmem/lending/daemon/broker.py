"""Connects the lender with the guests: passes messages to it, carries out its actions, and watches guests' processes.

A message is read, decided on and answered in one stretch without an await, so no other message comes in between. Only
three kinds of tasks wait: for the lender's next deadline, for the next audit, and for the end of each guest's process.
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
from tmem.lending.daemon.arenas import ArenaRefused, Arenas, file_id, validate
from tmem.lending.daemon.connection import Connection, CutOff, Ended
from tmem.lending.daemon.executor import ArenaAction, Executor
from tmem.lending.daemon.holdingsfile import HoldingsFile, Record
from tmem.lending.daemon.processes import Process, duplicate
from tmem.lending.daemon.ratelimits import about_user
from tmem.lending.daemon.worker import Result
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
    """A guest's process, and its connection while it has one."""

    token: bytes
    process: Process
    connection: Connection | None = None


class Broker:
    """Passes messages to the lender and carries out its actions. `run` must be running."""

    def __init__(
        self, lender: Lender, arenas: Arenas, holdings: HoldingsFile, counters: Counter[str], reserve: int
    ) -> None:
        """`reserve` bytes of the machine's memory stay free."""
        self._lender = lender
        self._arenas = arenas
        self._holdings = holdings
        self._counters = counters
        self._executor = Executor(arenas, reserve, self._on_result, self._on_hang)
        self._headroom = Headroom(reserve)
        self._guests: dict[int, Guest] = {}
        self._actions: deque[Action] = deque()
        self._performing = False
        self._holdings_changed = False
        self._earlier_deadline = trio.Event()
        self._next_wake = math.inf
        self._nursery: trio.Nursery | None = None

    async def run(
        self, away: Iterable[tuple[Record, int]], task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Work until cancelled.

        `away` are the guests of an earlier tmemd, each with a pidfd that is closed here.
        """
        by_token = {record.holding.token: (record.process, pidfd) for record, pidfd in away}
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for number, holding in self._lender.guests_away().items():
                process, pidfd = by_token[holding.token]
                self._guests[number] = Guest(holding.token, process)
                nursery.start_soon(self._watch, number, pidfd)
            nursery.start_soon(self._executor.run)
            nursery.start_soon(self._wake_lender)
            nursery.start_soon(self._audit)
            task_status.started()

    # Called by the server.

    def join(self, connection: Connection, process: Process, pidfd: int, hello: Hello) -> int:
        """Register a guest and return its number. Raises Refusal."""
        fd = connection.take_descriptor()
        if fd is None:
            raise Refusal("no arena came with the Hello")
        watched = -1
        try:
            self._validate(fd, process, hello)
            watched = duplicate(pidfd)
            number, actions = self._lender.join(time.monotonic(), hello, process.uid, process.pid)
            if self._arenas.get(number) is None:
                self._arenas.add(number, fd, hello.slabs, process.uid)
                fd = -1
            assert self._nursery is not None
            if number not in self._guests:
                self._guests[number] = Guest(hello.token, process)
                self._nursery.start_soon(self._watch, number, watched)
                watched = -1
        finally:
            if fd >= 0:
                connection.close_descriptor(fd)
            if watched >= 0:
                os.close(watched)
        self._guests[number].connection = connection
        # The name is quoted (%r), so that line breaks in it do not forge log lines.
        words = "guest %d has joined: %r, pid %d, uid %d"
        log.info(words, number, hello.name, process.pid, process.uid, extra=about_user(process.uid))
        self._holdings_changed = True
        self._perform(actions)
        return number

    def receive(self, number: int) -> None:
        """Read once from a guest's socket and handle the messages."""
        guest = self._guests.get(number)
        if guest is None or guest.connection is None:
            return
        try:
            self._handle(number, guest.connection.receive(time.monotonic()))
        except (CutOff, GuestFault, Ended) as error:
            self._cut_off(number, error)

    def handle(self, number: int, messages: Iterable[FromGuest | Verb]) -> None:
        """Handle the messages that a guest sent together with its Hello."""
        try:
            self._handle(number, messages)
        except (CutOff, GuestFault) as error:
            self._cut_off(number, error)

    def on_disconnected(self, number: int, connection: Connection) -> None:
        """Handle the end of a guest's connection. The guest keeps what it holds while its process runs."""
        guest = self._guests.get(number)
        if guest is not None and guest.connection is connection:
            guest.connection = None
            self._perform(self._lender.on_disconnected(time.monotonic(), number))

    def answer(self, verb: Verb, uid: int) -> list[Answer]:
        """Carry out a verb of tmemctl and return the answers."""
        trusted = uid in (0, os.geteuid())
        if trusted and isinstance(verb, Resize):
            try:
                check_ram("size", verb.slabs * SLAB_SIZE)
            except ConfigError as error:
                return [Failed(str(error))]
        answers, actions = verbs.answer(self._lender, time.monotonic(), verb, uid, trusted)
        self._perform(actions)
        if isinstance(answers[-1], Done):
            log.info("uid %d (sizes in slabs): %r", uid, verb, extra=about_user(uid))
            self._holdings_changed = True
            self.flush_holdings()  # new settings must survive a kill of tmemd
        return [self._with_counters(answer) if isinstance(answer, Totals) else answer for answer in answers]

    def flush_holdings(self) -> None:
        """Write the holdings file if anything changed."""
        if self._holdings_changed:
            self._holdings_changed = False
            self._holdings.write(self._records())

    def check(self) -> None:
        """Raise AssertionError unless the ledger is right and every connection within its bounds."""
        self._lender.check()
        for guest in self._guests.values():
            if guest.connection is not None:
                guest.connection.check()

    # The lender's actions.

    def _perform(self, actions: Iterable[Action]) -> None:
        """Carry out actions, and those that result from them, in the order of the decisions."""
        self._actions.extend(actions)
        if self._performing:
            return
        self._performing = True
        try:
            while self._actions:
                self._perform_one(self._actions.popleft())
        finally:
            self._performing = False
        deadline = self._lender.deadline()
        if deadline is not None and deadline < self._next_wake:
            self._earlier_deadline.set()

    def _perform_one(self, action: Action) -> None:
        if isinstance(action, Send):
            self._send(action)
        elif isinstance(action, DrainSocket):
            self._drain_socket(action.guest)
        elif isinstance(action, HangUp):
            self._hang_up(action.guest)
        else:
            self._holdings_changed = True
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
            self._cut_off(action.guest, error)
        except Ended:
            pass  # the task that reads handles what the guest sent before, and then the end

    def _hang_up(self, number: int) -> None:
        guest = self._guests.get(number)
        if guest is not None and guest.connection is not None:
            guest.connection.hang_up()
            guest.connection = None

    def _drain_socket(self, number: int) -> None:
        """Read all that the guest has sent, which may include its answer."""
        guest = self._guests.get(number)
        if guest is not None and guest.connection is not None and guest.connection.fileno() >= 0:
            try:
                connection = guest.connection
                # A socket is not read while its user is above its limit. The guest's slabs are taken then.
                while not connection.delay(time.monotonic()) and (messages := connection.receive(time.monotonic())):
                    self._handle(number, messages)
            except (CutOff, GuestFault, Ended) as error:
                self._cut_off(number, error)
        self._perform(self._lender.on_socket_drained(time.monotonic(), number))

    def _handle(self, number: int, messages: Iterable[FromGuest | Verb]) -> None:
        for message in messages:
            if isinstance(message, Verb):
                raise CutOff("malformed", "a guest used a verb of tmemctl")
            self._perform(self._lender.on_message(time.monotonic(), number, message))

    def _cut_off(self, number: int, error: Exception) -> None:
        """Close a guest's connection. The server's task for it wakes and calls `on_disconnected`."""
        guest = self._guests[number]
        if isinstance(error, CutOff | GuestFault):
            kind = error.kind if isinstance(error, CutOff) else "faulty"
            self._counters[f"cut_off_{kind}"] += 1
            words = "guest %d (pid %d) is cut off: %s"
            log.warning(words, number, guest.process.pid, error, extra=about_user(guest.process.uid))
        if guest.connection is not None:
            guest.connection.hang_up()

    def _flush_later(self, connection: Connection) -> None:
        if connection.queued_bytes and not connection.is_flushing:
            connection.is_flushing = True
            assert self._nursery is not None
            self._nursery.start_soon(connection.flush_all)

    def _validate(self, fd: int, process: Process, hello: Hello) -> None:
        """Raise Refusal unless the memfd is a valid arena and both it and the token belong to this guest."""
        try:
            validate(fd, hello.slabs)
        except ArenaRefused as error:
            raise Refusal(str(error)) from None
        known = next((number for number, guest in self._guests.items() if guest.token == hello.token), None)
        if known is not None and self._guests[known].process != process:
            raise Refusal("the token belongs to another process: make a new one")
        memfd = file_id(fd)
        arena = None if known is None else self._arenas.get(known)
        if self._arenas.find_owner(memfd) not in (None, known) or (arena is not None and arena.file_id != memfd):
            raise Refusal("the arena is not the one that this guest registered before")

    # Results and events.

    def _on_result(self, action: ArenaAction, result: Result) -> None:
        """Pass the result of an action to the lender."""
        now, lender = time.monotonic(), self._lender
        if isinstance(action, Populate):
            self._perform(lender.on_populated(now, action.guest, action.batch, result.runs))
        elif isinstance(action, FindHoles):
            self._perform(lender.on_holes_found(now, action.guest, result.runs))
        elif isinstance(action, CountPopulated):
            self._perform(lender.on_audited(now, action.guest, action.held, result.populated_bytes))
        elif not isinstance(action, Punch):
            self._holdings_changed = True
            self._perform(lender.on_closed(now, action.guest))
        elif action.freed:
            self._perform(lender.on_punched(now, action.guest, action.freed))

    def _on_hang(self, number: int, hangs: bool) -> None:
        self._perform(self._lender.on_hang(time.monotonic(), number, hangs))

    async def _watch(self, number: int, pidfd: int) -> None:
        """Wait until a guest's process has ended, then free what it held."""
        try:
            await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)
        guest = self._guests.pop(number)
        if guest.connection is not None:
            guest.connection.hang_up()
        log.info("guest %d (pid %d) has ended", number, guest.process.pid, extra=about_user(guest.process.uid))
        self._perform(self._lender.on_process_ended(time.monotonic(), number))

    async def _wake_lender(self) -> None:
        """Wake the lender at each of its deadlines."""
        while True:
            deadline = self._lender.deadline()
            self._next_wake = math.inf if deadline is None else deadline
            self._earlier_deadline = trio.Event()
            with trio.move_on_after(max(0.0, self._next_wake - time.monotonic())):
                await self._earlier_deadline.wait()
            if time.monotonic() >= self._next_wake:
                self._perform(self._lender.wake(time.monotonic()))

    async def _audit(self) -> None:
        """Compare regularly what is populated with what is lent, and write the holdings file if it changed."""
        while True:
            await trio.sleep(AUDIT_SECONDS)
            self._perform(self._lender.audit())
            pinned = await trio.to_thread.run_sync(self._headroom.pinned)
            if pinned is not None:
                self._perform(self._lender.on_pinned(time.monotonic(), pinned))
            self.flush_holdings()

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
