"""Swap to a mount's hswap file: losetup, mkswap and swapon, and the way back.

We run the tools of util-linux and never call swapoff(2) ourselves: the kernel marks its caller as the first process to
kill when memory runs out, and that must not be the process that serves the pages. The loop device detaches itself with
its last user, so a swapoff by hand leaves nothing behind.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

from tmemcommon.commandline import CommandError

_TOOLS = ("losetup", "mkswap", "swapon", "swapoff")
_TOOL_SECONDS = 60.0
_DETACH_SECONDS = 10.0
_BLOCK_DEVICES = Path("/sys/block")
_SWAPS = Path("/proc/swaps")


class SwapError(CommandError):
    """One of the tools failed; the message is one line with the remedy."""


def loop_devices_of(file: Path) -> list[Path]:
    """Return the loop devices over a file. The kernel's names are compared, so a mount that hangs is not touched."""
    found = []
    for entry in sorted(_BLOCK_DEVICES.glob("loop*/loop/backing_file")):
        try:
            name = entry.read_bytes().rstrip(b"\n")
        except OSError:
            continue  # detached meanwhile
        if name == os.fsencode(file):
            found.append(Path("/dev") / entry.parts[3])
    return found


def swap_devices_of(file: Path) -> list[Path]:
    """Return the loop devices over a file that are in use as swap."""
    devices = loop_devices_of(file)
    if not devices:
        return []
    active = {line.split()[0] for line in _SWAPS.read_bytes().splitlines()[1:]}
    return [device for device in devices if os.fsencode(device) in active]


def obstacle() -> str | None:
    """Return why this machine cannot swap to a file of a mount, with the remedy; None if it can."""
    if os.geteuid() != 0:
        return "swapping needs root: use sudo"
    for tool in _TOOLS:
        if shutil.which(tool) is None:
            return f"{tool} is missing: install the packages mount and util-linux"
    if not Path("/dev/loop-control").exists():
        return "/dev/loop-control is missing: load the module (modprobe loop) or give the container loop devices"
    if not _SWAPS.exists():
        return f"{_SWAPS} is missing: use a kernel that supports swap"
    return None


def swap_on(file: Path) -> Path:
    """Set up a loop device over the file and swap to it; return the device. After a SwapError nothing is left."""
    if swap_devices_of(file):
        raise SwapError(f"'{file}' is in use as swap already: see swapon --show")
    device = Path(_run("losetup", "--find", "--show", "--direct-io=on", os.fspath(file)).strip())
    try:
        _run("mkswap", os.fspath(device))
        _run("swapon", os.fspath(device))
    finally:
        # While it is swapped to, this only marks the device: the kernel detaches it after swapoff.
        _run("losetup", "--detach", os.fspath(device))
    return device


def swap_off(file: Path) -> bool:
    """End swapping to the file and wait until its loop devices are detached; return False if there was no swap on it.

    Takes as long as the kernel needs to read every page back. Raises SwapError, with swap still on, when it cannot.
    """
    devices = swap_devices_of(file)
    for device in devices:
        _run("swapoff", os.fspath(device), seconds=None)
    deadline = time.monotonic() + _DETACH_SECONDS
    while left := [device for device in loop_devices_of(file) if device in devices]:
        if time.monotonic() > deadline:
            raise SwapError(f"{left[0]} is still attached after swapoff: detach it with losetup -d {left[0]}")
        time.sleep(0.02)
    return bool(devices)


def _run(*command: str, seconds: float | None = _TOOL_SECONDS) -> str:
    """Run a tool and return its output. Raises SwapError with the last line of its errors."""
    try:
        done = subprocess.run(
            command,
            check=False,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=seconds,
            env={**os.environ, "LC_ALL": "C"},
        )
    except FileNotFoundError:
        raise SwapError(f"{command[0]} is missing: install the packages mount and util-linux") from None
    except subprocess.TimeoutExpired:
        raise SwapError(f"{' '.join(command)} hangs after {seconds:.0f} s: check whether the mount answers") from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise SwapError(f"{lines[-1]} (of {' '.join(command)})")
    return done.stdout
