"""Slabs on loan are in one place each: in stock, out, or on their way back."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tmem import SLAB_SIZE
from tmem.lending.guest.borrowedarena import BorrowedArena
from tmem.lending.protocol.kind import Kind
from tmem.lending.protocol.runs import runs_of, slabs_of

Make = Callable[..., BorrowedArena]


@pytest.fixture
def make() -> Iterator[Make]:
    """Return a factory of arenas; each is checked and closed at the end."""
    made: list[BorrowedArena] = []

    def make_one(slabs: int, on_want: Callable[[], None] = lambda: None) -> BorrowedArena:
        made.append(BorrowedArena(slabs, on_want))
        return made[-1]

    yield make_one
    for source in made:
        source.check()
        source.close()
        source.close()
        assert source.fd == -1


def test_nothing_is_given_that_was_not_lent(make: Make) -> None:
    wanted: list[bool] = []
    source: BorrowedArena = make(8, lambda: wanted.append(source.wanted[Kind.EPHEMERAL]))
    assert source.capacity == SLAB_SIZE
    assert source.acquire(False) is None
    assert source.acquire(False) is None
    assert wanted == [True], "it is called once, not at every put"
    source.lend(((2, 2),), Kind.EPHEMERAL)
    assert source.acquire(True) is None
    assert {source.acquire(False), source.acquire(False)} == {2, 3}
    assert source.acquire(False) is None
    assert source.capacity == 2 * SLAB_SIZE


def test_a_low_stock_wants_more_before_it_is_empty(make: Make) -> None:
    source = make(8)
    source.lend(((0, 4),), Kind.EPHEMERAL)
    source.reserve[Kind.EPHEMERAL] = 2
    assert source.acquire(False) is not None
    assert not source.wanted[Kind.EPHEMERAL]
    source.acquire(False)
    assert not source.wanted[Kind.EPHEMERAL]
    source.acquire(False)
    assert source.wanted[Kind.EPHEMERAL]


def test_a_slab_is_released_as_the_kind_that_it_was_given_as(make: Make) -> None:
    source = make(4)
    source.lend(((0, 1),), Kind.PERSISTENT)
    assert source.acquire(True) == 0
    with pytest.raises(ValueError, match="ephemeral"):
        source.release(0, False)
    source.release(0, True)
    assert source.held(Kind.PERSISTENT) == 0
    assert source.pop_returning(Kind.PERSISTENT) == ((0, 1),)
    assert source.pop_returning(Kind.PERSISTENT) == ()


def test_what_a_lender_cannot_mean_is_refused(make: Make) -> None:
    source = make(4)
    source.lend(((0, 2),), Kind.EPHEMERAL)
    source.acquire(False)
    for runs in (((0, 1),), ((1, 1),), ((3, 2),), ((9, 1),)):
        with pytest.raises(ValueError, match="slab"):
            source.lend(runs, Kind.EPHEMERAL)
    source.lend(((2, 1),), Kind.PERSISTENT)
    with pytest.raises(ValueError, match="persistent"):
        source.take(((2, 1),))
    assert source.held(Kind.EPHEMERAL) == 2


def test_a_taken_slab_is_gone_wherever_it_was(make: Make) -> None:
    source = make(8)
    source.lend(((0, 3),), Kind.EPHEMERAL)
    out, back = source.acquire(False), source.acquire(False)
    assert out is not None
    assert back is not None
    source.release(back, False)
    assert source.take(((0, 3),)) == [out]
    assert source.pop_returning(Kind.EPHEMERAL) == ()
    assert source.held(Kind.EPHEMERAL) == source.stocked == 0
    assert source.take(((0, 8),)) == []


def test_slabs_that_were_never_touched_are_idle(make: Make) -> None:
    source = make(8)
    source.lend(((0, 5),), Kind.EPHEMERAL)
    assert source.count_unused(Kind.EPHEMERAL) == 0, "they were only just lent"
    source.acquire(False)
    source.acquire(False)
    assert source.count_unused(Kind.EPHEMERAL) == 3
    assert source.return_stock(2, Kind.EPHEMERAL) == 2
    assert source.count_unused(Kind.EPHEMERAL) == 1
    assert source.return_stock(9, Kind.EPHEMERAL) == 1
    assert slabs_of(source.pop_returning(Kind.EPHEMERAL)) == [0, 1, 2]


class Places(RuleBasedStateMachine):
    """The model: which slabs the lender believes to be lent, by kind, and which the pool has."""

    @initialize()
    def start(self) -> None:
        self.source = BorrowedArena(24)
        self.lent: dict[int, Kind] = {}
        self.out: dict[int, Kind] = {}

    @rule(first=st.integers(0, 23), count=st.integers(1, 6), kind=st.sampled_from(Kind))
    def lend(self, first: int, count: int, kind: Kind) -> None:
        slabs = [slab for slab in range(first, min(24, first + count)) if slab not in self.lent]
        self.source.lend(runs_of(slabs), kind)
        self.lent.update(dict.fromkeys(slabs, kind))

    @rule(kind=st.sampled_from(Kind))
    def acquire(self, kind: Kind) -> None:
        slab = self.source.acquire(kind.persistent)
        if slab is None:
            assert set(self.out) >= {number for number, lent in self.lent.items() if lent is kind}
        else:
            assert self.lent[slab] is kind
            assert slab not in self.out
            self.out[slab] = kind

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.out:
            slab = data.draw(st.sampled_from(sorted(self.out)))
            self.source.release(slab, self.out.pop(slab).persistent)
            self.take_back(self.lent[slab])

    @rule(kind=st.sampled_from(Kind), count=st.integers(0, 5))
    def shed(self, kind: Kind, count: int) -> None:
        self.source.return_stock(count, kind)
        self.take_back(kind)

    def take_back(self, kind: Kind) -> None:
        for slab in slabs_of(self.source.pop_returning(kind)):
            assert self.lent.pop(slab) is kind
            assert slab not in self.out

    @rule(first=st.integers(0, 23), count=st.integers(1, 6))
    def take(self, first: int, count: int) -> None:
        slabs = [slab for slab in range(first, min(24, first + count)) if self.lent.get(slab) is not Kind.PERSISTENT]
        lost = self.source.take(runs_of(slabs))
        assert sorted(lost) == sorted(slab for slab in slabs if slab in self.out)
        for slab in slabs:
            self.lent.pop(slab, None)
            self.out.pop(slab, None)

    @rule()
    def look_for_idle_ones(self) -> None:
        for kind in Kind:
            assert self.source.count_unused(kind) <= self.source.stocked

    @invariant()
    def all_agree(self) -> None:
        self.source.check()
        for kind in Kind:
            expected = sorted(slab for slab, lent in self.lent.items() if lent is kind)
            assert slabs_of(self.source.claims(kind)) == expected
            assert self.source.held(kind) == len(expected)

    def teardown(self) -> None:
        self.source.close()


TestPlaces = Places.TestCase
TestPlaces.settings = settings(max_examples=60, stateful_step_count=40)


def test_what_may_ever_be_lent_is_what_the_lender_said(make: Make) -> None:
    source = make(8)
    source.cap = 7
    assert source.capacity == SLAB_SIZE
    assert source.ceiling == 7 * SLAB_SIZE
