"""Has decisions carried out by worker processes: in order for each guest, and nobody waits for one that hangs.

All guests share one worker, as long as their calls return. When one does not, its guest is set aside until it does, and
from then on the guests of its user have a worker of their own: whoever makes a worker hang does so once for others. A
user of whom several workers hang gets no more of them.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable
from functools import partial

import trio

from tmem.lending.daemon.arenas import Arenas
from tmem.lending.daemon.jobs import Job, Kind, Result
from tmem.lending.daemon.lane import Lane, Task, WorkerProcess
from tmem.lending.daemon.loglines import about
from tmem.lending.lender.actions import Close, CountPopulated, FindHoles, Populate, Punch
from tmem.lending.protocol.runs import count, split_for_messages

log = logging.getLogger(__name__)

Work = Populate | Punch | FindHoles | CountPopulated | Close

MAX_HANGING = 4  # workers of one user
CLOSE_SLABS = 4096  # 256 MiB: what is freed of a guest that ended before others are served


class Executor:
    """Hands decisions to workers. `done` is told what came of each, `hangs` when a guest's calls stop and return."""

    def __init__(
        self, arenas: Arenas, reserve: int, done: Callable[[Work, Result], None], hangs: Callable[[int, bool], None]
    ) -> None:
        self._arenas = arenas
        self._reserve = reserve
        self._done = done
        self._hangs = hangs
        self._lanes: dict[int | None, Lane] = {None: Lane(reserve, self._hung)}
        self._aside: dict[int, deque[Task]] = {}  # tasks of guests whose calls do not return
        self._hanging: dict[int, int] = {}  # guests for which a worker hangs, and their users
        self._counting: set[int] = set()
        self._closing: dict[int, list[Close]] = {}
        self._pending: Counter[int] = Counter()  # tasks that are not done, by guest
        self._shortage = ""  # why memory is short now, empty while it is not
        self._nursery: trio.Nursery | None = None

    async def run(self) -> None:
        """Carry out what is submitted, until cancelled."""
        async with trio.open_nursery() as self._nursery:
            for lane in self._lanes.values():
                self._nursery.start_soon(lane.run)
            await trio.sleep_forever()

    def submit(self, work: Work) -> None:
        """Have a decision carried out, after all earlier ones on the same guest."""
        guest, arena = work.guest, self._arenas.get(work.guest)
        if arena is None:  # a guest of the tmemd before that did not come yet: there is nothing that could be done
            self._done(work, Result(work.runs if isinstance(work, FindHoles) else ()))
        elif isinstance(work, Populate):
            self._put(guest, Job(Kind.MAKE_REAL, work.runs), partial(self._made, work))
        elif isinstance(work, Punch):
            for part, last in split_for_messages(work.runs):
                self._put(guest, Job(Kind.PUNCH, part), partial(self._done, work) if last else _nothing)
        elif isinstance(work, FindHoles):
            for part, _ in split_for_messages(work.runs):
                part_of = FindHoles(guest, part)
                self._put(guest, Job(Kind.FIND_HOLES, part, count(work.runs)), partial(self._done, part_of))
        elif isinstance(work, CountPopulated):
            if guest not in self._counting:
                self._counting.add(guest)
                self._put(guest, Job(Kind.COUNT_REAL), partial(self._counted, work))
        elif guest in self._closing:  # it was evicted, and now it has ended
            self._closing[guest].append(work)
        else:
            self._closing[guest] = [work]
            self._close(guest, 0, Result())

    def _put(self, guest: int, job: Job, done: Callable[[Result], None]) -> None:
        arena = self._arenas.get(guest)
        assert arena is not None
        self._pending[guest] += 1
        self._submit(Task(guest, arena.uid, arena.fd, job, partial(self._finish, guest, done)))

    def _finish(self, guest: int, done: Callable[[Result], None], result: Result) -> None:
        self._pending[guest] -= 1
        done(result)

    def _submit(self, task: Task) -> None:
        """Give a task to the worker that it is for, or set it aside."""
        if task.guest in self._aside:
            self._aside[task.guest].append(task)
        elif self._waits(task.guest, task.uid):
            self._aside[task.guest] = deque([task])
            self._hangs(task.guest, True)
        else:
            self._lanes.get(task.uid, self._lanes[None]).submit(task)

    def _waits(self, guest: int, uid: int) -> bool:
        """Tell whether a guest has to wait for a worker that hangs."""
        return guest in self._hanging or list(self._hanging.values()).count(uid) >= MAX_HANGING

    def _hung(self, worker: WorkerProcess, tasks: list[Task]) -> None:
        """Set a guest aside whose call does not return, and its user apart; give all other tasks to other workers."""
        guest, uid = tasks[0].guest, tasks[0].uid
        words = "guest %d (uid %d): a call on its arena does not return; it waits alone"
        log.warning(words, guest, uid, extra=about(uid))
        assert self._nursery is not None
        if uid not in self._lanes:
            self._lanes[uid] = Lane(self._reserve, self._hung)
            self._nursery.start_soon(self._lanes[uid].run)
        self._hanging[guest] = uid
        self._nursery.start_soon(self._go_on, worker, guest, uid)
        for task in tasks:
            self._submit(task)

    async def _go_on(self, worker: WorkerProcess, guest: int, uid: int) -> None:
        """Wait until a call has returned, and make it anew: the worker that made it is gone."""
        await worker.end()
        del self._hanging[guest]
        log.info("guest %d: the call on its arena has returned", guest, extra=about(uid))
        for waiting in [*self._aside]:
            if self._aside[waiting][0].uid == uid and not self._waits(waiting, uid):
                self._hangs(waiting, False)
                for task in self._aside.pop(waiting):
                    self._submit(task)

    def _made(self, work: Populate, result: Result) -> None:
        if result.shortage and not self._shortage:
            log.warning("slabs are not lent: %s", result.shortage)
        self._shortage = result.shortage
        self._done(work, result)

    def _counted(self, work: CountPopulated, result: Result) -> None:
        self._counting.discard(work.guest)
        self._done(work, result)

    def _close(self, guest: int, start: int, _: Result) -> None:
        """Free the arena of a guest that ended from a slab on, step by step, and close it.

        Closing alone frees nothing as long as a child of the dead guest still has the memfd.
        """
        arena = self._arenas.get(guest)
        assert arena is not None
        if start < arena.slabs:
            step = min(CLOSE_SLABS, arena.slabs - start)
            job = Job(Kind.PUNCH, ((start, step),))
            self._put(guest, job, partial(self._close, guest, start + step))
        elif self._pending[guest]:  # what came of an earlier decision made another one
            self._put(guest, Job(Kind.PUNCH), partial(self._close, guest, start))
        else:
            del self._pending[guest]
            self._arenas.release(guest)
            for work in self._closing.pop(guest):
                self._done(work, Result())


def _nothing(_: Result) -> None:
    """Ignore what came of all parts of a Punch but the last."""
