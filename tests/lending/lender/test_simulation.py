"""Simulated guests around the real lender: how memory is divided, and how fast it moves."""

from __future__ import annotations

import gzip
import math
import random
from pathlib import Path

import pytest

from bench import division
from bench.models import splits
from bench.models.lent import Borrowing, LentMemory
from bench.models.reclaimpolicies import COMPARED
from bench.models.slotpool import PAGES_A_SLAB, SlotPool, Stream, stream
from tests.lending.lender.simulation import Guest, Simulation
from tmem.lending.lender.lender import Lender
from tmem.lending.lender.reclaimpolicy import AgeUtility, ReclaimPolicy
from tmem.lending.protocol import messages as m

SLAB_MB = 65536 / 1e6
ANSWER = 0.005  # seconds that a guest takes to answer a Revoke
MESSAGE = 0.0005  # seconds until a message is read


def zipf(name: str, pages: int, requests: int, seed: int) -> Stream:
    chance = random.Random(seed)
    return stream(name, [int(pages * chance.random() ** 3) for _ in range(requests)], 0.02)


def scan(name: str, pages: int) -> Stream:
    return stream(name, range(pages), 0.02)


def lend(guests: list[Stream], slabs: int, policy: type[ReclaimPolicy] = AgeUtility) -> LentMemory:
    memory = LentMemory(guests, slabs, policy)
    for guest, place in splits.schedule(guests):
        one = guests[guest]
        memory.pass_to((one.at[place] + 0.5) / one.requests * 60.0)
        memory.request(guest, one.misses[place], one.evicted[place])
    memory.lender.check()
    return memory


def test_a_stream_is_the_misses_of_an_lru_cache() -> None:
    one = stream("x", [7, 8, 7, 9, 8, 7], 0.7)  # two pages: 7 8 | 9 evicts 8 | 8 evicts 7 | 7 evicts 9
    assert (one.footprint, one.requests, one.cache) == (3, 6, 2)
    assert list(zip(one.misses, one.evicted, one.at, strict=True)) == [
        (0, -1, 0),
        (1, -1, 1),
        (2, 1, 3),
        (1, 0, 4),
        (0, 2, 5),
    ]


def test_all_guests_take_equally_long() -> None:
    guests = [scan("long", 90), scan("short", 9)]
    order = splits.schedule(guests)
    assert sorted(order) == [(guest, place) for guest, one in enumerate(guests) for place in range(one.requests)]
    assert [guest for guest, _ in order[:11]].count(1) == 1


def test_one_common_pool_counts_as_it_would_for_one_guest() -> None:
    one = zipf("zipf", 800, 8000, 1)
    order = splits.schedule([one])
    assert splits.common([one], order, 10) == splits.alone(one, 10)
    assert splits.alone(one, 100) == splits.common_fifo([one], order, 100) == one.footprint
    assert splits.alone(one, 0) == len(one.misses)


def test_hindsight_gives_memory_to_the_guest_it_helps() -> None:
    guests = [zipf("zipf", 800, 8000, 1), scan("scan", 4000)]
    curves = [{slabs: splits.alone(one, slabs) for slabs in splits.grid(one, 40)} for one in guests]
    split = splits.best_split(curves, 40)
    assert sum(split) <= 40
    assert split[0] > 35


@pytest.mark.parametrize("policy", COMPARED.values())
def test_lent_memory_never_exceeds_the_size(policy: type[ReclaimPolicy]) -> None:
    guests = [zipf("one", 600, 3000, 1), zipf("two", 900, 3000, 2), scan("scan", 1500)]
    memory = lend(guests, 40, policy)
    assert 0 < sum(len(guest.slabs) for guest in memory.guests) <= 40
    for guest in memory.guests:
        assert guest.pool.pages <= len(guest.slabs) * PAGES_A_SLAB
        guest.pool.check()


