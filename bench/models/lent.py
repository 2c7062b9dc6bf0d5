"""Simulate guests that borrow from the real lender, message by message, in simulated time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from bench.models.slotpool import PAGES_A_SLAB, SlotPool, Stream
from tmem.lending.lender.actions import Action, Populate, Punch, Send
from tmem.lending.lender.lender import Lender
from tmem.lending.lender.reclaimpolicy import ReclaimPolicy
from tmem.lending.protocol.messages import RETRY, VERSION, Ask, Deny, FromGuest, Hello, Lend, Report, Return, Revoke
from tmem.lending.protocol.runs import Runs, slabs_of

TICK = 0.9  # seconds between the reports of a guest
MAX_RETRY = 1.6  # seconds between the Asks of a guest that is denied repeatedly


@dataclass(slots=True)
class Borrowing:
    """A guest whose pool uses lent slabs. It asks when the pool is full, as tmem.lending.guest.borrower does."""

    number: int
    pool: SlotPool
    max_batch: int  # slabs in one Ask
    slabs: list[int] = field(default_factory=list)
    not_before: float = 0.0
    retry: float = 0.0
    batch: int = 1
    reported: Sequence[int] = ()
    quiet: bool = False

    def lend(self, runs: Runs) -> None:
        """Add lent slabs to the pool."""
        self.slabs.extend(slabs_of(runs))
        self.pool.resize(len(self.slabs) * PAGES_A_SLAB)

    def give(self, slabs: int) -> Runs:
        """Remove slabs from the pool, evict what no longer fits, and return them."""
        given = sorted(self.slabs[max(0, len(self.slabs) - slabs) :])
        del self.slabs[len(self.slabs) - len(given) :]
        self.pool.resize(len(self.slabs) * PAGES_A_SLAB)
        return tuple((slab, 1) for slab in given)

    def report(self, now: float) -> FromGuest | None:
        """Return a Report if a counter moved since the last one, and once more after that; else None."""
        pool = self.pool
        counters = (pool.pages, 0, pool.puts, pool.hits, pool.misses, pool.ghost_hits)
        moved = counters != self.reported
        if not moved and self.quiet:
            return None
        self.quiet = not moved
        self.reported = counters
        return Report(pool.age(now), *counters)


class LentMemory:
    """The guests of some streams and their lender. Messages and populating take no time."""

    def __init__(
        self,
        streams: Sequence[Stream],
        slabs: int,
        policy: type[ReclaimPolicy],
        floors: Sequence[int] = (),
        *,
        user_each: bool = False,
    ) -> None:
        # `user_each`: each guest is of another user, else all are root's.
        self.lender = Lender(slabs, policy=policy)
        self.now = 0.0
        self.streams = streams
        self.guests = [
            self._join(place, one, slabs, place + 1 if user_each else 0) for place, one in enumerate(streams)
        ]
        self._serial = 0
        self._queue: deque[Action] = deque()
        for guest, floor in zip(self.guests, floors, strict=False):
            self._perform(self.lender.set_limits(0.0, guest.number, floor=floor))
        self._ticks = [TICK * (place + 1) / len(streams) for place in range(len(streams))]

    def _join(self, place: int, one: Stream, slabs: int, uid: int) -> Borrowing:
        hello = Hello(VERSION, place.to_bytes(16, "big"), one.name, slabs, 0)
        number, _ = self.lender.join(0.0, hello, uid, 0)
        # An Ask is the same share of the memory as a few MiB are of a few GiB.
        return Borrowing(number, SlotPool(one.footprint, 0, place), max_batch=max(1, slabs // 256))

    def request(self, place: int, page: int, evicted: int) -> None:
        """Replay one miss of a guest's cache: get `page` from its pool, put `evicted` there if it is not -1."""
        guest = self.guests[place]
        pool = guest.pool
        pool.get(page)
        if evicted < 0:
            return
        if pool.full and self.now >= guest.not_before:
            self._ask(guest)
        pool.put(evicted, self.now)

    def pass_to(self, now: float) -> None:
        """Advance the clock; guests report."""
        self.now = now
        for place, guest in enumerate(self.guests):
            if self._ticks[place] <= now:
                self._ticks[place] += TICK * max(1, (now - self._ticks[place]) // TICK)
                report = guest.report(now)
                if report is not None:
                    self._say(guest, report)

    def _ask(self, guest: Borrowing) -> None:
        self._serial += 1
        self._say(guest, Ask(self._serial, guest.batch, False, guest.pool.age(self.now)))

    def _say(self, guest: Borrowing, message: FromGuest) -> None:
        self._perform(self.lender.on_message(self.now, guest.number, message))

    def _perform(self, actions: Iterable[Action]) -> None:
        queue = self._queue
        queue.extend(actions)
        while queue:
            action = queue.popleft()
            if isinstance(action, Populate):
                queue.extend(self.lender.on_populated(self.now, action.guest, action.batch, action.runs))
            elif isinstance(action, Punch) and action.freed:
                queue.extend(self.lender.on_punched(self.now, action.guest, action.freed))
            elif isinstance(action, Send):
                self._act(self.guests[action.guest - 1], action.message)

    def _act(self, guest: Borrowing, message: object) -> None:
        """Handle a message as a guest does."""
        if isinstance(message, Lend):
            guest.lend(message.runs)
            guest.batch = min(2 * guest.batch, guest.max_batch)
            guest.retry = RETRY
        elif isinstance(message, Deny):
            guest.batch = 1
            guest.not_before = self.now + guest.retry
            guest.retry = min(2 * guest.retry, MAX_RETRY)
        elif isinstance(message, Revoke):
            runs = guest.give(message.slabs)
            answer = Return(runs, False, message.serial, True, guest.pool.age(self.now))
            self._queue.extend(self.lender.on_message(self.now, guest.number, answer))
