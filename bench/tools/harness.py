"""Mount and start tmemd for a measure; unmount and end them afterwards in every case."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.tools.children import BenchError, end, start, undisturbed
from tmemfs.kernel.mounttable import mount_table, top_mount

MOUNT_SECONDS = 30.0
TMEMD = "tmem.lending.daemon.tmemd"
_MAX_LOG = 800  # characters of a child's log in a message
_ROOMY = 2 << 30  # bytes free in /dev/shm for fast_workspace


@dataclass(frozen=True, slots=True)
class Mounted:
    """A mount that is served by a child process."""

    path: Path
    pid: int

    def stats(self) -> dict[str, float]:
        """Return the counters and gauges of this moment that are numbers."""
        values = json.loads((self.path / ".tmemfs/stats.json").read_bytes())
        return {name: value for name, value in values.items() if isinstance(value, int | float)}

    def control(self, name: str, text: str) -> None:
        """Write a line into a control file."""
        with open(self.path / ".tmemfs" / name, "w") as file:
            file.write(text + "\n")

    def since(self, before: dict[str, float], *names: str) -> dict[str, int]:
        """Return how far some counters have grown."""
        now = self.stats()
        return {name: int(now[name] - before[name]) for name in names}


def fast_workspace() -> contextlib.AbstractContextManager[Path]:
    """Return a temporary directory in memory if it has room, so that disk speed does not matter."""
    memory = Path("/dev/shm")
    roomy = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > _ROOMY
    return workspace(memory if roomy else None)


@contextlib.contextmanager
def workspace(where: Path | None = None) -> Iterator[Path]:
    """Yield a temporary directory; remove it at the end."""
    space = tempfile.mkdtemp(prefix="tmemfs-bench-", dir=where)
    try:
        yield Path(space).resolve()
    finally:
        with undisturbed():
            shutil.rmtree(space, ignore_errors=True)


@contextlib.contextmanager
def served(command: Sequence[str | Path], mountpoint: Path) -> Iterator[Mounted]:
    """Start a process that serves `mountpoint` in the foreground; end and unmount it afterwards."""
    mountpoint.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile() as log:
        child = start(command, stdout=log, stderr=log)
        try:
            _wait_until_mounted(child, mountpoint, log.fileno())
            yield Mounted(mountpoint, child.pid)
        finally:
            with undisturbed():
                end(child)
                if is_mounted(mountpoint):
                    _detach(mountpoint)


def tmemfs(
    source: Path, mountpoint: Path, *options: str, cache: int, pool: int
) -> contextlib.AbstractContextManager[Mounted]:
    """Mount tmemfs; `cache` and `pool` are bytes, a pool of 0 is none."""
    words: list[str | Path] = [sys.executable, "-m", "tmemfs", "mount", source, mountpoint, "-f"]
    words += ["--cache", str(cache), "--pool", str(pool or "none"), *options]
    return served(words, mountpoint)


def nullfs(
    mountpoint: Path, size: int, names: int = 0, *, eager: bool = False
) -> contextlib.AbstractContextManager[Mounted]:
    """Mount the null filesystem with files of `size` bytes and `names` empty ones; `eager` as tmemfs reads requests."""
    command: list[str | Path] = [sys.executable, "-m", "bench.subjects.nullfs", mountpoint]
    command += ["--size", str(size), "--names", str(names)]
    return served([*command, "--eager"] if eager else command, mountpoint)


@dataclass(frozen=True, slots=True)
class Lending:
    """A tmemd that lends, in a child process."""

    socket: Path
    pid: int


@contextlib.contextmanager
def tmemd(directory: Path, size: int, *options: str, module: str = TMEMD) -> Iterator[Lending]:
    """Start a tmemd that lends `size` bytes on a socket in `directory`; end it afterwards.

    `module` is what runs: tmemd, or a launcher of it.
    """
    path = directory / "tmemd.sock"
    words: list[str | Path] = [sys.executable, "-m", module, "--size", str(size), "--socket", path]
    with tempfile.TemporaryFile() as log:
        child = start([*words, *options], stdout=log, stderr=log)
        try:
            limit = time.monotonic() + MOUNT_SECONDS
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                while probe.connect_ex(os.fspath(path)) != 0:
                    if child.poll() is not None or time.monotonic() > limit:
                        raise BenchError(f"tmemd did not come up: {_log_end(log.fileno())}")
                    time.sleep(0.02)
            yield Lending(path, child.pid)
        finally:
            with undisturbed():
                end(child)


def is_mounted(mountpoint: Path) -> bool:
    """Return whether a FUSE filesystem is mounted, without a request to it."""
    entry = top_mount(mountpoint.parent.resolve() / mountpoint.name)
    return entry is not None and entry.fstype.startswith("fuse")


def mounts_under(directory: Path) -> list[Path]:
    """List what is mounted in a directory."""
    return [entry.mountpoint for entry in mount_table() if entry.mountpoint.is_relative_to(directory)]


def _wait_until_mounted(child: subprocess.Popen[bytes], mountpoint: Path, log: int) -> None:
    limit = time.monotonic() + MOUNT_SECONDS
    while time.monotonic() < limit:
        if child.poll() is not None:
            break
        # A mount is not served before its handshake, so its root is asked as well.
        if is_mounted(mountpoint) and _answers(mountpoint):
            return
        time.sleep(0.02)
    raise BenchError(f"the mount on {mountpoint.name} did not come up: {_log_end(log)}")


def _log_end(log: int) -> str:
    """Return the end of a child's log."""
    return os.pread(log, 1 << 20, 0).decode(errors="replace").strip()[-_MAX_LOG:] or "it wrote no message"


def _answers(mountpoint: Path) -> bool:
    """Return whether a `stat` of the root succeeds; in a child, because it may hang."""
    probe = start(["stat", mountpoint])
    try:
        return probe.wait(5.0) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        end(probe, patience=0.1)


def _detach(mountpoint: Path) -> None:
    """Unmount lazily what its process left mounted."""
    command = ["umount", "-l"] if os.geteuid() == 0 else ["fusermount3", "-uz"]
    helper = start([*command, mountpoint])
    with contextlib.suppress(subprocess.TimeoutExpired):
        helper.wait(10.0)
    end(helper, patience=0.1)