def test_the_default_is_within_10_percent_of_the_best_fixed_parts() -> None:
    guests = [zipf("small", 300, 8000, 1), zipf("large", 1200, 8000, 2), scan("scan", 3000)]
    slabs = 60
    misses = sum(guest.pool.misses for guest in lend(guests, slabs).guests)
    curves = [{size: splits.alone(one, size) for size in splits.grid(one, slabs)} for one in guests]
    best = sum(splits.alone(one, part) for one, part in zip(guests, splits.best_split(curves, slabs), strict=True))
    equal = sum(splits.alone(one, slabs // 3) for one in guests)
    assert misses <= 1.1 * best
    assert misses < equal


def test_a_floor_keeps_the_hits_its_guest_would_have_alone() -> None:
    guests = [zipf("small", 300, 6000, 1), zipf("large", 2400, 20_000, 2)]
    memory = LentMemory(guests, 40, AgeUtility, [15, 0])
    for guest, place in splits.schedule(guests):
        one = guests[guest]
        memory.pass_to((one.at[place] + 0.5) / one.requests * 60.0)
        memory.request(guest, one.misses[place], one.evicted[place])
    assert memory.guests[0].pool.misses <= 1.01 * splits.alone(guests[0], 15)


def test_the_measure_counts_every_way_to_divide(tmp_path: Path) -> None:
    for name, pages in (("one", 400), ("two", 900)):
        chance = random.Random(name)
        lines = "".join(f"{int(pages * chance.random() ** 2)}\n" for _ in range(2500))
        with gzip.open(tmp_path / f"{name}.trace.gz", "wt") as file:
            file.write(lines)
    outcome = division.measure(tmp_path)
    assert outcome.figures["guests"] == ["one", "two"]
    for size in outcome.figures["sizes"]:
        assert set(size["misses"]) >= {f"lent, {name}" for name in COMPARED}
        assert size["change_percent"]["best fixed parts"] == 0.0
    assert all(goal.verdict in ("met", "missed") for goal in outcome.goals)
    assert all(goal.verdict == "reported" for goal in division.measure(None).goals)


# Guests that lie.


class Liar:
    """A guest of another user that wants all there is: what it says of itself is as good as it can be."""

    def __init__(self, memory: LentMemory, hits: int, age: float | None) -> None:
        self._memory, self._age, self._hits = memory, age, hits
        self._said = 0
        number, _ = memory.lender.join(0.0, m.Hello(m.VERSION, b"a liar's token..", "/liar", 1 << 16, 0), 666, 1)
        self.guest = Borrowing(number, SlotPool(1, 0, 0), max_batch=1)
        memory.guests.append(self.guest)
        memory._ticks.append(math.inf)  # it reports by itself

    def speak(self) -> None:
        """Report, and ask for as much as one may."""
        self._said += 1
        if self._hits:
            told = self._hits * self._said
            self._memory._say(self.guest, m.Report(self._age, told, told, told, told, told, told))
        self._memory._say(self.guest, m.Ask(self._said, m.MAX_ASK, False, self._age))


@pytest.mark.parametrize(
    ("hits", "age"),
    [(10**9, 0.0), (10**9, None), (0, None), (0, 0.0)],
    ids=["hits", "hits and no age", "no word", "asks alone"],
)
def test_a_lying_user_leaves_honest_guests_the_hits_of_half_the_memory(hits: int, age: float | None) -> None:
    guests, slabs = [zipf("one", 600, 3000, 1), zipf("two", 900, 3000, 2)], 60
    half = sum(guest.pool.misses for guest in lend(guests, slabs // 2).guests)
    memory = LentMemory(guests, slabs, AgeUtility)
    liar = Liar(memory, hits, age)
    next_lie = 0.0
    for guest, place in splits.schedule(guests):
        one = guests[guest]
        now = (one.at[place] + 0.5) / one.requests * 60.0
        memory.pass_to(now)
        if now >= next_lie:
            liar.speak()
            next_lie = now + m.RETRY
        memory.request(guest, one.misses[place], one.evicted[place])
    memory.lender.check()
    honest = memory.guests[:2]
    assert sum(len(guest.slabs) for guest in honest) >= 0.9 * slabs // 2
    assert sum(guest.pool.misses for guest in honest) <= 1.05 * half


# How fast memory moves, in simulated time.


def lent_over_time(stopped: bool, guests: int = 16, size: int = 16_384) -> list[tuple[float, int]]:
    """Lend everything to guests that idle, then let another begin to miss; give (seconds, slabs) of its lends."""
    here = Simulation(Lender(size))
    owners = []
    for number in range(guests):
        owner = Guest(number.to_bytes(16, "big"), size)
        owners.append(owner)
        here.join(owner)
        while len(owner.ephemeral) < size // guests:
            owner.ask(64)
            here.settle()
        for _ in range(2):
            owner.say(m.Report(1.0, 1, 1, 1, 1, 1, 1))
            here.hear(owner)
            here.pass_time(0.9)
    for owner in owners:
        owner.stopped = stopped
    asker = Guest(bytes([255] * 16), size)
    here.join(asker)
    here.settle()
    began, found = here.now, []
    while len(asker.ephemeral) < size // 2:
        asker.ask(64)
        while asker.asks:
            here.now += MESSAGE
            here.hear(asker)
            here.work()
            answering = [owner for owner in owners if owner.inbox and not owner.stopped]
            if answering:
                here.now += ANSWER
                for owner in answering:
                    owner.read()
                    here.hear(owner)
            elif not any(isinstance(message, m.Lend | m.Deny) for message in asker.inbox):
                deadline = here.lender.deadline()
                assert deadline is not None, "an Ask that nothing will answer"
                here.pass_time(max(0.0, deadline - here.now))
            here.work()
            asker.read()
            found.append((here.now - began, len(asker.ephemeral)))
    here.check()
    return found


@pytest.mark.parametrize("stopped", [False, True], ids=["guests that answer", "guests that are stopped"])
def test_a_missing_guest_is_lent_memory_in_50_ms_then_200_mb_a_second(stopped: bool) -> None:
    lends = lent_over_time(stopped)
    first = next(seconds for seconds, slabs in lends if slabs)
    assert first < 0.050
    seconds, slabs = lends[-1]
    assert slabs * SLAB_MB / (seconds - first) > 200.0
