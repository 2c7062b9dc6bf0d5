"""The range lock: overlapping ranges wait in the order of their requests, others do not wait."""

from __future__ import annotations

import random

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tmemfs.hswap.rangelock import RangeLock


def test_a_free_range_is_held_without_a_checkpoint() -> None:
    lock = RangeLock()
    turns: list[str] = []

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hold)
            nursery.start_soon(other)

    async def hold() -> None:
        async with lock.hold(0, 5), lock.hold(6, 9):
            turns.append("held")
        turns.append("released")

    async def other() -> None:
        turns.append("other")

    trio.run(main)
    assert "".join(turns) in ("heldreleasedother", "otherheldreleased")
    assert not lock.ranges


def test_overlapping_ranges_are_held_in_the_order_of_their_requests() -> None:
    lock = RangeLock()
    order: list[int] = []

    async def hold(number: int, first: int, last: int) -> None:
        async with lock.hold(first, last):
            order.append(number)
            await trio.lowlevel.checkpoint()

    async def main() -> None:
        async with trio.open_nursery() as nursery, lock.hold(0, 9):
            for number, (first, last) in enumerate([(5, 5), (0, 9), (5, 5), (100, 101)]):
                nursery.start_soon(hold, number, first, last)
                await wait_all_tasks_blocked()
            assert order == [3], "the one without overlap"
            assert lock.try_hold(9) is None
            assert lock.try_hold(5) is None

    trio.run(main)
    assert order == [3, 0, 1, 2]
    held = lock.try_hold(5)
    assert held is not None
    held.release()
    assert not lock.ranges


def test_a_cancelled_waiter_does_not_block_others() -> None:
    lock = RangeLock()
    done: list[str] = []

    async def late() -> None:
        async with lock.hold(3, 3):
            done.append("late")

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            async with lock.hold(0, 3):
                with trio.move_on_after(0) as scope:
                    async with lock.hold(2, 7):
                        pytest.fail("the range was free")
                assert scope.cancelled_caught
                nursery.start_soon(late)
                await wait_all_tasks_blocked()
            await wait_all_tasks_blocked()
            assert done == ["late"]

    trio.run(main)
    assert not lock.ranges


def test_overlapping_ranges_are_never_held_at_once() -> None:
    lock = RangeLock()
    chance = random.Random(1)
    held: set[int] = set()

    async def work(first: int, last: int, turns: int) -> None:
        async with lock.hold(first, last):
            pages = set(range(first, last + 1))
            assert not held & pages
            held.update(pages)
            for _ in range(turns):
                await trio.lowlevel.checkpoint()
            held.difference_update(pages)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(500):
                first = chance.randrange(50)
                nursery.start_soon(work, first, first + chance.randrange(10), chance.randrange(4))

    trio.run(main)
    assert not lock.ranges
