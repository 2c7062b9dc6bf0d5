"""The display of tmemfs top: one row for each mount at 80 columns, one line for each trouble, names escaped."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace

import pytest
from rich.cells import cell_len
from rich.console import Console

from tmemfs.lifecycle.top import Line
from tmemfs.lifecycle.topview import view

QUIET = Line(
    "/data", "nfs:/x", "", None, cache_bytes=32 << 20, cache_capacity_bytes=64 << 20, pool_bytes=1 << 20, seconds=1.0
)
SWAP = replace(QUIET, mountpoint="/swap", swap_bytes=1 << 20, swap_capacity_bytes=1 << 30)
WIDEST = int(99.9 * (1 << 60))
HUGE = Line(
    "/" + "long name" * 20,
    "x",
    "",
    "connected",
    *(WIDEST, WIDEST, WIDEST, WIDEST, WIDEST, WIDEST, 3),
    *(1.0, 2.0, WIDEST, WIDEST, WIDEST, WIDEST),
)
WILD = replace(QUIET, mountpoint="/mnt/[/][red]\x1b[2J\n\udcff\u65e5\u672c" * 5)
HUNG = Line("/hung", "x", "does not answer: it hangs", None)


def shown(lines: Sequence[Line], width: int = 80, height: int = 24, whole: bool = True) -> list[str]:
    console = Console(width=width, height=height, file=io.StringIO(), force_terminal=True, color_system=None)
    console.print(view(lines, console, whole=whole))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 120])
def test_no_line_wraps_and_only_names_are_shortened(width: int) -> None:
    lines = [QUIET, SWAP, HUGE, WILD, HUNG]
    text = shown(lines, width)
    troubles = sum(len(line.troubles()) for line in lines)
    assert len(text) == 1 + troubles + 2 + len(lines) + 2
    assert all(line.isprintable() and cell_len(line) <= width for line in text)
    heads, rows = text[1 + troubles : 3 + troubles], text[3 + troubles : -2]
    assert heads[0].split() == ["hit", "asked", "cache", "pool", "pool", "source", "source", "pool", "swap"]
    assert heads[1].split() == [
        "mount",
        "ratio",
        "for/s",
        "used/of",
        "uses",
        "holds",
        "read/s",
        "write/s",
        "from",
        "used/of",
    ]
    assert rows[0].split() == ["/data", "-", "-", "32M/64M", "1M", "0", "-", "-", "own", "-"]
    assert rows[1].split() == ["/swap", "-", "-", "32M/64M", "1M", "0", "-", "-", "own", "1M/1G"]
    assert "99.9E/99.9E" in rows[2]
    assert rows[4].split() == ["/hung", *["-"] * 9]


def test_each_trouble_has_a_line_and_is_complete() -> None:
    bad = replace(WILD, lender="disconnected", backing_errors_per_second=2.5, swap_lost_pages=7)
    text = shown([QUIET, bad, HUNG])
    assert [line for line in text if line.endswith("does not answer: it hangs")] == ["/hung: does not answer: it hangs"]
    for trouble in bad.troubles():
        assert len([line for line in text if line.endswith(": " + trouble)]) == 1


def test_there_is_a_swap_column_only_if_a_mount_has_a_swap_file() -> None:
    assert any("swap" in line for line in shown([QUIET, SWAP]))
    assert not any("swap" in line for line in shown([QUIET]))


def test_rows_that_do_not_fit_the_terminal_are_counted() -> None:
    text = shown([QUIET] * 100 + [HUNG] * 100, whole=False)
    assert len(text) < 24
    assert text[0].startswith("200 tmemfs mounts")
    rows = [line for line in text if line.startswith("/data ")]
    assert any(line.startswith(f"{200 - len(rows)} more mounts") for line in text)
    assert "93 more troubles" in text
    assert len(shown([QUIET] * 100)) == 105


def test_no_mounts_give_one_line() -> None:
    assert shown([]) == ["no tmemfs mounts"]
