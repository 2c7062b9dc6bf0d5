"""Read-ahead decides from page numbers alone: a sequential stream grows its window, a random one has none."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from tmemfs.io.readahead import MAX_PAGES, MIN_PAGES, NO_MARKER, Readahead


def test_a_read_at_the_start_of_a_file_begins_a_stream() -> None:
    assert Readahead().miss(0, 0) == MIN_PAGES


def test_the_window_doubles_from_128_kib_to_2_mib() -> None:
    stream, page, windows = Readahead(), 0, []
    for _ in range(6):
        window = stream.miss(page, page)
        windows.append(window)
        page += window + 1
        stream.next_page = page
    assert windows == [32, 64, 128, 256, 512, 512]
    assert (MIN_PAGES << 12, MAX_PAGES << 12) == (128 << 10, 2 << 20)


def test_random_reads_cause_no_readahead() -> None:
    stream, generator = Readahead(), random.Random(1)
    stream.next_page = 1 << 30
    for _ in range(1000):
        page = generator.randrange(1 << 20)
        assert stream.miss(page, page) == 0
        assert stream.marker == NO_MARKER
        stream.next_page = page + 1 << 21  # the next read never continues here


def test_a_jump_ends_the_stream_and_the_next_one_starts_small() -> None:
    stream = Readahead()
    for page in (0, 33, 98):
        stream.next_page = page
        stream.miss(page, page)
    assert stream.window == 128
    stream.next_page = 99
    assert stream.miss(5000, 5000) == 0
    stream.next_page = 5001
    assert stream.miss(5001, 5001) == MIN_PAGES


def test_a_read_in_the_page_where_the_last_one_ended_is_sequential() -> None:
    stream = Readahead()
    stream.next_page = 11
    assert stream.is_sequential(10)
    assert stream.is_sequential(11)
    assert not stream.is_sequential(9)
    assert not stream.is_sequential(12)


def test_passing_the_marker_reads_the_window_after_the_last() -> None:
    stream = Readahead()
    window = stream.miss(0, 0)
    assert 0 < stream.marker <= window
    stream.next_page = stream.marker
    start, count = stream.reached_marker(stream.marker)
    assert (start, count) == (window + 1, 2 * window)
    assert stream.marker == start


def test_a_jump_past_the_marker_reads_nothing_ahead() -> None:
    stream = Readahead()
    stream.miss(0, 0)
    stream.next_page = 1
    assert stream.reached_marker(20) == (0, 0)
    assert stream.marker == NO_MARKER


def test_a_cache_smaller_than_a_window_has_no_readahead() -> None:
    assert Readahead(max_pages=MIN_PAGES - 1).miss(0, 0) == 0


@settings(derandomize=True, deadline=None)
@given(
    max_pages=st.integers(1, 1024),
    reads=st.lists(st.tuples(st.one_of(st.none(), st.integers(0, 5000)), st.integers(1, 300)), max_size=60),
)
def test_a_window_is_bounded_and_ends_at_its_edge(max_pages: int, reads: list[tuple[int | None, int]]) -> None:
    stream = Readahead(max_pages)
    for jump, count in reads:
        first = stream.next_page if jump is None else jump
        last = first + count - 1
        if last >= stream.marker:
            start, ahead = stream.reached_marker(first)
            assert not ahead or start + ahead == stream.edge
        else:
            ahead = stream.miss(first, last)
            assert not ahead or stream.edge == last + 1 + ahead
        assert 0 <= ahead <= min(MAX_PAGES, max_pages)
        stream.next_page = last + 1
