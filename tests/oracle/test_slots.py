"""Unit tests of the slots and slabs of the Python pool; not part of the contract."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from tests.oracle.slots import RAW_CLASS, SLOT_COUNTS, SLOT_SIZES, SlotSpace, class_of
from tmem import SLAB_SIZE


@pytest.mark.parametrize("length", [1, 63, 64, 65, 2048, 3071, 3072, 4096])
def test_a_class_is_the_smallest_that_holds_the_length(length: int) -> None:
    size_class = class_of(length)
    assert SLOT_SIZES[size_class] >= length
    assert size_class == 0 or SLOT_SIZES[size_class - 1] < length


def test_slots_of_a_slab_do_not_overlap_and_an_emptied_slab_is_a_spare() -> None:
    space = SlotSpace(persistent=False)
    space.spares.append(3)
    size_class = class_of(2000)
    offsets = [space.take_spare(size_class, 10)]
    while (offset := space.take(size_class, 11)) >= 0:
        offsets.append(offset)
    space.check()
    assert len(offsets) == SLOT_COUNTS[size_class]
    assert min(offsets) == 3 * SLAB_SIZE
    assert max(offsets) + 2048 <= 4 * SLAB_SIZE
    assert all(second - first >= 2000 for first, second in pairwise(sorted(offsets)))
    for offset in offsets:
        assert not space.spares
        space.drop(offset)
        space.check()
    assert space.spares == [3]
    assert space.held == 1


def test_a_larger_class_serves_up_to_the_bound() -> None:
    space = SlotSpace(persistent=False)
    space.spares.append(0)
    assert space.take_spare(class_of(1024), 10) == 0
    assert space.take_larger(class_of(960), 11, 1000) == -1
    assert space.take_larger(class_of(960), 11, 1024) >= 0
    assert space.take_larger(RAW_CLASS, 12, 4096) == -1


def test_random_takes_and_drops_keep_the_lists_whole() -> None:
    rng, space, taken = random.Random(6), SlotSpace(persistent=True), list[int]()
    space.spares.extend(range(30))
    for step in range(4000):
        size_class = rng.choice((0, 20, 33, RAW_CLASS))
        if rng.random() < 0.55 and space.spares:
            offset = space.take(size_class, step)
            taken.append(offset if offset >= 0 else space.take_spare(size_class, step))
        elif taken:
            space.drop(taken.pop(rng.randrange(len(taken))))
        if step % 100 == 0:
            space.check()
            if (slab := space.emptiest()) is not None:
                assert 0 < len(slab.free) < len(slab.entries)
    space.check()
    assert space.held == 30
