"""Sizes in messages: one notation, which the parser reads, too."""

from __future__ import annotations

import pytest

from tmemcommon.sizes import format_exact_size, format_size, parse_size


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0"),
        (1, "1B"),
        (999, "999B"),
        (1000, "1.0K"),
        (4096, "4K"),
        (1 << 20, "1M"),
        ((1 << 20) + 5000, "1.0M"),
        (3 << 29, "1.5G"),
        (1000 << 20, "1.0G"),
    ],
)
def test_a_size_has_a_unit_and_at_most_three_digits(size: int, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize("size", [1, 999, 4096, 64 << 10, 3 << 29])
def test_a_formatted_size_can_be_parsed(size: int) -> None:
    assert parse_size(format_size(size)) == size


@pytest.mark.parametrize("size", [0, 100, 65536, 50 * 65536, 3 << 29, 5 << 40, (1 << 30) + 1])
def test_an_exact_size_reads_as_the_same_bytes(size: int) -> None:
    text = format_exact_size(size)
    assert text == "0" if not size else parse_size(text) == size
