"""Carries out the lender's actions on arenas in worker processes: in order for each guest, past one that hangs.

All guests share one worker as long as its calls return. If a call hangs, its guest is suspended until the call returns,
and from then on the guests of its user have a worker of their own, so a user can make a shared worker hang only once.
A user with MAX_HANGING hanging workers gets no more.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable
from functools import partial

import trio

from tmem.lending.daemon.arenas import Arenas
from tmem.lending.daemon.ratelimits import about_user
from tmem.lending.daemon.worker import Job, Operation, Result
from tmem.lending.daemon.workerqueue import Task, WorkerProcess, WorkerQueue
from tmem.lending.lender.actions import Close, CountPopulated, FindHoles, Populate, Punch
from tmem.lending.protocol.runs import count, split_for_messages

log = logging.getLogger(__name__)

ArenaAction = Populate | Punch | FindHoles | CountPopulated | Close

MAX_HANGING = 4  # workers of one user
CLOSE_SLABS = 4096  # 256 MiB: punched of an arena that is being closed before other guests have their turn


class Executor:
    """Passes actions to workers.

    `on_result` is called with the result of each action, `on_hang` when a guest's calls start to hang and when they
    return.
    """

    def __init__(
        self,
        arenas: Arenas,
        reserve: int,
        on_result: Callable[[ArenaAction, Result], None],
        on_hang: Callable[[int, bool], None],
    ) -> None:
        self._arenas = arenas
        self._reserve = reserve
        self._on_result = on_result
        self._on_hang = on_hang
        self._queues: dict[int | None, WorkerQueue] = {None: WorkerQueue(reserve, self._on_worker_hang)}  # by uid
        self._suspended: dict[int, deque[Task]] = {}  # tasks of guests whose calls hang
        self._hanging: dict[int, int] = {}  # guests with a hanging worker, and their uids
        self._counting: set[int] = set()  # guests with a CountPopulated that is not done
        self._closing: dict[int, list[Close]] = {}
        self._pending: Counter[int] = Counter()  # tasks that are not done, by guest
        self._shortage = ""  # why memory is short now; empty if it is not
        self._nursery: trio.Nursery | None = None

    async def run(self) -> None:
        """Carry out what is submitted, until cancelled."""
        async with trio.open_nursery() as self._nursery:
            for queue in self._queues.values():
                self._nursery.start_soon(queue.run)
            await trio.sleep_forever()

    def submit(self, action: ArenaAction) -> None:
        """Carry out an action after all earlier ones on the same guest."""
        guest, arena = action.guest, self._arenas.get(action.guest)
        if arena is None:  # a guest of an earlier tmemd that has not come back: there is no memfd
            self._on_result(action, Result(action.runs if isinstance(action, FindHoles) else ()))
        elif isinstance(action, Populate):
            self._put(guest, Job(Operation.POPULATE, action.runs), partial(self._on_populated, action))
        elif isinstance(action, Punch):
            for part, last in split_for_messages(action.runs):
                self._put(guest, Job(Operation.PUNCH, part), partial(self._on_result, action) if last else _ignore)
        elif isinstance(action, FindHoles):
            for part, _ in split_for_messages(action.runs):
                job = Job(Operation.FIND_HOLES, part, count(action.runs))
                self._put(guest, job, partial(self._on_result, FindHoles(guest, part)))
        elif isinstance(action, CountPopulated):
            if guest not in self._counting:
                self._counting.add(guest)
                self._put(guest, Job(Operation.COUNT_POPULATED), partial(self._on_counted, action))
        elif guest in self._closing:  # the guest was evicted, and then its process ended
            self._closing[guest].append(action)
        else:
            self._closing[guest] = [action]
            self._close_from(guest, 0, Result())

    def _put(self, guest: int, job: Job, done: Callable[[Result], None]) -> None:
        arena = self._arenas.get(guest)
        assert arena is not None
        self._pending[guest] += 1
        self._dispatch(Task(guest, arena.uid, arena.fd, job, partial(self._finish, guest, done)))

    def _finish(self, guest: int, done: Callable[[Result], None], result: Result) -> None:
        self._pending[guest] -= 1
        done(result)

    def _dispatch(self, task: Task) -> None:
        """Queue a task for the worker of its user, or suspend it."""
        if task.guest in self._suspended:
            self._suspended[task.guest].append(task)
        elif self._must_wait(task.guest, task.uid):
            self._suspended[task.guest] = deque([task])
            self._on_hang(task.guest, True)
        else:
            self._queues.get(task.uid, self._queues[None]).submit(task)

    def _must_wait(self, guest: int, uid: int) -> bool:
        """Return whether a worker hangs for this guest, or too many for its user."""
        return guest in self._hanging or list(self._hanging.values()).count(uid) >= MAX_HANGING

    def _on_worker_hang(self, worker: WorkerProcess, tasks: list[Task]) -> None:
        """Suspend the guest of the first task, give its user an own worker, and dispatch all tasks again."""
        guest, uid = tasks[0].guest, tasks[0].uid
        log.warning(
            "guest %d (uid %d): a call on its arena hangs; suspended until it returns",
            guest,
            uid,
            extra=about_user(uid),
        )
        assert self._nursery is not None
        if uid not in self._queues:
            self._queues[uid] = WorkerQueue(self._reserve, self._on_worker_hang)
            self._nursery.start_soon(self._queues[uid].run)
        self._hanging[guest] = uid
        self._nursery.start_soon(self._resume_after_hang, worker, guest, uid)
        for task in tasks:
            self._dispatch(task)

    async def _resume_after_hang(self, worker: WorkerProcess, guest: int, uid: int) -> None:
        """Wait until the hanging call has returned, then repeat it: the result was lost with the killed worker."""
        await worker.wait_ended()
        del self._hanging[guest]
        log.info("guest %d: the call on its arena has returned", guest, extra=about_user(uid))
        for suspended in [*self._suspended]:
            if self._suspended[suspended][0].uid == uid and not self._must_wait(suspended, uid):
                self._on_hang(suspended, False)
                for task in self._suspended.pop(suspended):
                    self._dispatch(task)

    def _on_populated(self, action: Populate, result: Result) -> None:
        if result.shortage and not self._shortage:
            log.warning("slabs are not lent: %s", result.shortage)
        self._shortage = result.shortage
        self._on_result(action, result)

    def _on_counted(self, action: CountPopulated, result: Result) -> None:
        self._counting.discard(action.guest)
        self._on_result(action, result)

    def _close_from(self, guest: int, start: int, _: Result) -> None:
        """Punch the arena of an ended guest from a slab on, step by step, then close it.

        Closing alone does not free the memory if a child of the guest's process has inherited the memfd.
        """
        arena = self._arenas.get(guest)
        assert arena is not None
        if start < arena.slabs:
            step = min(CLOSE_SLABS, arena.slabs - start)
            job = Job(Operation.PUNCH, ((start, step),))
            self._put(guest, job, partial(self._close_from, guest, start + step))
        elif self._pending[guest]:  # the result of an earlier action led to another one
            self._put(guest, Job(Operation.PUNCH), partial(self._close_from, guest, start))
        else:
            del self._pending[guest]
            self._arenas.release(guest)
            for action in self._closing.pop(guest):
                self._on_result(action, Result())


def _ignore(_: Result) -> None:
    """Ignore the results of all parts of a Punch but the last."""
