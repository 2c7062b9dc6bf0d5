"""Look at all mounts of this machine at once: `tmemfs top`.

A mount that hangs hangs whoever touches it, so each is read by a thread of its own for a bounded time; one whose last
reading has not come back yet is not touched again.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from tmemfs.kernel.kernelmount import MountEntry, mount_table

WAIT_SECONDS = 1.0
MIB = 1 << 20

Values = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Sample:
    """What one mount told, and when; `trouble` instead when it did not."""

    at: float
    values: Values = field(default_factory=dict)
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """One mount: its state, and what it did between two samples (since it was mounted, when there is only one)."""

    mountpoint: str
    source: str
    trouble: str
    lender: str  # connected, disconnected, or "" with a pool of its own
    cache_bytes: int
    cache_capacity_bytes: int
    pool_bytes: int  # memory
    pool_held_bytes: int  # size of the pages in it
    hit_ratio: float | None
    asked_pages: float | None  # a second, as all that follow
    backing_read_bytes: float | None
    backing_write_bytes: float | None
    backing_errors: float | None


def mounts(only: Collection[Path] = ()) -> list[MountEntry]:
    """Find the tmemfs mounts that can be seen: of those at one place, the uppermost. `only` picks some."""
    uppermost = {entry.mountpoint: entry for entry in mount_table()}
    found = (entry for entry in uppermost.values() if entry.is_tmemfs and (not only or entry.mountpoint in only))
    return sorted(found, key=lambda entry: entry.mountpoint)


class Watcher:
    """Reads the counters of mounts again and again."""

    def __init__(self, only: Collection[Path] = (), control_name: str = ".tmemfs") -> None:
        self._only = only
        self._control_name = control_name
        self._hanging: dict[str, threading.Thread] = {}  # by the mount's device
        self._before: dict[str, Sample] = {}

    def look(self, seconds: float = WAIT_SECONDS) -> list[Line]:
        """Read all mounts at once, for so many seconds at most, and compare with the last look."""
        found = mounts(self._only)
        samples: dict[str, Sample] = {}
        for entry in found:
            if entry.device not in self._hanging:
                thread = threading.Thread(target=self._read, args=(entry, samples), daemon=True)
                self._hanging[entry.device] = thread
                thread.start()
        deadline = time.monotonic() + seconds
        for device, thread in list(self._hanging.items()):
            thread.join(max(0.0, deadline - time.monotonic()))
            if not thread.is_alive():
                del self._hanging[device]
        silent = Sample(time.monotonic(), trouble="does not answer: it hangs")
        lines = [line_of(entry, self._before.get(entry.device), samples.get(entry.device, silent)) for entry in found]
        self._before = dict(samples)
        return lines

    def _read(self, entry: MountEntry, samples: dict[str, Sample]) -> None:
        path = Path(entry.mountpoint) / self._control_name / "stats.json"
        try:
            values = json.loads(path.read_bytes())
        except FileNotFoundError:
            samples[entry.device] = Sample(time.monotonic(), trouble="has another --control-name")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else None
            samples[entry.device] = Sample(time.monotonic(), trouble=reason or "tells nothing that can be read")
        else:
            samples[entry.device] = Sample(time.monotonic(), values)


def line_of(entry: MountEntry, before: Sample | None, now: Sample) -> Line:
    """Compare two samples of a mount."""
    known = before is not None and bool(before.values) and bool(now.values)
    old: Values = before.values if before is not None and known else {}

    def grown(*names: str) -> float:
        # A reset in between makes it negative: then what there is was counted since.
        total = sum(now.values.get(name) or 0 for name in names)
        rise = total - sum(old.get(name) or 0 for name in names)
        return float(rise if rise >= 0 else total)

    def rate(*names: str) -> float | None:
        seconds = now.at - before.at if before is not None else 0.0
        return grown(*names) / seconds if known and seconds > 0 else None

    asked = grown("cache_hits", "cache_misses")
    value = now.values.get
    return Line(
        mountpoint=str(entry.mountpoint),
        source=entry.fsname,
        trouble=now.trouble,
        lender=value("lender") or "",
        cache_bytes=value("cache_resident_bytes") or 0,
        cache_capacity_bytes=value("cache_capacity_bytes") or 0,
        pool_bytes=value("pool_lent_bytes") or 0,
        pool_held_bytes=value("pool_original_bytes") or 0,
        hit_ratio=grown("cache_hits", "precache_succ_gets") / asked if asked else None,
        asked_pages=rate("cache_hits", "cache_misses"),
        backing_read_bytes=rate("backing_read_bytes"),
        backing_write_bytes=rate("backing_write_bytes"),
        backing_errors=rate("backing_errors"),
    )


def table_of(lines: list[Line]) -> Table:
    """Draw the mounts as a table that fits a terminal of 80 columns; sizes in MiB."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("MOUNT", overflow="fold", min_width=12)
    for title in ("HIT%", "PAGES/S", "CACHE/OF", "POOL>HOLDS", "READ/S", "WRITE/S"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("LENDER", overflow="fold")
    for line in lines:
        if line.trouble:
            table.add_row(line.mountpoint, *[""] * 6, f"[red]{line.trouble}")
            continue
        errors = f" [red]{line.backing_errors:.0f} errors/s" if line.backing_errors else ""
        table.add_row(
            line.mountpoint,
            _number(line.hit_ratio, 100.0, 1),
            _number(line.asked_pages, 1.0, 0),
            f"{line.cache_bytes / MIB:.0f}/{line.cache_capacity_bytes / MIB:.0f}",
            f"{line.pool_bytes / MIB:.0f}>{line.pool_held_bytes / MIB:.0f}",
            _number(line.backing_read_bytes, 1 / MIB, 1),
            _number(line.backing_write_bytes, 1 / MIB, 1),
            (f"[red]{line.lender}" if line.lender == "disconnected" else line.lender or "-") + errors,
        )
    return table


def _number(value: float | None, scale: float, digits: int) -> str:
    return "-" if value is None else f"{value * scale:.{digits}f}"


def watch(watcher: Watcher, interval: float, *, once: bool, as_json: bool) -> None:
    """Show the mounts until somebody has seen enough, or once, over one interval; without a terminal, once."""
    console = Console()
    watcher.look()
    time.sleep(interval)
    if as_json:
        print(json.dumps([asdict(line) for line in watcher.look()], indent=1))
    elif once or not console.is_terminal:
        console.print(table_of(watcher.look()))
    else:
        with contextlib.suppress(KeyboardInterrupt), Live(table_of(watcher.look()), console=console) as live:
            while True:
                time.sleep(interval)
                live.update(table_of(watcher.look()))
