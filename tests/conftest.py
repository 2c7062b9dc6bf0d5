"""Fixtures: mounts that are always taken away again.

A FUSE mount that hangs hangs whatever touches it. So every wait here is bounded, whatever looks into a mount
does so in a process that can be killed, and the teardown detaches and kills by pid.
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
TINY = (sys.executable, "-P", os.fspath(REPOSITORY / "tests" / "tinyguest.py"))
REAL = (sys.executable, "-m", "tmemfs")
SECONDS = 60.0

# The same examples every time, however busy the machine is.
settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

_TOUCHED_MARKS = {
    "mount": (os.path.exists("/dev/fuse"), "/dev/fuse is missing"),
    "root": (os.geteuid() == 0, "needs root"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot do, and say what was missing."""
    for item in items:
        for mark, (there, reason) in _TOUCHED_MARKS.items():
            if item.get_closest_marker(mark) is not None and not there:
                item.add_marker(pytest.mark.skip(reason=reason))


def environment(**extra: str) -> dict[str, str]:
    """Build the environment for a child that runs the code of this checkout."""
    paths = os.pathsep.join((os.fspath(REPOSITORY), os.fspath(REPOSITORY / "backend")))
    return {**os.environ, "PYTHONPATH": paths, **extra}


def run(*command: str | Path, seconds: float = SECONDS) -> subprocess.CompletedProcess[str]:
    """Run a command for a bounded time and keep what it prints."""
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
    """Wait for something that another process does."""
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
    """Tell whether a process has ended, waited for by its parent or not."""
    return state_of(pid) == "Z"


def memory_of(pid: int | str = "self") -> int:
    """Return the bytes of memory that a process has made its own: not its files' pages, which come and go."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return sum(int(fields[name].split()[0]) << 10 for name in ("RssAnon", "RssShmem"))


class Place:
    """Be a source directory, a mountpoint, and the mounts and processes that a test makes with them."""

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
        """Tell whether the log says that one more mount works."""
        assert process.poll() is None, process.communicate()
        return self.log_text().count("shared mmap o") > before

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Start a process that the teardown kills."""
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
        """Have the teardown kill a process."""
        self._processes.append(process)

    def python(self, code: str) -> subprocess.CompletedProcess[str]:
        """Run Python in the mount, in a process that may hang."""
        return run(sys.executable, "-P", "-c", f"import os\nos.chdir({os.fspath(self.mountpoint)!r})\n{code}")

    def log_text(self) -> str:
        """Read the log."""
        return self.log.read_text() if self.log.exists() else ""

    def logged_pid(self) -> int:
        """Find the pid that the last mount logged."""
        return int(self.log_text().rpartition(", pid ")[2].partition(",")[0])

    def is_mounted(self, mountpoint: Path | None = None) -> bool:
        """Tell whether the mountpoint shows a mount."""
        return top_mount(mountpoint or self.mountpoint) is not None

    def clean(self) -> None:
        """Take everything away, whatever state it is in.

        Who waits for a mount can be killed only once that mount's process is gone, so all are killed before any is
        waited for. (Not aborted: the number of a connection that has ended may be another test's by now.)
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
        """Kill a mount in the background, if it is still ours."""
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if os.fsencode(self.source) in words:
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """Give a test two directories and take its mounts away."""
    made = Place(tmp_path)
    try:
        yield made
    finally:
        made.clean()
