"""The output of tmemctl: the guests as a table or as JSON, and a line with the sums."""

from __future__ import annotations

import pwd
from collections.abc import Mapping, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console, Group, JustifyMethod
from rich.table import Table
from rich.text import Text

from tmem.arena import SLAB_SIZE
from tmem.lending.protocol.messages import Row
from tmemcommon.sizes import format_size
from tmemcommon.texts import printable

_LEFT = ("name", "user", "state")
_COLUMNS = (
    *("guest", "name", "user", "pid", "state", "held", "persistent", "floor", "cap", "weight"),
    *("age", "used", "hits", "revoked", "taken"),
)
# The columns that are left out if the console is narrow.
_DROP_ORDER = (
    "taken",
    "revoked",
    "weight",
    "pid",
    "user",
    "floor",
    "cap",
)  # columns that are left out, in this order, if the console is narrow
_MIN_NAME_WIDTH = 20  # if names get less, columns are left out
_OTHER_LINES = 6  # of the table besides the guests, and one for the cursor
_STYLES = {"connected": "green", "away": "yellow", "frozen": "cyan", "draining": "cyan", "barred": "red"}


def render(rows: Sequence[Row], counters: Mapping[str, int | float], console: Console, *, all_rows: bool) -> Group:
    """Return the table of guests, sorted by what they hold, and the sums; name the columns that do not fit.

    Without `all_rows` the table has only as many guests as fit the console's height.
    """
    cells = [_cells(row) for row in sorted(rows, key=lambda row: -row.ephemeral - row.persistent)]
    shown = cells if all_rows else cells[: max(1, console.height - _OTHER_LINES - 2)]
    columns = _fitting(shown, console)
    below = []
    if len(columns) < len(_COLUMNS):
        without = ", ".join(column for column in _COLUMNS if column not in columns)
        below.append(f"no room for {without}: tmemctl list --json")
    if len(shown) < len(cells):
        below.append(f"{len(cells) - len(shown)} more guests, which hold less: tmemctl list")
    return Group(_table(shown, columns), *map(Text, (*below, _summary(counters))))


def _fitting(cells: Sequence[dict[str, str | Text]], console: Console) -> list[str]:
    """Return the columns that fit. Long names may be folded."""
    columns = list(_COLUMNS)
    name = max((cell_len(str(row["name"])) for row in cells), default=0)
    for dropped in _DROP_ORDER:
        wanted = console.measure(_table(cells, columns), options=console.options.update(width=10_000)).maximum
        if wanted - max(0, name - _MIN_NAME_WIDTH) <= console.width:
            break
        columns.remove(dropped)
    return columns


def _table(cells: Sequence[dict[str, str | Text]], columns: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        justify: JustifyMethod = "left" if column in _LEFT else "right"
        table.add_column(column, justify=justify, no_wrap=column != "name", overflow="fold")
    for row in cells:
        table.add_row(*(row[column] for column in columns))
    return table


def _cells(row: Row) -> dict[str, str | Text]:
    """Return a guest's cells by column."""
    held = row.ephemeral + row.persistent
    return {
        "guest": str(row.guest),
        "name": Text(printable(row.name)),
        "user": Text(printable(_user(row.uid))),
        "pid": str(row.pid),
        "state": Text(printable(row.state), _STYLES.get(row.state, "")),
        "held": _size(held),
        "persistent": f"{_size(row.persistent)}/{_size(row.persistent_cap)}" if row.persistent_cap else "-",
        "floor": _size(row.floor) if row.floor else "-",
        "cap": _size(row.cap) if row.cap < row.slabs else "-",
        "weight": f"{row.weight:g}",
        "age": "-" if row.age is None else _duration(row.age),
        "used": _share(row.used_bytes, held * SLAB_SIZE),
        "hits": _share(row.hits, row.hits + row.misses),
        "revoked": _size(row.revoked),
        "taken": _size(row.taken),
    }


def _summary(counters: Mapping[str, int | float]) -> str:
    """Return the line that says how much is lent."""
    size, ephemeral, persistent, promised, reserved = (
        int(counters[f"{name}_bytes"]) for name in ("size", "ephemeral", "persistent", "promised", "reserved")
    )
    sizes = [format_size(size) for size in (ephemeral + persistent + promised, size, persistent, reserved)]
    guests = f"{counters['guests']:.0f} guest{'' if counters['guests'] == 1 else 's'}"
    away = counters["guests"] - counters["connected"]
    return (
        f"{sizes[0]} of {sizes[1]} lent to {guests}"
        + (f", {away:.0f} of them away" if away else "")
        + f"; {sizes[2]} persistent, {sizes[3]} promised on request"
    )


def as_json(row: Row) -> dict[str, object]:
    """Return a guest as a JSON object, with sizes in bytes."""
    return {
        "guest": row.guest,
        "name": row.name,
        "uid": row.uid,
        "pid": row.pid,
        "state": row.state,
        "arena_bytes": row.slabs * SLAB_SIZE,
        "ephemeral_bytes": row.ephemeral * SLAB_SIZE,
        "persistent_bytes": row.persistent * SLAB_SIZE,
        "weight": row.weight,
        "cap_bytes": row.cap * SLAB_SIZE,
        "floor_bytes": row.floor * SLAB_SIZE,
        "persistent_cap_bytes": row.persistent_cap * SLAB_SIZE,
        "age_seconds": row.age,
        "pages": row.pages,
        "used_bytes": row.used_bytes,
        "puts": row.puts,
        "hits": row.hits,
        "misses": row.misses,
        "revoked_slabs": row.revoked,
        "taken_slabs": row.taken,
    }


def _size(slabs: int) -> str:
    return format_size(slabs * SLAB_SIZE)


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "-"


def _duration(seconds: float) -> str:
    """Format an age in the largest unit in which it is at least 2."""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:.1f}s" if seconds < 10 else f"{seconds:.0f}s"
