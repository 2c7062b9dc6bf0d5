"""What tmemctl shows: the guests as a table for people and as JSON, and the sum of it in a line."""

from __future__ import annotations

import pwd
from collections.abc import Sequence

from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from tmem.arena import SLAB_SIZE
from tmem.lending.protocol.messages import Row
from tmem.sizes import format_size
from tmem.texts import printable

_LEFT = ("name", "user", "state")
_WIDE = (
    *("guest", "name", "user", "pid", "state", "held", "persistent", "floor", "cap", "weight"),
    *("age", "used", "hits", "revoked", "taken"),
)
_NARROW = ("guest", "name", "state", "held", "persistent", "age", "used", "hits")
_NAME = 20  # columns that a name has at least before others are left out
_STYLES = {"connected": "green", "away": "yellow", "frozen": "cyan", "draining": "cyan", "barred": "red"}


def table(rows: Sequence[Row], console: Console, caption: str | None = None) -> Table:
    """Lay out the guests, those that hold most first, with what there is room for."""
    cells = [_cells(row) for row in sorted(rows, key=lambda row: -row.ephemeral - row.persistent)]
    made = _table(cells, _WIDE, caption)
    name = max((len(row.name) for row in rows), default=0)
    wanted = console.measure(made, options=console.options.update(width=10_000)).maximum
    if wanted - max(0, name - _NAME) > console.width:
        made = _table(cells, _NARROW, caption)
    return made


def _table(cells: Sequence[dict[str, str | Text]], columns: Sequence[str], caption: str | None) -> Table:
    made = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left", pad_edge=False)
    for column in columns:
        justify: JustifyMethod = "left" if column in _LEFT else "right"
        made.add_column(column, justify=justify, no_wrap=column != "name", overflow="fold")
    for row in cells:
        made.add_row(*(row[column] for column in columns))
    return made


def _cells(row: Row) -> dict[str, str | Text]:
    """Write what is known of a guest, by column."""
    held = row.ephemeral + row.persistent
    return {
        "guest": str(row.guest),
        "name": Text(printable(row.name)),
        "user": _user(row.uid),
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


def summary(counters: dict[str, int | float]) -> str:
    """Say in a line how much is lent."""
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
    """Give a guest with sizes in bytes."""
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
    """Write an age in the largest unit that has two digits or so."""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:.1f}s" if seconds < 10 else f"{seconds:.0f}s"
