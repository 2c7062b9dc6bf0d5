"""A simulation to try the lender in: guests, sockets, arenas and a clock, all of them simulated.

Messages lie in the sockets until somebody reads them and actions wait in a queue until somebody carries them out, so
a test chooses which order things happen in. What is real is known here, so that it can be held against the ledger.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from tmem.arena import SLAB_SIZE
from tmem.lending.daemon.holdingsfile import Record
from tmem.lending.daemon.processes import Process
from tmem.lending.lender.actions import (
    Action,
    Close,
    CountPopulated,
    DrainSocket,
    FindHoles,
    HangUp,
    Holding,
    Populate,
    Punch,
    Send,
)
from tmem.lending.lender.lender import Lender
from tmem.lending.lender.reclaimer import MAX_UNCONFIRMED
from tmem.lending.lender.slabmap import State
from tmem.lending.protocol import messages as m
from tmem.lending.protocol.messages import FromGuest, ToGuest
from tmem.lending.protocol.runs import runs_of, slabs_of, split_for_messages


@dataclass(eq=False)
class Guest:
    """An honest guest, as far as lending goes: it knows what it holds, and does what it is told."""

    token: bytes
    slabs: int
    uid: int = 1000
    number: int = 0
    connected: bool = False
    stopped: bool = False
    frozen: bool = False
    refuses: bool = False  # answers no Revoke
    ephemeral: set[int] = field(default_factory=set)
    persistent: set[int] = field(default_factory=set)
    asks: dict[int, m.Ask] = field(default_factory=dict)
    denied: list[str] = field(default_factory=list)
    inbox: deque[ToGuest] = field(default_factory=deque)
    outbox: deque[FromGuest] = field(default_factory=deque)
    populated: set[int] = field(default_factory=set)  # slabs of its arena that have memory
    serial: int = 0

    def say(self, message: FromGuest) -> None:
        """Send a message, which lies in the socket then."""
        self.outbox.append(message)

    def ask(self, slabs: int, persistent: bool = False, age: float | None = None) -> bool:
        """Ask, unless an Ask of the kind is open."""
        if not self.connected or any(ask.persistent == persistent for ask in self.asks.values()):
            return False
        self.serial += 1
        self.asks[self.serial] = m.Ask(self.serial, slabs, persistent, age)
        self.say(self.asks[self.serial])
        return True

    def give(self, slabs: int, persistent: bool = False, answer: int = 0) -> None:
        """Return slabs, the highest first."""
        held = self.persistent if persistent else self.ephemeral
        given = sorted(held, reverse=True)[:slabs]
        held.difference_update(given)
        for part, last in split_for_messages(runs_of(given)):
            self.say(m.Return(part, persistent, answer, last))

    def read(self, most: int = 1 << 30) -> None:
        """Act on messages, as long as the process runs."""
        while self.inbox and not self.stopped and most > 0:
            most -= 1
            self.act(self.inbox.popleft())

    def lose(self) -> None:
        """Lose all that is held."""
        self.ephemeral.clear()
        self.persistent.clear()
        self.asks.clear()

    def act(self, message: ToGuest) -> None:
        """Do what an honest guest does."""
        match message:
            case m.Lend(runs, serial, persistent, done):
                lent = set(slabs_of(runs))
                assert self.asks[serial].persistent == persistent
                assert not lent & (self.ephemeral | self.persistent), "lent what the guest holds"
                taken = [slabs_of(later.runs) for later in self.inbox if isinstance(later, m.Taken)]
                unconfirmed = len(taken) + sum(isinstance(said, m.Confirm) for said in self.outbox)
                # With so many it is not told of more.
                assert lent <= self.populated.union(*taken) or unconfirmed == MAX_UNCONFIRMED, "not populated"
                (self.persistent if persistent else self.ephemeral).update(lent)
                if done:
                    del self.asks[serial]
            case m.Deny(serial, reason):
                del self.asks[serial]
                self.denied.append(reason)
            case m.Revoke(serial, slabs, persistent):
                if not self.refuses:
                    self.give(slabs, persistent, serial)
            case m.Taken(runs, serial):
                assert self.persistent.isdisjoint(slabs_of(runs)), "took persistent slabs"
                self.ephemeral.difference_update(slabs_of(runs))
                self.say(m.Confirm(serial))
            case m.Evicted():
                self.lose()
            case m.Limits(_, _, frozen):
                self.frozen = frozen
            case m.Welcome(number):
                self.number = number


class Simulation:
    """The lender with guests around it. `short` is how many more slabs can be populated, None for any number."""

    def __init__(self, lender: Lender) -> None:
        self.lender = lender
        self.now = 0.0
        self.guests: dict[int, Guest] = {}
        self.gone: list[Guest] = []
        self.queue: deque[Action] = deque()
        self.hanging: dict[int, deque[Action]] = {}  # what waits for calls on the arenas of guests to return
        self.short: int | None = None
        self.booked = 0  # slabs at the last check

    def perform(self, actions: Iterable[Action]) -> None:
        """Deliver messages and queue the rest; what drains a socket happens at once."""
        for action in actions:
            if isinstance(action, Send):
                guest = self.guests[action.guest]
                assert guest.connected, f"a message to a guest that is away: {action.message}"
                guest.inbox.append(action.message)
            elif isinstance(action, DrainSocket):
                self.hear(self.guests[action.guest])
                self.perform(self.lender.on_socket_drained(self.now, action.guest))
            elif isinstance(action, HangUp):
                guest = self.guests[action.guest]
                guest.read()
                guest.connected = False
                guest.outbox.clear()
            else:
                self.queue.append(action)

    def work(self, most: int = 1 << 30) -> None:
        """Carry out what waits."""
        while self.queue and most > 0:
            most -= 1
            action = self.queue.popleft()
            if action.guest in self.hanging:
                self.hanging[action.guest].append(action)
            else:
                self.do(action)

    def hang(self, guest: Guest) -> None:
        """Make calls on a guest's arena hang from now on; the lender has been told."""
        self.hanging[guest.number] = deque()
        self.perform(self.lender.on_hang(self.now, guest.number, True))

    def go_on(self, guest: Guest) -> None:
        """Make calls on a guest's arena return again."""
        for action in self.hanging.pop(guest.number):
            self.do(action)
        self.perform(self.lender.on_hang(self.now, guest.number, False))

    def do(self, action: Action) -> None:
        """Carry one action out."""
        guest = self.guests.get(action.guest)
        if guest is None:
            return
        match action:
            case Populate(number, batch, runs):
                wanted = sorted(slabs_of(runs))
                real = wanted if self.short is None else wanted[: self.short]
                if self.short is not None:
                    self.short -= len(real)
                guest.populated.update(real)
                self.perform(self.lender.on_populated(self.now, number, batch, runs_of(real)))
            case Punch(number, runs, freed):
                guest.populated -= {slab for slab in guest.populated if any(a <= slab < a + n for a, n in runs)}
                if freed:
                    self.perform(self.lender.on_punched(self.now, number, freed))
            case CountPopulated(number, held):
                self.perform(self.lender.on_audited(self.now, number, held, len(guest.populated) * SLAB_SIZE))
            case FindHoles(number, runs):
                self.perform(
                    self.lender.on_holes_found(self.now, number, runs_of(set(slabs_of(runs)) - guest.populated))
                )
            case Close(number) if any(other.guest == number for other in self.queue):
                self.queue.append(action)  # what came of an earlier action comes before
            case Close(number):
                guest.populated.clear()
                self.perform(self.lender.on_closed(self.now, number))
                if number not in self.lender._accounts:
                    del self.guests[number]
                    self.gone.append(guest)

    def join(self, guest: Guest, persistent_slabs: int | None = 0, again: bool = False) -> None:
        """Register a guest; with `again` it drops what is in its old socket, and claims what it holds."""
        guest.asks.clear()
        hello = m.Hello(m.VERSION, guest.token, f"/mnt/{guest.token.hex()}", guest.slabs, persistent_slabs, again)
        number, actions = self.lender.join(self.now, hello, guest.uid, 1)
        guest.number, guest.connected = number, True
        self.guests[number] = guest
        self.perform(actions)
        if again:
            self.claim(guest)

    def claim(self, guest: Guest) -> None:
        """Claim what a guest holds."""
        for part, _ in split_for_messages(runs_of(guest.persistent), 8):
            guest.say(m.Claim(part, True, False))
        for part, last in split_for_messages(runs_of(guest.ephemeral), 8):
            guest.say(m.Claim(part, False, last))

    def hear(self, guest: Guest) -> None:
        """Deliver all messages of a guest to the lender."""
        while guest.outbox and guest.connected:
            self.perform(self.lender.on_message(self.now, guest.number, guest.outbox.popleft()))

    def audit(self) -> None:
        """Run an audit after all pending actions."""
        self.perform(self.lender.audit())

    def restart(self, lender: Callable[[Sequence[Holding]], Lender], forget: bool = False) -> None:
        """Kill the lender and start one with its holdings, which say how much a guest holds and not which slabs.

        What it had decided and not carried out is not done; the guests go on with what they hold and know.
        """
        held = [] if forget else self.lender.holdings()
        kept = [Record.of(holding, Process(1, 1, holding.uid), 0).holding for holding in held]
        guests = {guest.token: guest for guest in self.guests.values()}
        self.queue.clear()
        self.hanging.clear()
        self.lender = lender(kept)
        away = self.lender.guests_away()
        self.guests = {number: guests[holding.token] for number, holding in away.items()}
        for guest in guests.values():
            guest.connected = False
            guest.inbox.clear()
            guest.outbox.clear()
        stats = self.lender.stats()
        self.booked = stats.ephemeral + stats.persistent

    def hang_up(self, guest: Guest) -> None:
        """End a guest's connection: the lender reads what was sent, the guest reads nothing more."""
        self.hear(guest)
        guest.connected = False
        guest.inbox.clear()
        self.perform(self.lender.on_disconnected(self.now, guest.number))

    def evict(self, guest: Guest) -> None:
        """End a guest as tmemctl evict does; one that is away or stopped finds its memory gone."""
        self.perform(self.lender.evict(self.now, guest.number, True))
        guest.inbox.clear()
        guest.lose()

    def kill(self, guest: Guest) -> None:
        """End a guest's process."""
        guest.connected = False
        guest.outbox.clear()
        self.perform(self.lender.on_process_ended(self.now, guest.number))

    def pass_time(self, seconds: float) -> None:
        """Advance the clock; the lender is woken at its deadlines."""
        self.now += seconds
        deadline = self.lender.deadline()
        if deadline is not None and deadline <= self.now:
            self.perform(self.lender.wake(self.now))

    def settle(self) -> None:
        """Run guests, executor and lender until nothing is left to do."""
        for _ in range(10_000):
            self.work()
            for guest in [*self.guests.values()]:
                guest.read()
                self.hear(guest)
            if not self.queue and not any(g.outbox or (g.inbox and not g.stopped) for g in self.guests.values()):
                deadline = self.lender.deadline()
                if deadline is None or deadline > self.now + 1.0:
                    break
                self.pass_time(max(0.0, deadline - self.now))
        else:
            raise AssertionError("it never settles")
        self.check()

    def check(self) -> None:
        """Hold the ledger against the simulation."""
        self.lender.check()
        stats = self.lender.stats()
        total = stats.ephemeral + stats.persistent + stats.promised + stats.unpunched + stats.pinned
        assert total <= max(stats.size, self.booked), "lent beyond the size"
        self.booked = total
        if self.queue or self.hanging:
            return
        kept = sum(account.unpunched for account in self.lender._accounts.values() if account.settings.evicted)
        assert stats.unpunched == kept, "what is punched stays booked"
        for number, guest in self.guests.items():
            account = self.lender._accounts[number]
            ephemeral = set(slabs_of(account.map.runs(State.EPHEMERAL)))
            persistent = set(slabs_of(account.map.runs(State.PERSISTENT)))
            booked = ephemeral | persistent
            assert guest.persistent <= guest.populated, "a persistent slab lost its memory"
            if account.slabs_unknown:  # so many slabs, whichever they are
                continue
            assert guest.persistent <= booked, "a persistent slab is booked no more"
            if account.is_attached and not (guest.inbox or guest.outbox):
                assert guest.ephemeral == ephemeral
                assert guest.persistent == persistent
                assert guest.populated == booked


# What most tests begin with.


def simulation(size: int = 100, **options: object) -> Simulation:
    """Return a simulation around a lender of so many slabs."""
    return Simulation(Lender(size, **options))  # type: ignore[arg-type]


def add(here: Simulation, slabs: int = 1000, persistent: int | None = 0, uid: int = 1000) -> Guest:
    """Add a guest that joins."""
    guest = Guest(len(here.guests).to_bytes(16, "big"), slabs, uid)
    here.join(guest, persistent)
    here.settle()
    return guest


def hold(here: Simulation, guest: Guest, slabs: int, persistent: bool = False, age: float | None = None) -> None:
    """Send an Ask and run until nothing is left to do."""
    assert guest.ask(slabs, persistent, age)
    here.settle()


def report(here: Simulation, guest: Guest, age: float | None, **counters: int) -> None:
    """Send a Report."""
    fields = {"pages": 0, "used_bytes": 0, "puts": 0, "hits": 0, "misses": 0, "ghost_hits": 0}
    guest.say(m.Report(age, **(fields | counters)))
    here.hear(guest)


def counters(here: Simulation) -> dict[str, int]:
    """Return the lender's counters."""
    return here.lender.stats().counters
