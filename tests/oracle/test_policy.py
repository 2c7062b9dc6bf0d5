"""Unit tests of the eviction queues of the Python pool; not part of the contract."""

from __future__ import annotations

import random

from tests.oracle.policy import FIRST, MAIN, NOWHERE, PROBATION, SAME, TwoQueue


def queue_of_entries(count: int) -> TwoQueue:
    queue = TwoQueue()
    queue.reach(FIRST + count)
    return queue


def test_probation_gives_way_while_it_is_over_a_tenth() -> None:
    queue = queue_of_entries(100)
    for entry in range(FIRST, FIRST + 20):
        queue.insert(entry, PROBATION if entry < FIRST + 4 else MAIN, float(entry))
    order = []
    while (victim := queue.victim()) is not None:
        order.append(victim - FIRST)
        queue.remove(victim)
        queue.check()
    # Four of twenty are over a tenth, and so are two of eighteen; one of seventeen is not.
    assert order[:4] == [0, 1, 2, 4]
    assert sorted(order) == list(range(20))
    probation = [entry for entry in order if entry < 4]
    main = [entry for entry in order if entry >= 4]
    assert probation == sorted(probation)
    assert main == sorted(main)


def test_same_filled_entries_are_no_victims_and_count_for_no_share() -> None:
    queue = queue_of_entries(10)
    queue.insert(FIRST, SAME, 1.0)
    queue.insert(FIRST + 1, SAME, 2.0)
    assert queue.victim() is None
    assert queue.pages == 0
    assert queue.oldest_same() == FIRST
    queue.touch(FIRST)
    assert queue.oldest_same() == FIRST
    queue.check()


def test_a_touch_moves_to_main_and_keeps_the_put_time() -> None:
    queue = queue_of_entries(10)
    queue.insert(FIRST, PROBATION, 5.0)
    queue.insert(FIRST + 1, MAIN, 6.0)
    queue.touch(FIRST)
    assert queue.where[FIRST] == MAIN
    assert queue.stamp(FIRST) == 5.0
    assert queue.victim() == FIRST + 1
    queue.check()


def test_random_links_keep_the_lists_whole() -> None:
    rng, queue, inside = random.Random(5), queue_of_entries(200), set[int]()
    for step in range(3000):
        entry = FIRST + rng.randrange(200)
        if entry in inside:
            queue.remove(entry)
            inside.discard(entry)
            assert queue.where[entry] == NOWHERE
        else:
            queue.insert(entry, rng.randrange(3), float(step))
            inside.add(entry)
    queue.check()
    assert sum(queue.sizes) == len(inside)
