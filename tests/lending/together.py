"""Guests and the lender, connected by queues: with their pools and arenas, without sockets and a clock.

Guests are stopped, connections end and tmemd is killed at random. In any order, each page that is found has its bytes,
each persistent page is found, and in the end the ledger and the guests agree.
"""

from __future__ import annotations

import os
import random
from collections import deque
from collections.abc import Iterable

from tests.lending.guest.pooledguest import PooledGuest, noise
from tmem import SLAB_SIZE
from tmem.arena import punch
from tmem.lending.daemon.arenas import is_populated
from tmem.lending.lender.actions import Action, Close, DrainSocket, FindHoles, HangUp, Populate, Punch, Refusal, Send
from tmem.lending.lender.lender import Lender
from tmem.lending.lender.slabmap import State
from tmem.lending.protocol.kind import Kind
from tmem.lending.protocol.messages import FromGuest, Hello, ToGuest, Welcome
from tmem.lending.protocol.runs import runs_of, slabs_of
from tmem.lending.protocol.wire import encode, guest_decoder, tmemd_decoder

ARENA = 48  # slabs
PAGES = [noise(seed) for seed in range(48)]


class Guest(PooledGuest):
    """A guest, its queues, and what its pools must have."""

    def __init__(self, name: str) -> None:
        super().__init__(ARENA, name, persistent_slabs=6)
        self.number: int | None = None
        self.stopped = False
        self.inbox: deque[ToGuest] = deque()
        self.outbox: deque[FromGuest] = deque()
        self._put: dict[int, bytes] = {}
        self._must: dict[int, bytes] = {}

    def use(self, choose: random.Random) -> None:
        """Put, get and flush a few pages, and compare."""
        for _ in range(choose.randint(1, 24)):
            index, page = choose.randint(0, 400), choose.choice(PAGES)
            verb = choose.random()
            if verb < 0.6:
                self.pool.put(1, index, page)
                self._put[index] = page
            elif verb < 0.8:
                assert self.pool.get(1, index) in (None, self._put.get(index))
            elif verb < 0.9:
                if self.kept.put(1, index % 60, page):
                    self._must[index % 60] = page
                else:
                    self._must.pop(index % 60, None)
            else:
                self.kept.flush_page(1, index % 60)
                self._must.pop(index % 60, None)

    def verify(self) -> None:
        """Check that each persistent page is found, and that each page found has its bytes."""
        assert all(self.kept.get(1, index) == page for index, page in self._must.items())
        for index, page in self._put.items():
            assert self.pool.get(1, index) in (None, page)

    def hear(self, now: float, most: int) -> None:
        """Handle at most `most` messages and answer a part of a Revoke."""
        while self.inbox and most > 0:
            (message,) = guest_decoder().feed(encode(self.inbox.popleft()))
            self.borrower.on_message(now, message)
            most -= 1
        if self.borrower.has_open_revoke:
            self.borrower.answer_revoke()

    def speak(self, now: float) -> None:
        """Queue the outgoing messages."""
        self.outbox.extend(self.borrower.outgoing(now))


