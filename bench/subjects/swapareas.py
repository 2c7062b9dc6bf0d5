"""Swap to one of: a mount's hswap file, zram, a file on a slow mount, a null filesystem."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.tools.children import BenchError, run, undisturbed
from bench.tools.harness import served, tmemfs
from tmemfs.lifecycle import loopswap

MIB = 1 << 20
_ZRAM = Path("/sys/class/zram-control")
_SECONDS = 120.0

Area = Callable[[Path, int], contextlib.AbstractContextManager[None]]


def lacks() -> str | None:
    """Return why nothing can be measured here; None if it can."""
    lacking = loopswap.obstacle()
    if lacking is None and len(Path("/proc/swaps").read_text().splitlines()) > 1:
        return "other swap is on, and pages would go there: swapoff -a"
    return lacking


@contextlib.contextmanager
def _swapped_to(file: Path) -> Iterator[None]:
    """Swap to a file through a loop device."""
    try:
        loopswap.swap_on(file)
        try:
            yield
        finally:
            with undisturbed():
                loopswap.swap_off(file)
    except loopswap.SwapError as error:
        raise BenchError(str(error)) from error


@contextlib.contextmanager
def hswap(space: Path, size: int) -> Iterator[None]:
    """Swap to a mount's hswap file whose pool holds everything."""
    (space / "empty").mkdir(exist_ok=True)
    options = "--hswap", str(size), "--hswap-overflow", os.fspath(space / "overflow")
    mountpoint = space / "hswap"
    with tmemfs(space / "empty", mountpoint, *options, cache=MIB, pool=size) as mount:
        with _swapped_to(mountpoint / ".tmemfs" / "hswap"):
            yield
            before = mount.stats()
        if before["hswap_rejected_puts"] or not before["hswap_puts"]:
            raise BenchError("the pool did not hold what was swapped: this measures something else")


@contextlib.contextmanager
def null(space: Path, size: int) -> Iterator[None]:
    """Swap to a null filesystem."""
    mountpoint = space / "null"
    command: list[str | Path] = [sys.executable, "-m", "bench.subjects.nullfs", mountpoint, "--swap", str(size)]
    with served(command, mountpoint), _swapped_to(mountpoint / "swap"):
        yield


@contextlib.contextmanager
def slow(space: Path, size: int) -> Iterator[None]:
    """Swap to a file of a directory that takes 5 ms a request, through a mount with the smallest pool.

    The mount has an hswap file of the smallest size, because only then does it lock its memory.
    """
    source, mountpoint = space / "slow", space / "slowmount"
    source.mkdir(exist_ok=True)
    with open(source / "swap", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    options = "--throttle", "latency=5ms", "--hswap", "64K", "--hswap-overflow", os.fspath(space / "overflow")
    with tmemfs(source, mountpoint, *options, cache=MIB, pool=64 << 10), _swapped_to(mountpoint / "swap"):
        yield


@contextlib.contextmanager
def zram(space: Path, size: int) -> Iterator[None]:
    """Swap to a zram device that compresses with lz4."""
    if not (_ZRAM / "hot_add").exists():
        raise BenchError("there is no zram here: load the module (modprobe zram)")
    number = (_ZRAM / "hot_add").read_text().strip()
    device, settings = Path(f"/dev/zram{number}"), Path(f"/sys/block/zram{number}")
    try:
        (settings / "comp_algorithm").write_text("lz4")
        (settings / "disksize").write_text(str(size))
        run(["mkswap", device], seconds=_SECONDS)
        run(["swapon", device], seconds=_SECONDS)
        try:
            yield
        finally:
            with undisturbed():
                run(["swapoff", device], seconds=_SECONDS)
    finally:
        with undisturbed():
            (settings / "reset").write_text("1")
            (_ZRAM / "hot_remove").write_text(number)
