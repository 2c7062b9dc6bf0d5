"""Swap to a mount's hswap file: a loop device over it, mkswap, swapon; and all of that back.

Done with the tools of util-linux, from outside the guest: the kernel counts whoever calls swapoff(2) as the first to be
killed when memory runs out, and that must never be the process that serves the pages. The loop device is set to go away
with its last user, so a swapoff by hand leaves nothing behind.
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
_GONE_SECONDS = 10.0
_LOOPS = Path("/sys/block")
_SWAPS = Path("/proc/swaps")


class SwapError(CommandError):
    """A step that failed, in one line with what helps."""


def loops_of(file: Path) -> list[Path]:
    """Find the loop devices over a file, by the name that the kernel knows it under; the file is not touched."""
    found = []
    for entry in sorted(_LOOPS.glob("loop*/loop/backing_file")):
        try:
            name = entry.read_bytes().rstrip(b"\n")
        except OSError:
            continue  # detached meanwhile
        if name == os.fsencode(file):
            found.append(Path("/dev") / entry.parts[3])
    return found


def swaps_of(file: Path) -> list[Path]:
    """Find the loop devices over a file that are swapped to."""
    loops = loops_of(file)
    if not loops:
        return []
    active = {line.split()[0] for line in _SWAPS.read_bytes().splitlines()[1:]}
    return [device for device in loops if os.fsencode(device) in active]


def missing() -> str | None:
    """Say what this machine lacks to swap to a file of a mount; None if it lacks nothing."""
    if os.geteuid() != 0:
        return "swapping needs root: use sudo"
    for tool in _TOOLS:
        if shutil.which(tool) is None:
            return f"{tool} is missing: install the packages mount and util-linux"
    if not Path("/dev/loop-control").exists():
        return "/dev/loop-control is missing: load the module (modprobe loop) or give the container loop devices"
    if not _SWAPS.exists():
        return f"{_SWAPS} is missing: this kernel does not swap"
    return None


def swap_on(file: Path) -> Path:
    """Set up a loop device over the file and swap to it; give the device. SwapError leaves nothing behind."""
    if swaps_of(file):
        raise SwapError(f"'{file}' is swapped to already: see swapon --show")
    device = Path(_run("losetup", "--find", "--show", "--direct-io=on", os.fspath(file)).strip())
    try:
        _run("mkswap", os.fspath(device))
        _run("swapon", os.fspath(device))
    finally:
        # While it is swapped to, this only marks it: it goes away with swapoff.
        _run("losetup", "--detach", os.fspath(device))
    return device


def swap_off(file: Path) -> bool:
    """Take all pages back into memory and the loop devices away; False when there was no swap on the file.

    Takes as long as the kernel needs to bring everything back. SwapError, with swap still on, when it cannot.
    """
    devices = swaps_of(file)
    for device in devices:
        _run("swapoff", os.fspath(device), seconds=None)
    deadline = time.monotonic() + _GONE_SECONDS
    while left := [device for device in loops_of(file) if device in devices]:
        if time.monotonic() > deadline:
            raise SwapError(f"{left[0]} is still attached after swapoff: detach it with losetup -d {left[0]}")
        time.sleep(0.02)
    return bool(devices)


def _run(*command: str, seconds: float | None = _TOOL_SECONDS) -> str:
    """Run a tool and return what it prints; SwapError with its last words."""
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
        raise SwapError(f"{' '.join(command)} does not end: does the mount answer?") from None
    if done.returncode != 0:
        words = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise SwapError(f"{words[-1]} (of {' '.join(command)})")
    return done.stdout
