"""Any order of anything that guests, people and the machine do: the ledger agrees with guests and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.lending.lender.simulation import Guest, World
from tmem.lending.lender.actions import Holding, Refusal
from tmem.lending.lender.ledger import UserBounds
from tmem.lending.lender.lender import Lender
from tmem.lending.lender.reclaimpolicy import RECLAIM_POLICIES
from tmem.lending.protocol import messages as m
from tmem.lending.protocol.kind import Kind

guests = st.integers(0, 3)
few = st.integers(1, 12)
ages = st.none() | st.floats(0.0, 100.0)


class LenderMachine(RuleBasedStateMachine):
    """Up to four guests around a lender of 24 slabs."""

    @initialize(policy=st.sampled_from(sorted(RECLAIM_POLICIES)))
    def start(self, policy: str) -> None:
        self.lender: Callable[[Sequence[Holding]], Lender] = lambda kept: Lender(
            24, policy=policy, bounds=UserBounds(cap=20), holdings=kept
        )
        self.world = World(self.lender([]))
        self.known: list[Guest] = []
        self.tokens = 0

    def guest(self, place: int) -> Guest | None:
        """Give a guest whose connection stands."""
        guest = self.known[place] if place < len(self.known) else None
        return guest if guest is not None and guest.connected else None

    @rule(slabs=st.sampled_from([4, 16, 100]), persistent=st.sampled_from([None, 0, 3, 30]), uid=st.integers(0, 1))
    def come(self, slabs: int, persistent: int | None, uid: int) -> None:
        if len(self.known) < 4:
            self.tokens += 1
            guest = Guest(self.tokens.to_bytes(16, "big"), slabs, uid)
            try:
                self.world.join(guest, persistent)
            except Refusal:
                return
            self.known.append(guest)

    @rule(place=guests, slabs=few, persistent=st.booleans(), age=ages)
    def ask(self, place: int, slabs: int, persistent: bool, age: float | None) -> None:
        if guest := self.guest(place):
            guest.ask(slabs, persistent, age)

    @rule(place=guests, slabs=few, persistent=st.booleans())
    def give(self, place: int, slabs: int, persistent: bool) -> None:
        if guest := self.guest(place):
            guest.read()
            guest.give(slabs, persistent)

    @rule(place=guests, age=ages, count=st.integers(0, 5))
    def report(self, place: int, age: float | None, count: int) -> None:
        if guest := self.guest(place):
            guest.say(m.Report(age, *[count] * 6))

    @rule(place=guests, most=few)
    def read(self, place: int, most: int) -> None:
        if guest := self.guest(place):
            guest.read(most)

    @rule(place=guests)
    def hear(self, place: int) -> None:
        if guest := self.guest(place):
            self.world.hear(guest)

    @rule(most=few, seconds=st.sampled_from([0.0, 0.005, 0.03, 2.0]))
    def go_on(self, most: int, seconds: float) -> None:
        self.world.pass_time(seconds)
        self.world.work(most)

    @rule(place=guests, stopped=st.booleans())
    def stop(self, place: int, stopped: bool) -> None:
        if guest := self.guest(place):
            guest.stopped = stopped

    @rule(place=guests)
    def hang_up(self, place: int) -> None:
        if guest := self.guest(place):
            self.world.hang_up(guest)

    @rule(place=guests)
    def come_back(self, place: int) -> None:
        if place < len(self.known) and not self.known[place].connected:
            self.world.join(self.known[place], again=True)

    @rule(place=guests)
    def come_back_and_hang_up(self, place: int) -> None:
        if place < len(self.known) and not self.known[place].connected:
            guest = self.known[place]
            self.world.join(guest, again=True)
            guest.outbox.pop()
            self.world.hang_up(guest)

    @rule()
    def restart(self) -> None:
        self.world.restart(self.lender)

    @rule()
    def audit(self) -> None:
        self.world.audit()

    @rule(place=guests)
    def hang_or_go_on(self, place: int) -> None:
        guest = self.known[place] if place < len(self.known) else None
        if guest is not None and guest.number in self.world.hanging:
            self.world.go_on(guest)
        elif guest is not None and guest.number in self.world.guests:
            self.world.hang(guest)

    @rule(place=guests)
    def kill(self, place: int) -> None:
        if place < len(self.known):
            self.world.kill(self.known.pop(place))

    @rule(place=guests, killed=st.booleans())
    def evict(self, place: int, killed: bool) -> None:
        if place < len(self.known):
            guest = self.known.pop(place)
            self.world.evict(guest)
            if killed:
                self.world.kill(guest)

    @rule(short=st.none() | st.integers(0, 6))
    def run_short(self, short: int | None) -> None:
        self.world.short = short

    @rule(size=st.integers(1, 40))
    def resize(self, size: int) -> None:
        self.world.check()  # as long as the size is not smaller than what is booked
        self.world.perform(self.world.lender.resize(self.world.now, size)[1])

    @rule(place=guests, cap=st.none() | few, floor=st.none() | few, promised=st.none() | few)
    def limit(self, place: int, cap: int | None, floor: int | None, promised: int | None) -> None:
        if guest := self.guest(place):
            lender, now = self.world.lender, self.world.now
            try:
                actions = lender.set_limits(now, guest.number, cap=cap, floor=floor, persistent_cap=promised)
            except Refusal:
                return
            self.world.perform(actions)

    @rule(place=guests, verb=st.sampled_from(["freeze", "thaw", "drain"]))
    def use(self, place: int, verb: str) -> None:
        if guest := self.guest(place):
            self.world.perform(getattr(self.world.lender, verb)(self.world.now, guest.number))

    @rule(place=guests, slabs=few, kind=st.sampled_from(Kind))
    def revoke(self, place: int, slabs: int, kind: Kind) -> None:
        if guest := self.guest(place):
            self.world.perform(self.world.lender.revoke(self.world.now, guest.number, slabs, kind))

    @invariant()
    def the_ledger_holds(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        for guest in [*self.world.guests.values()]:
            if guest.number in self.world.hanging:
                self.world.go_on(guest)
        for guest in self.known:
            guest.stopped = False
            if not guest.connected:
                self.world.join(guest, again=True)
        self.world.settle()


TestLender = LenderMachine.TestCase
TestLender.settings = settings(max_examples=40, stateful_step_count=40)
