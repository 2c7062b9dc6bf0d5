"""Slabs are in one state each, and runs and counts tell which."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tmem.lending.lender.slabmap import SlabMap, State
from tmem.lending.protocol.runs import slabs_of

TOTAL = 40
steps = st.lists(
    st.tuples(st.integers(0, TOTAL - 1), st.integers(1, TOTAL), st.sampled_from(State)).map(
        lambda step: (step[0], min(step[1], TOTAL - step[0]), step[2])
    ),
    max_size=30,
)


@given(steps, st.integers(1, TOTAL))
def test_a_map_is_a_list_of_states(steps: list[tuple[int, int, State]], most: int) -> None:
    slabmap, model = SlabMap(TOTAL), [State.FREE] * TOTAL
    for first, length, state in steps:
        slabmap.set([(first, length)], state)
        model[first : first + length] = [state] * length
        slabmap.check()
        free = [slab for slab, state in enumerate(model) if state == State.FREE]
        assert slabs_of(slabmap.lowest_free(most)) == free[:most]
    for state in State:
        where = [slab for slab, each in enumerate(model) if each == state]
        assert slabs_of(slabmap.runs(state)) == where
        assert slabmap.counts[state] == len(where)
        if state != State.FREE:
            assert slabmap.holds(slabmap.runs(state), state)
    split = slabmap.by_state([(0, TOTAL)])
    assert {state: slabs_of(runs) for state, runs in split.items()} == {
        state: slabs_of(slabmap.runs(state)) for state in State if slabmap.counts[state]
    }
    slabmap.check()


def test_the_longest_lent_goes_first() -> None:
    slabmap = SlabMap(100)
    slabmap.set([(0, 10)], State.EPHEMERAL)
    assert slabmap.next_ephemeral(4) == ((0, 4),)
    slabmap.set([(0, 4)], State.FREE)
    slabmap.set(slabmap.lowest_free(3), State.EPHEMERAL)
    assert slabs_of(slabmap.next_ephemeral(7)) == [0, 4, 5, 6, 7, 8, 9]
    assert slabs_of(slabmap.next_ephemeral(100)) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert slabmap.next_ephemeral(0) == ()


def test_a_slab_beyond_the_arena_is_an_error() -> None:
    with pytest.raises(IndexError):
        SlabMap(4).set([(3, 2)], State.EPHEMERAL)
    assert SlabMap(4).by_state([(3, 9)]) == {State.FREE: ((3, 1),)}
    assert SlabMap(4).by_state([(4, 1)]) == {}


def test_a_map_takes_memory_only_for_what_was_lent() -> None:
    slabmap = SlabMap(262_144)
    slabmap.set(slabmap.lowest_free(1000), State.PERSISTENT)
    assert slabmap.size == 1000
    assert slabmap.lowest_free(5) == ((1000, 5),)
    assert slabmap.runs(State.FREE) == ((1000, 261_144),)


def test_two_maps_are_combined_by_a_table() -> None:
    known, claimed = SlabMap(100), SlabMap(100)
    known.set([(0, 6), (8, 1)], State.EPHEMERAL)
    claimed.set([(4, 3)], State.PERSISTENT)
    table = bytearray(256)
    table[State.EPHEMERAL + 8 * State.PERSISTENT] = State.TAKEN
    table[State.FREE + 8 * State.PERSISTENT] = State.PERSISTENT
    known.load(known.combined(claimed, bytes(table)))
    known.check()
    assert (known.runs(State.TAKEN), known.runs(State.PERSISTENT)) == (((4, 2),), ((6, 1),))
    assert known.size == 7
    known.replace(State.TAKEN, State.FREE)
    known.check()
    assert known.lowest_free(100) == ((0, 6), (7, 93))


@pytest.mark.parametrize("most", range(6))
def test_the_first_slabs_of_a_state_keep_it(most: int) -> None:
    slabmap = SlabMap(20)
    slabmap.set([(1, 2), (5, 1), (9, 2)], State.EPHEMERAL)
    slabmap.set([(3, 1)], State.PERSISTENT)
    slabmap.load(slabmap.with_the_first(most, State.EPHEMERAL, State.TAKEN))
    slabmap.check()
    assert slabs_of(slabmap.runs(State.EPHEMERAL)) == [1, 2, 5, 9, 10][:most]
    assert slabs_of(slabmap.runs(State.TAKEN)) == [1, 2, 5, 9, 10][most:]


def test_slabs_that_were_always_free_take_no_memory() -> None:
    slabmap = SlabMap(1 << 24)
    slabmap.set([(3, 2)], State.EPHEMERAL)
    slabmap.set([(0, 3), (5, (1 << 24) - 5)], State.FREE)
    slabmap.check()
    assert slabmap.size == 5
    assert slabmap.counts[State.FREE] == (1 << 24) - 2
