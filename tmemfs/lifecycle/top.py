"""Look at all mounts of this machine at once: `tmemfs top`.

Each is asked through its control socket, all at once and for a bounded time: one that hangs holds up no other.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.live import Live

from tmemcommon.mountinfo import MountEntry
from tmemfs.config import ConfigError
from tmemfs.kernel.mounttable import is_tmemfs, mount_table
from tmemfs.lifecycle.controlsocket import RemoteError, ask
from tmemfs.lifecycle.toplines import Line, Sample, line_of, sample_of
from tmemfs.lifecycle.topview import view

WAIT_SECONDS = 1.0
_WIDE = 10_000  # columns where the output is no terminal: nothing is shortened


def mounts(only: Collection[Path] = ()) -> list[MountEntry]:
    """Find the tmemfs mounts that can be seen: of those at one place, the uppermost. `only` picks some."""
    uppermost = {entry.mountpoint: entry for entry in mount_table()}
    found = (entry for entry in uppermost.values() if is_tmemfs(entry) and (not only or entry.mountpoint in only))
    return sorted(found, key=lambda entry: entry.mountpoint)


class Watcher:
    """Reads the counters of mounts again and again."""

    def __init__(self, only: Collection[Path] = ()) -> None:
        """Watch all mounts, or some. Raises ConfigError when one of these is none."""
        for missing in set(only) - {entry.mountpoint for entry in mounts(only)}:
            raise ConfigError(f"'{missing}' is not a tmemfs mount: tmemfs top without a path shows those there are")
        self._only = only
        self._before: dict[str, Sample] = {}

    def look(self, seconds: float = WAIT_SECONDS) -> list[Line]:
        """Read all mounts at once, for so many seconds at most, and compare with the last look."""
        found = mounts(self._only)
        with ThreadPoolExecutor(len(found) or 1) as threads:
            samples = list(threads.map(lambda entry: _sample(entry, seconds), found))
        lines = [line_of(entry, self._before.get(entry.device), now) for entry, now in zip(found, samples, strict=True)]
        self._before = {entry.device: now for entry, now in zip(found, samples, strict=True)}
        return lines


def _sample(entry: MountEntry, seconds: float) -> Sample:
    """Ask one mount for its counters."""
    try:
        content = ask(entry, "stats.json", seconds=seconds)
    except (RemoteError, ConfigError) as error:
        return Sample(time.monotonic(), trouble=str(error).removeprefix(f"'{entry.mountpoint}' "))
    return sample_of(time.monotonic(), content)


def watch(watcher: Watcher, interval: float, *, once: bool, as_json: bool) -> None:
    """Show the mounts until somebody has seen enough, or once, over one interval; without a terminal, once."""
    console = Console() if sys.stdout.isatty() else Console(width=_WIDE)
    first = watcher.look()
    if as_json or once or not console.is_terminal:
        time.sleep(interval)
        lines = watcher.look()
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
            lines = watcher.look()
