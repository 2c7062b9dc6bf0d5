"""The texts of the demonstration about its times."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from bench import demo
from bench.demo import Ran


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        (9.0, 3.0, "3.0 × faster"),
        (3.0, 9.0, "3.0 × slower"),
        (9.0, 10.0, "1.1 × slower"),
        (10.0, 9.6, "as fast"),
        (10.0, 10.4, "as fast"),
    ],
)
def test_what_takes_longer_is_called_slower(before: float, now: float, said: str) -> None:
    assert demo.compared(before, now) == said


def test_the_table_and_the_sentence_below_it_say_what_the_pool_did() -> None:
    def passes(first: float, second: float, pool: int, backing: int) -> demo.Passes:
        return demo.Passes(Ran(first, ""), Ran(second, ""), pool, backing, 1.8)

    found = {
        "tar": (passes(6.0, 2.0, 4000, 10), passes(6.0, 6.0, 0, 4010)),
        "grep": (passes(6.0, 7.0, 3000, 20), passes(6.0, 9.0, 0, 4020)),
    }
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(demo._table(found))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["against", "the", "first", "3.0", "×", "faster", "1.2", "×", "slower"] in lines
    assert ["against", "the", "first", "as", "fast", "1.5", "×", "slower"] in lines
    assert ["pages", "from", "the", "pool", "4,000", "3,000"] in lines
    said = demo._conclusion(found)
    assert "7,000 pages" in said
    assert "9.00 s with it, 15.00 s without (1.7 × faster)" in said
