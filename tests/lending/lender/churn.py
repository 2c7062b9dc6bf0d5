"""Guests that come, go, ask, return, report and fall silent at random, in a simulated simulation."""

from __future__ import annotations

import random

from tests.lending.lender.simulation import Guest, Simulation
from tmem.lending.lender.actions import Refusal
from tmem.lending.lender.ledger import UserBounds
from tmem.lending.lender.lender import Lender
from tmem.lending.lender.reclaimpolicy import AgeUtility, ReclaimPolicy
from tmem.lending.protocol import messages as m
from tmem.lending.protocol.kind import Kind


class Churn:
    """One seeded history: `step` does one random thing."""

    def __init__(self, seed: int, guests: int, size: int, policy: type[ReclaimPolicy] = AgeUtility) -> None:
        self.chance = random.Random(seed)
        self.simulation = Simulation(Lender(size, policy=policy, bounds=UserBounds(cap=size // 2)))
        self.most = guests
        self.size = size
        self.everybody: list[Guest] = []

    def run(self, steps: int, check_every: int) -> Simulation:
        """Do so many things, then let all processes run on and the simulation come to rest."""
        for step in range(steps):
            self.step()
            if step % check_every == 0:
                self.simulation.check()
        for guest in self.everybody:
            guest.stopped = guest.refuses = False
        self.simulation.short = None
        for guest in self.everybody:
            if not guest.connected and guest.number in self.simulation.guests:
                self.simulation.join(guest, again=True)
        self.simulation.settle()
        return self.simulation

    def step(self) -> None:
        """Do one thing."""
        simulation, chance = self.simulation, self.chance
        simulation.pass_time(chance.choice((0.0, 0.001, 0.01)))
        simulation.work(chance.choice((0, 1, 5, 100)))
        if len(self.everybody) < self.most and chance.random() < 0.5:
            self.come()
        if not self.everybody:
            return
        guest = chance.choice(self.everybody)
        guest.read(chance.choice((1, 3, 100)))
        if guest.connected:
            simulation.hear(guest)
            deeds = (self.ask, self.ask, self.ask, self.give, self.report, self.report, self.trouble, self.verb)
            chance.choice(deeds)(guest)
            if chance.random() < 0.5:
                simulation.hear(guest)
        elif chance.random() < 0.5:
            simulation.join(guest, again=True)

    def come(self) -> None:
        """Add a guest that joins."""
        guest = Guest(self.chance.randbytes(16), self.chance.choice((8, 64, 500)), self.chance.choice((0, 1, 2, 3)))
        try:
            self.simulation.join(guest, self.chance.choice((0, 0, 4, 40, None)))
        except Refusal:
            return
        self.everybody.append(guest)

    def ask(self, guest: Guest) -> None:
        """Send an Ask of a guest."""
        age = self.chance.choice((None, self.chance.expovariate(0.1)))
        guest.ask(self.chance.choice((1, 5, 16, 64, 150)), self.chance.random() < 0.2, age)

    def give(self, guest: Guest) -> None:
        """Send a Return of a guest."""
        guest.give(self.chance.randint(1, 20), self.chance.random() < 0.3)

    def report(self, guest: Guest) -> None:
        """Send a Report of a guest."""
        age = self.chance.choice((None, self.chance.expovariate(0.1))) if not guest.ephemeral else 1.0
        counts = [self.chance.randrange(1000) for _ in range(6)]
        guest.say(m.Report(age, *counts))

    def trouble(self, guest: Guest) -> None:
        """Stop a guest, let it go on, cut its connection, kill it, or make memory short."""
        what = self.chance.randrange(8)
        if what < 2:
            guest.stopped = True
        elif what < 4:
            guest.stopped = guest.refuses = False
        elif what == 4:
            guest.refuses = True
        elif what == 5:
            self.simulation.hang_up(guest)
        elif what == 6:
            self.everybody.remove(guest)
            self.simulation.kill(guest)
        else:
            self.simulation.short = self.chance.choice((None, None, 0, 10))

    def verb(self, guest: Guest) -> None:
        """Use one of tmemctl's verbs."""
        lender, now, chance = self.simulation.lender, self.simulation.now, self.chance
        try:
            match chance.randrange(12):
                case 0:
                    actions = lender.freeze(now, guest.number)
                case 1:
                    actions = lender.drain(now, guest.number)
                case 2:
                    actions = lender.revoke(now, guest.number, chance.randint(1, 30), Kind(chance.random() < 0.3))
                case 3:
                    self.simulation.check()  # as long as the size is not smaller than what is booked
                    _, actions = lender.resize(now, chance.randint(self.size // 2, self.size * 2))
                case 4 | 5:
                    actions = lender.set_limits(
                        *(now, guest.number),
                        weight=chance.choice((None, 0.5, 3.0)),
                        cap=chance.choice((None, chance.randint(0, guest.slabs))),
                        floor=chance.choice((None, 0, chance.randint(0, 10))),
                        persistent_cap=chance.choice((None, chance.randint(0, 20))),
                    )
                case 6:
                    actions = [one for one in lender.audit() if one.guest == guest.number]
                case _:
                    actions = lender.thaw(now, None)
        except Refusal:
            return
        self.simulation.perform(actions)
