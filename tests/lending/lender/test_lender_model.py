"""Any order of anything that guests, people and the machine do: the ledger agrees with guests and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.lending.lender.simulation import Guest, Simulation
from tmem.lending.lender.actions import Holding, Refusal
from tmem.lending.lender.ledger import UserBounds
from tmem.lending.lender.lender import Lender
from tmem.lending.lender.reclaimpolicy import RECLAIM_POLICIES, ReclaimPolicy
from tmem.lending.protocol import messages as m
from tmem.lending.protocol.kind import Kind

guests = st.integers(0, 3)
few = st.integers(1, 12)
ages = st.none() | st.floats(0.0, 100.0)


class LenderMachine(RuleBasedStateMachine):
    """Up to four guests around a lender of 24 slabs."""

    @initialize(policy=st.sampled_from([*RECLAIM_POLICIES.values()]))
    def start(self, policy: type[ReclaimPolicy]) -> None:
        self.lender: Callable[[Sequence[Holding]], Lender] = lambda kept: Lender(
            24, policy=policy, bounds=UserBounds(cap=20), holdings=kept
        )
        self.simulation = Simulation(self.lender([]))
        self.known: list[Guest] = []
        self.tokens = 0

    def guest(self, place: int) -> Guest | None:
        """Return a connected guest."""
        guest = self.known[place] if place < len(self.known) else None
        return guest if guest is not None and guest.connected else None

    @rule(slabs=st.sampled_from([4, 16, 100]), persistent=st.sampled_from([None, 0, 3, 30]), uid=st.integers(0, 1))
    def come(self, slabs: int, persistent: int | None, uid: int) -> None:
        if len(self.known) < 4:
            self.tokens += 1
            guest = Guest(self.tokens.to_bytes(16, "big"), slabs, uid)
            try:
                self.simulation.join(guest, persistent)
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
            self.simulation.hear(guest)

    @rule(most=few, seconds=st.sampled_from([0.0, 0.005, 0.03, 2.0]))
    def go_on(self, most: int, seconds: float) -> None:
        self.simulation.pass_time(seconds)
        self.simulation.work(most)

    @rule(place=guests, stopped=st.booleans())
    def stop(self, place: int, stopped: bool) -> None:
        if guest := self.guest(place):
            guest.stopped = stopped

    @rule(place=guests)
    def hang_up(self, place: int) -> None:
        if guest := self.guest(place):
            self.simulation.hang_up(guest)

    @rule(place=guests)
    def come_back(self, place: int) -> None:
        if place < len(self.known) and not self.known[place].connected:
            self.simulation.join(self.known[place], again=True)

    @rule(place=guests)
    def come_back_and_hang_up(self, place: int) -> None:
        if place < len(self.known) and not self.known[place].connected:
            guest = self.known[place]
            self.simulation.join(guest, again=True)
            guest.outbox.pop()
            self.simulation.hang_up(guest)

    @rule()
    def restart(self) -> None:
        self.simulation.restart(self.lender)

    @rule()
    def audit(self) -> None:
        self.simulation.audit()

    @rule(place=guests)
    def hang_or_go_on(self, place: int) -> None:
        guest = self.known[place] if place < len(self.known) else None
        if guest is not None and guest.number in self.simulation.hanging:
            self.simulation.go_on(guest)
        elif guest is not None and guest.number in self.simulation.guests:
            self.simulation.hang(guest)

    @rule(place=guests)
    def kill(self, place: int) -> None:
        if place < len(self.known):
            self.simulation.kill(self.known.pop(place))

    @rule(place=guests, killed=st.booleans())
    def evict(self, place: int, killed: bool) -> None:
        if place < len(self.known):
            guest = self.known.pop(place)
            self.simulation.evict(guest)
            if killed:
                self.simulation.kill(guest)

    @rule(short=st.none() | st.integers(0, 6))
    def run_short(self, short: int | None) -> None:
        self.simulation.short = short

    @rule(size=st.integers(1, 40))
    def resize(self, size: int) -> None:
        self.simulation.check()  # as long as the size is not smaller than what is booked
        self.simulation.perform(self.simulation.lender.resize(self.simulation.now, size)[1])

    @rule(place=guests, cap=st.none() | few, floor=st.none() | few, promised=st.none() | few)
    def limit(self, place: int, cap: int | None, floor: int | None, promised: int | None) -> None:
        if guest := self.guest(place):
            lender, now = self.simulation.lender, self.simulation.now
            try:
                actions = lender.set_limits(now, guest.number, cap=cap, floor=floor, persistent_cap=promised)
            except Refusal:
                return
            self.simulation.perform(actions)

    @rule(place=guests, verb=st.sampled_from(["freeze", "thaw", "drain"]))
    def use(self, place: int, verb: str) -> None:
        if guest := self.guest(place):
            self.simulation.perform(getattr(self.simulation.lender, verb)(self.simulation.now, guest.number))

    @rule(place=guests, slabs=few, kind=st.sampled_from(Kind))
    def revoke(self, place: int, slabs: int, kind: Kind) -> None:
        if guest := self.guest(place):
            self.simulation.perform(self.simulation.lender.revoke(self.simulation.now, guest.number, slabs, kind))

    @invariant()
    def the_ledger_holds(self) -> None:
        self.simulation.check()

    def teardown(self) -> None:
        for guest in [*self.simulation.guests.values()]:
            if guest.number in self.simulation.hanging:
                self.simulation.go_on(guest)
        for guest in self.known:
            guest.stopped = False
            if not guest.connected:
                self.simulation.join(guest, again=True)
        self.simulation.settle()


TestLender = LenderMachine.TestCase
TestLender.settings = settings(max_examples=40, stateful_step_count=40)
