"""Fixtures: mounts that are removed at teardown in any case.

A FUSE mount that hangs blocks every process that touches it. So every wait here is bounded, a mount is only used from
processes that can be killed, and the teardown detaches it and kills by pid.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tmemfs.kernel.kernelmount import unmount
from tmemfs.kernel.mounttable import top_mount

REPOSITORY = Path(__file__).parents[1]
TINY = (sys.executable, os.fspath(REPOSITORY / "tests" / "lifecycle" / "tinyguest.py"))
REAL = (sys.executable, "-m", "tmemfs")
SECONDS = 60.0

# The same examples every time, independent of the machine's load.
settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

_TOUCHED_MARKS = {
    "mount": (os.path.exists("/dev/fuse"), "/dev/fuse is missing"),
    "root": (os.geteuid() == 0, "needs root"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that this machine cannot run, with the reason."""
    for item in items:
        for mark, (there, reason) in _TOUCHED_MARKS.items():
            if item.get_closest_marker(mark) is not None and not there:
                item.add_marker(pytest.mark.skip(reason=reason))


def environment(**extra: str) -> dict[str, str]:
    """Return the environment for a child that runs the code of this checkout."""
    paths = os.pathsep.join((os.fspath(REPOSITORY), os.fspath(REPOSITORY / "backend")))
    return {**os.environ, "PYTHONPATH": paths, **extra}


def run(*command: str | Path, seconds: float = SECONDS) -> subprocess.CompletedProcess[str]:
    """Run a command for a bounded time and capture its output."""
    return subprocess.run(
        [os.fspath(word) for word in command],
        env=environment(),
        check=False,
        capture_output=True,
        text=True,
        timeout=seconds,
        stdin=subprocess.DEVNULL,
    )


def wait_until(condition: Callable[[], object], what: str, seconds: float = SECONDS) -> None:
    """Wait for an effect of another process; `what` names it in the error."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def state_of(pid: int) -> str:
    """Return the letter of a process's state; Z for one that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


def has_ended(pid: int) -> bool:
    """Return whether a process has ended, even if its parent has not waited for it."""
    return state_of(pid) == "Z"


def memory_of(pid: int | str = "self") -> int:
    """Return the anonymous and shared memory of a process in bytes, without pages of files."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return sum(int(fields[name].split()[0]) << 10 for name in ("RssAnon", "RssShmem"))


class Place:
    """A source directory, a mountpoint, and the mounts and processes of a test."""

    def __init__(self, directory: Path) -> None:
        self.source = directory / "source"
        self.mountpoint = directory / "mnt"
        self.log = directory / "log"
        self.source.mkdir()
        self.mountpoint.mkdir()
        self._processes: list[subprocess.Popen[str]] = []
        self._pids: set[int] = set()

    def mount(
        self, *options: str, command: tuple[str, ...] = REAL, mountpoint: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Mount in the background."""
        at = mountpoint or self.mountpoint
        done = run(*command, "mount", self.source, at, "--log", self.log, *options)
        if done.returncode == 0:
            self._pids.add(self.logged_pid())
        return done

    def serve(
        self, *options: str, command: tuple[str, ...] = REAL, mountpoint: Path | None = None
    ) -> subprocess.Popen[str]:
        """Mount in the foreground and wait until it works."""
        at = mountpoint or self.mountpoint
        words = [*command, "mount", os.fspath(self.source), os.fspath(at), "-f", "--log", os.fspath(self.log)]
        before = self.log_text().count("shared mmap o")
        process = self.start(*words, *options)
        wait_until(lambda: self._works(process, before), "the mount works")
        return process

    def _works(self, process: subprocess.Popen[str], before: int) -> bool:
        """Return whether the log reports one more working mount."""
        assert process.poll() is None, process.communicate()
        return self.log_text().count("shared mmap o") > before

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Start a process that is killed at teardown."""
        process = subprocess.Popen(
            command,
            env=environment(),
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.adopt(process)
        return process

    def adopt(self, process: subprocess.Popen[str]) -> None:
        """Kill this process at teardown."""
        self._processes.append(process)

    def python(self, code: str) -> subprocess.CompletedProcess[str]:
        """Run Python in the mount, in a process that may hang."""
        return run(sys.executable, "-P", "-c", f"import os\nos.chdir({os.fspath(self.mountpoint)!r})\n{code}")

    def log_text(self) -> str:
        """Return the text of the log."""
        return self.log.read_text() if self.log.exists() else ""

    def logged_pid(self) -> int:
        """Return the pid that the last mount logged."""
        return int(self.log_text().rpartition(", pid ")[2].partition(",")[0])

    def is_mounted(self, mountpoint: Path | None = None) -> bool:
        """Return whether something is mounted on the mountpoint."""
        return top_mount(mountpoint or self.mountpoint) is not None

    def clean(self) -> None:
        """Unmount and kill everything.

        A process that waits for a mount can be killed only after the mount's process is gone, so all are killed before
        any is waited for. No FUSE connection is aborted: its number may belong to another test's mount by now.
        """
        for at in (self.mountpoint, self.source):
            while top_mount(at) is not None:
                unmount(at, lazy=True)
        for pid in self._pids:
            self._kill(pid)
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.communicate(timeout=SECONDS)

    def _kill(self, pid: int) -> None:
        """Kill a background mount if the pid is still its own."""
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if os.fsencode(self.source) in words:
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """Yield a source and a mountpoint; mounts are removed at teardown."""
    made = Place(tmp_path)
    try:
        yield made
    finally:
        made.clean()