class Together:
    """Three guests, the lender, and the queues between them."""

    def __init__(self, seed: int, size: int) -> None:
        self.choose = random.Random(seed)
        self.now = 0.0
        self.size = size
        self.lender = Lender(size)
        self.guests = [Guest(f"/mnt/{number}") for number in range(3)]
        self._waiting: deque[Action] = deque()  # actions that the executor has not done

    def of(self, number: int) -> Guest | None:
        """Return a registered guest."""
        return next((guest for guest in self.guests if guest.number == number), None)

    def perform(self, actions: Iterable[Action]) -> None:
        """Deliver messages, drain sockets, and leave the rest for later."""
        for action in actions:
            if isinstance(action, Send):
                guest = self.of(action.guest)
                assert guest is not None
                guest.inbox.append(action.message)
            elif isinstance(action, DrainSocket):
                guest = self.of(action.guest)
                assert guest is not None
                self.listen(guest)
                self.perform(self.lender.on_socket_drained(self.now, action.guest))
            else:
                assert not isinstance(action, HangUp), "an honest guest is cut off"
                self._waiting.append(action)

    def work(self) -> None:
        """Carry out the waiting actions."""
        while self._waiting:
            action = self._waiting.popleft()
            guest = self._arena_of(action.guest)
            match action:
                case Populate(number, batch, runs, _):
                    for first, count in runs:
                        os.posix_fallocate(guest.source.fd, first * SLAB_SIZE, count * SLAB_SIZE)
                    self.perform(self.lender.on_populated(self.now, number, batch, runs))
                case Punch(number, runs, freed):
                    for slab in slabs_of(runs):
                        punch(guest.source.fd, slab)
                    if freed:
                        self.perform(self.lender.on_punched(self.now, number, freed))
                case FindHoles(number, runs):
                    holes = runs_of(slab for slab in slabs_of(runs) if not is_populated(guest.source.fd, slab))
                    self.perform(self.lender.on_holes_found(self.now, number, holes))
                case Close():
                    raise AssertionError("nobody ended")

    def _arena_of(self, number: int) -> Guest:
        name = self.lender.holding(number).name
        return next(guest for guest in self.guests if guest.borrower.name == name)

    def listen(self, guest: Guest) -> None:
        """Pass all that a guest sent to the lender."""
        while guest.outbox and guest.number is not None:
            (message,) = tmemd_decoder().feed(encode(guest.outbox.popleft()))
            assert isinstance(message, FromGuest)
            self.perform(self.lender.on_message(self.now, guest.number, message))

    def connect(self, guest: Guest) -> None:
        """Register a guest, after it has read its old socket to the end."""
        guest.hear(self.now, 1 << 30)
        hello, *claims = guest.borrower.greeting()
        assert isinstance(hello, Hello)
        try:
            guest.number, actions = self.lender.join(self.now, hello, 0, 1)
        except Refusal as refusal:
            if not refusal.retry:
                raise
            return
        self.perform(actions)
        welcome = guest.inbox.popleft()
        assert isinstance(welcome, Welcome)
        guest.borrower.on_welcome(welcome)
        guest.outbox.clear()
        guest.outbox.extend(claims)

    def hang_up(self, guest: Guest) -> None:
        """End a connection after the lender has read all; the guest reads the rest later."""
        self.listen(guest)
        assert guest.number is not None
        number, guest.number = guest.number, None
        self.perform(self.lender.on_disconnected(self.now, number))

    def kill_lender(self, size: int) -> None:
        """Start another lender with the holdings of this one; drop the messages on their way to it."""
        self._waiting.clear()
        holdings = self.lender.holdings()
        self.lender = Lender(size, holdings=holdings)
        self.size = size
        for guest in self.guests:
            guest.number = None
            guest.outbox.clear()

    def step(self) -> None:
        """Do one random step."""
        choose = self.choose
        guest = choose.choice(self.guests)
        self.now += choose.random() * 0.02
        what = choose.random()
        if what < 0.004:
            self.kill_lender(choose.choice([20, 32, 44]))
        elif what < 0.012 and guest.number is not None:
            self.hang_up(guest)
        elif what < 0.03:
            guest.stopped = not guest.stopped
        elif what < 0.3:
            self.work()
        elif what < 0.5 and guest.number is not None:
            self.listen(guest)
        elif not guest.stopped:
            if guest.number is None:
                self.connect(guest)
            elif what < 0.75:
                guest.use(choose)
            else:
                if what < 0.78:
                    guest.borrower.tick()
                guest.hear(self.now, choose.randint(1, 4))
                guest.speak(self.now)
        deadline = self.lender.deadline()
        if deadline is not None and deadline <= self.now:
            self.perform(self.lender.wake(self.now))
        self.check()

    def settle(self) -> None:
        """Handle all messages and actions, without using a pool."""
        for _ in range(400):
            self.now += 0.02
            for guest in self.guests:
                guest.stopped = False
                if guest.number is None:
                    self.connect(guest)
                guest.hear(self.now, 1 << 30)
                guest.speak(self.now)
                self.listen(guest)
            self.work()
            self.perform(self.lender.wake(self.now))

    def agree(self) -> None:
        """Check that the ledger agrees with the guests."""
        for guest in self.guests:
            assert guest.number is not None
            booked = self.lender._accounts[guest.number].map
            assert booked.runs(State.EPHEMERAL) == guest.source.claims(Kind.EPHEMERAL)
            assert booked.runs(State.PERSISTENT) == guest.source.claims(Kind.PERSISTENT)
            guest.verify()

    def check(self) -> None:
        """Check both sides."""
        self.lender.check()
        for guest in self.guests:
            guest.borrower.check()

    def close(self) -> None:
        """Close the arenas."""
        for guest in self.guests:
            guest.source.close()
