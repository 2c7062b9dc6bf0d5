"""A real mount for a test: small caches, a guest that checks itself, and a watchdog that ends a hang.

A request that hangs keeps its caller in the kernel, where no timeout in Python can reach it. The watchdog kills the
mount's process, which ends the connection, and every caller gets an error.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY, SECONDS, Place, wait_until

CHECKED = (sys.executable, os.fspath(REPOSITORY / "tests" / "fs" / "checkedguest.py"))
SMALL = ("--cache", "1M", "--pool", "8M")
WATCHDOG_SECONDS = 200.0
PROGRAM_SECONDS = 180.0

VARIANTS = {
    "through": (),
    "writeback": ("--writeback",),
    "threads": ("--throttle", "latency=20us"),  # a throttled backing makes every call in a thread
    "nopool": ("--pool", "none"),
}


class Mounted:
    """A mount of `source` on `root`."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.source = place.source
        self.root = place.mountpoint
        self.process: subprocess.Popen[str] | None = None
        self.patience = WATCHDOG_SECONDS
        self._watchdog: threading.Timer | None = None

    def start(self, *options: str) -> Path:
        """Mount with a cache of 1 MiB and these options; return the mountpoint."""
        assert self.process is None
        checked = self.place.log.with_suffix(".checked")
        checked.unlink(missing_ok=True)
        process = self.process = self.place.serve(*SMALL, *options, command=CHECKED)
        self._watchdog = threading.Timer(self.patience, process.kill)
        self._watchdog.daemon = True
        self._watchdog.start()
        return self.root

    def end(self, *, dirty: str = "[]", seconds: float = SECONDS) -> None:
        """Unmount, and assert that the guest was consistent."""
        process, self.process = self.process, None
        if process is None:
            return
        assert process.poll() is None, f"the mount ended by itself: {self.place.log_text()[-4000:]}"
        process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=seconds)
        finally:
            process.kill()
            self.stop_watchdog()
        log = self.place.log_text()
        assert process.returncode == 0, log[-4000:]
        assert self.place.log.with_suffix(".checked").read_text() == f"consistent, dirty {dirty}\n"
        assert "Traceback" not in log, log[-4000:]

    def stop_watchdog(self) -> None:
        """Stop the watchdog."""
        if self._watchdog is not None:
            self._watchdog.cancel()

    def stats(self) -> dict[str, Any]:
        """Return the counters."""
        values: dict[str, Any] = json.loads((self.root / ".tmemfs" / "stats.json").read_bytes())
        return values

    def control(self, name: str, line: str) -> None:
        """Write a line to a control file in one request."""
        fd = os.open(self.root / ".tmemfs" / name, os.O_WRONLY)
        try:
            os.write(fd, os.fsencode(line))
        finally:
            os.close(fd)

    def read_until_kept(self, path: Path, size: int) -> None:
        """Read a file's beginning until its version is settled and an open keeps its pages."""

        def kept() -> bool:
            before = self.stats()["backing_pages"]
            with open(path, "rb", buffering=0) as file:
                file.read(size)
            return bool(self.stats()["backing_pages"] == before)

        wait_until(kept, f"the pages of {path} are kept")

    def log(self) -> str:
        """Return the log of the mount."""
        return self.place.log_text()


@contextmanager
def mounting(place: Place) -> Iterator[Mounted]:
    """Yield a mount to start; it is ended and checked after the block."""
    made = Mounted(place)
    try:
        yield made
        made.end()
    finally:
        made.stop_watchdog()


def needs(*programs: str) -> pytest.MarkDecorator:
    """Skip a test if a program is missing, and name it."""
    missing = [program for program in programs if shutil.which(program) is None]
    return pytest.mark.skipif(bool(missing), reason=f"missing: {', '.join(missing)}")


def same_bytes(mounted: Mounted, name: str) -> None:
    """Assert that a file has the same content through the mount and in the backing."""
    assert (mounted.root / name).read_bytes() == (mounted.source / name).read_bytes()


def shell(script: str, cwd: Path, seconds: float = PROGRAM_SECONDS, **variables: str | Path) -> str:
    """Run a script that must succeed; return its output."""
    environment = {
        **os.environ,
        "LC_ALL": "C",
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_COUNT": "1",  # no background work after a command
        "GIT_CONFIG_KEY_0": "maintenance.auto",
        "GIT_CONFIG_VALUE_0": "false",
        "HOME": os.fspath(cwd.parent),
        "GIT_AUTHOR_NAME": "t",
        "GIT_AUTHOR_EMAIL": "t@example.org",
        "GIT_COMMITTER_NAME": "t",
        "GIT_COMMITTER_EMAIL": "t@example.org",
        **{name: os.fspath(value) for name, value in variables.items()},
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=cwd,
        env=environment,
        check=False,
        capture_output=True,
        timeout=seconds,
        stdin=subprocess.DEVNULL,
    )
    output = done.stdout.decode(errors="surrogateescape")
    assert done.returncode == 0, (
        f"status {done.returncode}\n{output[-3000:]}\n{done.stderr.decode(errors='replace')[-3000:]}"
    )
    return output
