"""Swap to one of: a mount's hswap file, zram, a file on a slow mount, a null filesystem."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.tools.children import BenchError, run, undisturbed
from bench.tools.content import MIB
from bench.tools.harness import served, tmemfs
from bench.tools.zram import zram_device
from tmemfs.lifecycle import loopswap

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
            raise BenchError(
                "the pool did not hold all swapped pages, so the figures would be those of the overflow file"
            )


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
    with zram_device(size) as number:
        run(["mkswap", f"/dev/zram{number}"], seconds=_SECONDS)
        run(["swapon", f"/dev/zram{number}"], seconds=_SECONDS)
        try:
            yield
        finally:
            with undisturbed():
                run(["swapoff", f"/dev/zram{number}"], seconds=_SECONDS)
