"""Strategies that make every message of the protocol."""

from __future__ import annotations

from hypothesis import strategies as st

from tmem.lending.protocol import messages as m
from tmem.lending.protocol.messages import Answer, FromGuest, ToGuest, Verb
from tmem.lending.protocol.runs import Runs

slabs = st.integers(0, m.MAX_SLABS)
some = st.integers(1, m.MAX_SLABS)
serials = st.integers(1, (1 << 32) - 1)
numbers = st.integers(0, (1 << 32) - 1)
counts = st.integers(0, (1 << 63) - 1)
seconds = st.floats(0.0, 1e9)
names = st.text(min_size=1, max_size=40)


@st.composite
def runs(draw: st.DrawFn) -> Runs:
    """Make ascending runs that do not overlap."""
    end, made = 0, []
    for gap, count in draw(st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 1000)), max_size=12)):
        made.append((end + gap, count))
        end += gap + count
    return tuple(made)


from_guest: st.SearchStrategy[FromGuest] = st.one_of(
    st.builds(
        m.Hello, numbers, st.binary(min_size=16, max_size=16), names, some, st.none() | slabs, again=st.booleans()
    ),
    st.builds(m.Claim, runs(), st.booleans(), st.booleans()),
    st.builds(m.Ask, serials, st.integers(1, m.MAX_ASK), st.booleans(), st.none() | seconds),
    st.builds(m.Return, runs(), st.booleans(), numbers, st.booleans(), st.none() | seconds),
    st.builds(m.Confirm, serials),
    st.builds(m.Report, st.none() | seconds, counts, counts, counts, counts, counts, counts),
)
to_guest: st.SearchStrategy[ToGuest] = st.one_of(
    st.builds(m.Welcome, numbers, slabs, slabs, st.booleans()),
    st.builds(m.Refused, names, st.booleans()),
    st.builds(m.Lend, runs(), serials, st.booleans(), st.booleans()),
    st.builds(m.Deny, serials, names),
    st.builds(m.Revoke, serials, some, st.booleans()),
    st.builds(m.Taken, runs(), serials),
    st.builds(m.Limits, slabs, slabs, st.booleans()),
    st.builds(m.Evicted, names),
)
weights = st.floats(0.001, m.MAX_WEIGHT)
verbs: st.SearchStrategy[Verb] = st.one_of(
    st.just(m.List()),
    st.builds(m.SetLimits, names, *[st.none() | strategy for strategy in (weights, slabs, slabs, slabs)]),
    st.builds(m.Freeze, names),
    st.builds(m.Thaw, names),
    st.builds(m.TakeBack, names, some, st.booleans()),
    st.builds(m.Drain, names),
    st.builds(m.Resize, some),
    st.builds(m.Evict, names, st.booleans()),
    st.just(m.AskTotals()),
)
rows = st.builds(
    m.Row,
    *(numbers, names, numbers, numbers, names, slabs, slabs, slabs, weights, slabs, slabs, slabs),
    *(st.none() | seconds, counts, counts, counts, counts, counts, counts, counts),
)
answers: st.SearchStrategy[Answer] = st.one_of(
    st.builds(m.Table, st.lists(rows, max_size=3).map(tuple), st.booleans()),
    st.builds(m.Done, names),
    st.builds(m.Failed, names),
    st.builds(m.Totals, st.dictionaries(names, counts, max_size=5)),
)
