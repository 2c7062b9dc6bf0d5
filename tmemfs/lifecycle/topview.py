"""The display of `tmemfs top`: one line for each trouble, then a table with one row for each mount.

The table fits 80 columns: only mountpoints are shortened.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tmemcommon.sizes import format_size
from tmemcommon.texts import printable, shortened
from tmemfs.lifecycle.top import Line, Watcher

MIN_NAME_WIDTH = 8  # columns of a mountpoint
_WIDE = 10_000  # columns where the output is no terminal: nothing is shortened
_FIXED_LINES = 4  # the title, two of headings, the cursor's
_HEADINGS = (
    "hit\nratio",
    "asked\nfor/s",
    "cache\nused/of",
    "pool\nuses",
    "pool\nholds",
    "source\nread/s",
    "source\nwrite/s",
    "pool\nfrom",
)
_SWAP = "swap\nused/of"
_LEGEND = (
    "hit ratio: requested pages that cache or pool had; source: the slow directory;",
    "pool holds: its pages before compression. Sizes in bytes; K, M, G of 1024.",
)


def show(watcher: Watcher, interval: float, *, once: bool, as_json: bool) -> None:
    """Show the mounts until Ctrl-C; with `once`, as JSON or without a terminal, show one interval and return."""
    console = Console() if sys.stdout.isatty() else Console(width=_WIDE)
    first = watcher.sample()
    if as_json or once or not console.is_terminal:
        time.sleep(interval)
        lines = watcher.sample()
        if as_json:
            print(json.dumps([asdict(line) for line in lines], indent=1))
        else:
            console.print(view(lines, console, whole=True))
        return
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        lines = first
        while True:
            live.update(view(lines, console), refresh=True)
            time.sleep(interval)
            lines = watcher.sample()


def view(lines: Sequence[Line], console: Console, *, whole: bool = False) -> RenderableType:
    """Lay out the mounts within the width of the console, and within its height unless `whole` is set."""
    title = _title(lines)
    if not lines:
        return title
    troubles = [_trouble(line, trouble, console) for line in lines for trouble in line.troubles()]
    legend = [Text(text, style="dim") for text in _LEGEND]
    shown = len(lines)
    if not whole:
        limit = max(1, console.height // 3)
        if len(troubles) > limit:
            troubles[limit - 1 :] = [Text(f"{len(troubles) - limit + 1} more troubles", style="red")]
        shown = max(1, console.height - _FIXED_LINES - len(troubles) - len(legend))
    if shown < len(lines):
        rest = len(lines) - shown + 1
        shown -= 1
        legend.insert(0, Text(f"{rest} more mounts: tmemfs top MNT… shows only those that you name", style="bold"))
    return Group(title, *troubles, _table(lines[:shown], console), *legend)


def _title(lines: Sequence[Line]) -> Text:
    seconds = [line.seconds for line in lines if line.seconds is not None]
    counted = f"{len(lines)} tmemfs mount{'' if len(lines) == 1 else 's'}" if lines else "no tmemfs mounts"
    over = f"; ratios and rates over {max(seconds):.1f} s" if seconds else ""
    return Text(counted + over, style="bold", no_wrap=True)


def _trouble(line: Line, trouble: str, console: Console) -> Text:
    """Format one trouble as one line; a long mountpoint is shortened so that the trouble is complete."""
    name = _shortened(line.mountpoint, max(MIN_NAME_WIDTH, console.width - cell_len(trouble) - 2))
    return Text(_shortened(f"{name}: {trouble}", console.width), style="red", no_wrap=True)


def _table(lines: Sequence[Line], console: Console) -> Table:
    """Build the table; mountpoints get the width that the numbers leave."""
    with_swap = any(line.swap_capacity_bytes for line in lines)
    headings = (*_HEADINGS, _SWAP) if with_swap else _HEADINGS
    rows = [_cells(line)[: len(headings)] for line in lines]
    columns = [(*heading.split("\n"), *column) for heading, *column in zip(headings, *rows, strict=True)]
    left = console.width - sum(max(map(cell_len, column)) for column in columns)
    longest = max((cell_len(printable(line.mountpoint)) for line in lines), default=0)
    gap = 2 if left >= longest + 2 * len(columns) else 1
    room = max(MIN_NAME_WIDTH, left - gap * len(columns))
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold")
    table.add_column("\nmount", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for line, row in zip(lines, rows, strict=True):
        style = "red" if line.troubles() else ""
        table.add_row(Text(_shortened(line.mountpoint, room), style=style), *map(Text, row))
    return table


def _cells(line: Line) -> list[str]:
    """Return the numbers of a mount as text, in the order of the headings."""
    if line.trouble:
        return ["-"] * (len(_HEADINGS) + 1)
    return [
        "-" if line.hit_ratio is None else f"{line.hit_ratio:.1%}",
        _rate(line.asked_bytes_per_second),
        f"{format_size(line.cache_bytes)}/{format_size(line.cache_capacity_bytes)}",
        format_size(line.pool_bytes),
        format_size(line.pool_original_bytes),
        _rate(line.backing_read_bytes_per_second),
        _rate(line.backing_write_bytes_per_second),
        "own" if line.lender is None else "tmemd" if line.lender == "connected" else "LOST",
        f"{format_size(line.swap_bytes)}/{format_size(line.swap_capacity_bytes)}" if line.swap_capacity_bytes else "-",
    ]


def _rate(value: float | None) -> str:
    return "-" if value is None else format_size(round(value))


def _shortened(text: str, cells: int) -> str:
    """Shorten text to so many cells of a terminal; some characters take two."""
    text = printable(text)
    length = cells
    while cell_len(short := shortened(text, length)) > cells:
        length -= 1
    return short
