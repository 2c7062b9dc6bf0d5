"""How `tmemfs top` shows mounts: a table of one line a mount that fits 80 columns, and above it a line a trouble."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from tmemcommon.sizes import format_size
from tmemcommon.texts import printable, shortened
from tmemfs.lifecycle.toplines import Line

LEAST_NAME = 8  # columns that a mountpoint has at least
_HEADS = 4  # lines: the title, two of headings, the cursor's
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
    "Bytes, in K, M, G of 1024. hit ratio: pages asked for that cache or pool had;",
    "pool holds: its pages before compression; source: the slow directory.",
)


def view(lines: Sequence[Line], console: Console, *, whole: bool = False) -> RenderableType:
    """Lay out the mounts within the console: its width, and its height too unless the `whole` is wanted."""
    title = _title(lines)
    if not lines:
        return title
    troubles = [_trouble(line, trouble, console) for line in lines for trouble in line.troubles()]
    legend = [Text(text, style="dim") for text in _LEGEND]
    shown = len(lines)
    if not whole:
        most = max(1, console.height // 3)
        if len(troubles) > most:
            troubles[most - 1 :] = [Text(f"{len(troubles) - most + 1} more troubles", style="red")]
        shown = max(1, console.height - _HEADS - len(troubles) - len(legend))
    if shown < len(lines):
        rest = len(lines) - shown + 1
        shown -= 1
        legend.insert(0, Text(f"{rest} more mounts: tmemfs top MNT… shows those that are named", style="bold"))
    return Group(title, *troubles, _table(lines[:shown], console), *legend)


def _title(lines: Sequence[Line]) -> Text:
    seconds = [line.seconds for line in lines if line.seconds is not None]
    counted = f"{len(lines)} tmemfs mount{'' if len(lines) == 1 else 's'}" if lines else "no tmemfs mounts"
    over = f"; ratios and rates over {max(seconds):.1f} s" if seconds else ""
    return Text(counted + over, style="bold", no_wrap=True)


def _trouble(line: Line, trouble: str, console: Console) -> Text:
    """Write one trouble on one line: of a long mountpoint so much that the trouble is there whole."""
    name = _shortened(line.mountpoint, max(LEAST_NAME, console.width - cell_len(trouble) - 2))
    return Text(_shortened(f"{name}: {trouble}", console.width), style="red", no_wrap=True)


def _table(lines: Sequence[Line], console: Console) -> Table:
    """Draw the table; mountpoints are shortened to what the numbers leave."""
    with_swap = any(line.swap_capacity_bytes for line in lines)
    headings = (*_HEADINGS, _SWAP) if with_swap else _HEADINGS
    rows = [_cells(line)[: len(headings)] for line in lines]
    columns = [(*heading.split("\n"), *column) for heading, *column in zip(headings, *rows, strict=True)]
    left = console.width - sum(max(map(cell_len, column)) for column in columns)
    longest = max((cell_len(printable(line.mountpoint)) for line in lines), default=0)
    gap = 2 if left >= longest + 2 * len(columns) else 1
    room = max(LEAST_NAME, left - gap * len(columns))
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold")
    table.add_column("\nmount", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for line, row in zip(lines, rows, strict=True):
        style = "red" if line.troubles() else ""
        table.add_row(Text(_shortened(line.mountpoint, room), style=style), *map(Text, row))
    return table


def _cells(line: Line) -> list[str]:
    """Write the numbers of a mount, in the order of the headings."""
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
    """Shorten text to so many cells of a terminal, of which some characters take two."""
    text = printable(text)
    most = cells
    while cell_len(short := shortened(text, most)) > cells:
        most -= 1
    return short
