"""Keeps the state of each slab of one arena, in one byte, so that no slab can be in two states.

The bytes end at the highest slab that ever left FREE, and the lowest free slabs are lent first: the map of a 16-GiB
arena (262,144 slabs) of which 1 GiB is lent takes 16 KiB. Regular expressions find runs, and counts are kept, so no
Python code loops over slabs. Measured on this arena with every second slab lent, the worst case: the lowest 64 free
slabs take 15 us, all runs of one state 60 ms; with half of it lent in one run 0.6 and 36 us.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import IntEnum

from tmem.lending.protocol.kind import Kind
from tmem.lending.protocol.runs import Run, Runs


class State(IntEnum):
    """The state of a slab."""

    FREE = 0  # not populated; the guest may not use it
    EPHEMERAL = 1  # lent
    PERSISTENT = 2  # lent, never taken
    POPULATING_EPHEMERAL = 3  # reserved for an Ask
    POPULATING_PERSISTENT = 4
    TAKEN = 5  # not populated; the guest has not confirmed that

    @classmethod
    def held(cls, kind: Kind) -> State:
        """Return the state of lent slabs of a kind."""
        return cls.PERSISTENT if kind.persistent else cls.EPHEMERAL

    @classmethod
    def populating(cls, kind: Kind) -> State:
        """Return the state of slabs that are being populated to be lent as a kind."""
        return cls.POPULATING_PERSISTENT if kind.persistent else cls.POPULATING_EPHEMERAL


_ONE = [bytes([state]) for state in State]
_RUN = [re.compile(b"%s+" % re.escape(one), re.DOTALL) for one in _ONE]
_NOT_LENT = re.compile(b"[%s]+" % re.escape(_ONE[State.FREE] + _ONE[State.TAKEN]), re.DOTALL)
_ANY = re.compile(b"|".join(b"%s+" % re.escape(one) for one in _ONE), re.DOTALL)


class SlabMap:
    """The states of the slabs 0 to `total` of one arena."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.counts = [0] * len(State)
        self.counts[State.FREE] = total
        self._states = bytearray()
        self._free_from = 0  # no slab below is free
        self._hand = 0  # next slab to take; moves in a circle, so about in the order of lending

    @property
    def size(self) -> int:
        """Bytes of the map."""
        return len(self._states)

    def set(self, runs: Sequence[Run], state: State) -> None:
        """Put slabs into a state, from any other; IndexError when one is beyond the arena."""
        for first, length in runs:
            end = first + length
            if first < 0 or end > self.total:
                raise IndexError(f"slabs {first} to {end} of {self.total}")
            if state == State.FREE:  # slabs beyond the bytes are free already
                end = min(end, len(self._states))
                length = max(0, end - first)
            elif end > len(self._states):
                self._states.extend(bytes(end - len(self._states)))
            if not length:
                continue
            left = length
            for was in State:
                found = self._states.count(was, first, end)
                self.counts[was] -= found
                left -= found
                if not left:
                    break
            self._states[first:end] = _ONE[state] * length
            self.counts[state] += length
            if state == State.FREE:
                self._free_from = min(self._free_from, first)

    def replace(self, was: State, state: State) -> None:
        """Put all slabs of one state, not FREE, into another."""
        table = bytearray(range(256))
        table[was] = state
        self._states = self._states.translate(table)
        self.counts[state] += self.counts[was]
        self.counts[was] = 0
        if state == State.FREE:
            self._free_from = 0

    def combined(self, other: SlabMap, table: bytes) -> bytearray:
        """Return `table[state here + 8 * state in other]` for each slab.

        The time does not depend on fragmentation. Slabs beyond the bytes of both maps are left out.
        """
        both = int.from_bytes(self._states, "little") | int.from_bytes(other._states, "little") << 3
        return bytearray(both.to_bytes(max(len(self._states), len(other._states)), "little").translate(table))

    def with_the_first(self, most: int, state: State, other: State) -> bytearray:
        """Return the bytes of the map, with all slabs of a state but the first `most` put into another."""
        low, high = 0, len(self._states)
        while low < high:
            middle = (low + high) // 2
            if self._states.count(state, 0, middle) < most:
                low = middle + 1
            else:
                high = middle
        table = bytearray(range(256))
        table[state] = other
        return self._states[:low] + self._states[low:].translate(table)

    def load(self, states: bytearray) -> None:
        """Replace all states; slabs beyond the bytes are FREE."""
        self._states = states.rstrip(_ONE[State.FREE])
        self.counts = [self._states.count(state) for state in State]
        self.counts[State.FREE] += self.total - len(self._states)
        self._free_from = self._hand = 0

    def holds(self, runs: Sequence[Run], state: State) -> bool:
        """Return whether all slabs of runs are in a state, not FREE."""
        return all(self._states.count(state, first, first + length) == length for first, length in runs)

    def by_state(self, runs: Sequence[Run]) -> dict[State, Runs]:
        """Return the slabs of runs by state; slabs beyond the arena are left out."""
        found: dict[State, list[Run]] = {}
        for first, length in runs:
            end = min(first + length, self.total)
            known = min(end, len(self._states))
            for match in _ANY.finditer(self._states, first, known):
                state = State(self._states[match.start()])
                found.setdefault(state, []).append((match.start(), match.end() - match.start()))
            if end > max(first, known):
                found.setdefault(State.FREE, []).append((max(first, known), end - max(first, known)))
        return {state: tuple(runs) for state, runs in found.items()}

    def runs(self, state: State) -> Runs:
        """Return all slabs of a state."""
        states = self._states
        found = [(match.start(), match.end() - match.start()) for match in _RUN[state].finditer(states)]
        if state == State.FREE and len(states) < self.total:
            found.append((len(states), self.total - len(states)))
        return tuple(found)

    def not_lent(self, first: int, most: int) -> tuple[Runs, int]:
        """Return at most `most` runs of free or taken slabs from `first` on, and where to go on."""
        found: list[Run] = []
        for match in _NOT_LENT.finditer(self._states, first):
            if len(found) == most:
                return tuple(found), match.start()
            found.append((match.start(), match.end() - match.start()))
        if (start := max(first, len(self._states))) < self.total:
            found.append((start, self.total - start))
        return tuple(found), self.total

    def lowest_free(self, most: int) -> Runs:
        """Return the lowest free slabs, at most `most`."""
        states = self._states
        found: list[Run] = []
        for match in _RUN[State.FREE].finditer(states, self._free_from):
            if not found:
                self._free_from = match.start()
            length = min(match.end() - match.start(), most)
            found.append((match.start(), length))
            most -= length
            if not most:
                return tuple(found)
        if not found:
            self._free_from = len(states)
        if most and len(states) < self.total:
            found.append((len(states), min(most, self.total - len(states))))
        return tuple(found)

    def next_ephemeral(self, most: int) -> Runs:
        """Return at most `most` ephemeral slabs to take, about those lent longest ago."""
        found: list[Run] = []
        hand = self._hand
        for start, end in ((hand, len(self._states)), (0, hand)):
            for match in _RUN[State.EPHEMERAL].finditer(self._states, start, end):
                if most <= 0:
                    return tuple(sorted(found))
                length = min(match.end() - match.start(), most)
                found.append((match.start(), length))
                most -= length
                self._hand = match.start() + length
        return tuple(sorted(found))

    def check(self) -> None:
        """Raise AssertionError unless the counts are those of the bytes."""
        states = self._states
        assert len(states) <= self.total
        for state in State:
            beyond = self.total - len(states) if state == State.FREE else 0
            assert self.counts[state] == states.count(state) + beyond, f"count of {state.name}"
        assert sum(self.counts) == self.total, "a slab has no state"
        assert State.FREE not in states[: self._free_from], "a free slab lies below the lowest"
