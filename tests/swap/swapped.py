"""A mount that the kernel swaps to. It is swapped off and unmounted whatever happens in the test."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conftest import REAL, Place, run, wait_until
from tests.mounted import Mounted
from tmemfs.kernel.mounttable import top_mount
from tmemfs.lifecycle import loopswap

MIB = 1 << 20
# Half of this and the kernel kills the pager now and then: the loop device's own pages count in the same cgroup.
LIMIT = 16 * MIB
WORKING_SET = 64 * MIB
PAGES = WORKING_SET // 4096
ROUND_SECONDS = 200.0
TOOL_SECONDS = 150.0


class SwappedMount:
    """One mount with an hswap file; `tmemfs swapon` and `swapoff` on it."""

    def __init__(self, place: Place, mounted: Mounted) -> None:
        self.place = place
        self.mounted = mounted
        self.overflow = place.log.with_name("overflow")
        self.file = place.mountpoint / ".tmemfs" / "hswap"

    def start(self, *options: str, swap: bool = True) -> None:
        """Mount, and swap to it."""
        self.mounted.start("--hswap", "128M", "--hswap-overflow", str(self.overflow), *options)
        if swap:
            done = self.command("swapon")
            assert done.returncode == 0, done.stderr
            assert len(loopswap.swap_devices_of(self.file)) == 1

    def command(self, verb: str, *options: str) -> subprocess.CompletedProcess[str]:
        """Run a command of tmemfs on the mount."""
        return run(*REAL, verb, self.place.mountpoint, *options, seconds=TOOL_SECONDS)

    def stats(self) -> dict[str, Any]:
        """Read the counters."""
        return self.mounted.stats()

    def end(self) -> None:
        """Swap off, unmount, and check that nothing is left."""
        if loopswap.loop_devices_of(self.file):
            done = self.command("swapoff")
            assert done.returncode == 0, done.stderr
        self.mounted.end()
        assert not loopswap.loop_devices_of(self.file)
        assert not self.overflow.exists()

    def end_by_signal(self) -> None:
        """End the mount with a signal while it is in use as swap: it must swap off first."""
        self.mounted.end(seconds=ROUND_SECONDS)
        assert not loopswap.loop_devices_of(self.file)

    def clean(self) -> None:
        """Remove swap and loop devices over this mount, even when the mount does not answer any more.

        Aborting its connection makes all reads and writes fail, so that nothing waits for them any more.
        """
        devices = loopswap.loop_devices_of(self.file)  # by the name it has while it is mounted
        for attempt in range(2):
            for device in filter(_is_attached, devices):
                for tool in (("swapoff", str(device)), ("losetup", "--detach", str(device))):
                    process = self.place.start(*tool)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(20)
            if attempt == 0 and any(map(_is_attached, devices)):
                self._abort()
        wait_until(lambda: not any(map(_is_attached, devices)), "the loop device is gone")

    def _abort(self) -> None:
        """Abort the mount's connection through a fusectl that is mounted for this."""
        entry = top_mount(self.place.mountpoint)
        control = self.place.log.with_name("fusectl")
        control.mkdir()
        subprocess.run(["mount", "-t", "fusectl", "none", control], check=True, timeout=20)
        try:
            if entry is not None:
                (control / entry.device.partition(":")[2] / "abort").write_bytes(b"1")
        finally:
            subprocess.run(["umount", "-l", control], check=True, timeout=20)


def _is_attached(device: Path) -> bool:
    return Path(f"/sys/block/{device.name}/loop/backing_file").exists()


def fake_tool(directory: Path, name: str, code: int = 1) -> None:
    """Write a tool that exits with this code."""
    tool = directory / name
    tool.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('{name}: not today' if {code} else 0)\n")
    tool.chmod(0o755)
