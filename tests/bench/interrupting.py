"""Interrupt a measure while it has something mounted."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from bench.tools.children import environment
from bench.tools.harness import mounts_under
from tests.conftest import SECONDS, wait_until
from tmemfs.kernel.kernelmount import unmount


def interrupt(command: Sequence[str], space: Path, number: signal.Signals) -> None:
    """Send a command a signal once it has mounted below `space`; assert that it ends with 130 and leaves nothing."""
    child = subprocess.Popen(
        ["env", "--default-signal=INT", *command],  # a run in the background ignores SIGINT, and so would its children
        env=environment() | {"TMPDIR": str(space)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: mounts_under(space) or child.poll() is not None, "something is mounted")
        assert mounts_under(space)
        child.send_signal(number)
        assert child.wait(SECONDS) == 130
        assert mounts_under(space) == []
        assert list(space.iterdir()) == []
    finally:
        child.kill()
        child.wait()
        for mountpoint in mounts_under(space):
            unmount(mountpoint, lazy=True)
