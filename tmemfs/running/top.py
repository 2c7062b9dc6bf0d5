"""Look at all mounts of this machine at once: `tmemfs top`.

A mount that hangs hangs whoever touches it, so each is read by a thread of its own for a bounded time; one whose last
reading has not come back yet is not touched again.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import sys
import threading
import time
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.live import Live

from tmemfs.config import ConfigError
from tmemfs.kernel.kernelmount import MountEntry, mount_table
from tmemfs.running.toplines import MAX_BYTES, Line, Sample, line_of, sample_of
from tmemfs.running.topview import view

WAIT_SECONDS = 1.0
_WIDE = 10_000  # columns where the output is no terminal: nothing is shortened


def mounts(only: Collection[Path] = ()) -> list[MountEntry]:
    """Find the tmemfs mounts that can be seen: of those at one place, the uppermost. `only` picks some."""
    uppermost = {entry.mountpoint: entry for entry in mount_table()}
    found = (entry for entry in uppermost.values() if entry.is_tmemfs and (not only or entry.mountpoint in only))
    return sorted(found, key=lambda entry: entry.mountpoint)


class Watcher:
    """Reads the counters of mounts again and again."""

    def __init__(self, only: Collection[Path] = (), control_name: str = ".tmemfs") -> None:
        """Watch all mounts, or some. Raises ConfigError when one of these is none."""
        for missing in set(only) - {entry.mountpoint for entry in mounts(only)}:
            raise ConfigError(f"'{missing}' is not a tmemfs mount: tmemfs top without a path shows those there are")
        self._only = only
        self._control_name = control_name
        self._hanging: dict[str, threading.Thread] = {}  # by the mount's device
        self._before: dict[str, Sample] = {}

    def look(self, seconds: float = WAIT_SECONDS) -> list[Line]:
        """Read all mounts at once, for so many seconds at most, and compare with the last look."""
        found = mounts(self._only)
        samples: dict[str, Sample] = {}
        self._hanging = {device: thread for device, thread in self._hanging.items() if thread.is_alive()}
        started: dict[str, threading.Thread] = {}
        for entry in found:
            if entry.device not in self._hanging:
                started[entry.device] = threading.Thread(target=self._read, args=(entry, samples), daemon=True)
                started[entry.device].start()
        deadline = time.monotonic() + seconds
        for thread in started.values():
            thread.join(max(0.0, deadline - time.monotonic()))
        self._hanging |= {device: thread for device, thread in started.items() if thread.is_alive()}
        silent = Sample(time.monotonic(), trouble="does not answer: it hangs")
        lines = [line_of(entry, self._before.get(entry.device), samples.get(entry.device, silent)) for entry in found]
        self._before = dict(samples)
        return lines

    def _read(self, entry: MountEntry, samples: dict[str, Sample]) -> None:
        try:
            content = _content(Path(entry.mountpoint) / self._control_name / "stats.json")
        except FileNotFoundError:
            sample = Sample(time.monotonic(), trouble="has another --control-name")
        except OSError as error:
            sample = Sample(time.monotonic(), trouble=f"cannot be asked: {error.strerror}")
        else:
            sample = sample_of(time.monotonic(), content)
        samples[entry.device] = sample


def _content(path: Path) -> bytes:
    """Read a file that may be anything of anybody's, as far as counters go."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY)
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(0, "its counters are no file")
        return file.read(MAX_BYTES)


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
