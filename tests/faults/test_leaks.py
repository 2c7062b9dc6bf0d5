"""Created and removed names leak no descriptor, inode or memory. Too many open files are an error."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REAL, Place, memory_of, run, wait_until

pytestmark = [pytest.mark.mount, pytest.mark.root]
FILES = 2000
MIB = 1 << 20
# The interpreter keeps the memory of its peak: two whole listings when a busy machine answers late.
PEAK_BYTES = 6 * MIB
_MS_REMOUNT = 32
_libc = ctypes.CDLL(None, use_errno=True)

# Look up every name, open every fourth, list the directory, look up a missing name.
WALK = f"""
import os, sys
os.chdir(sys.argv[1])
for number in range({FILES}):
    os.stat(f"f{{number}}")
    if number % 4 == 0:
        fd = os.open(f"f{{number}}", os.O_RDONLY)
        os.read(fd, 100)
        os.close(fd)
assert len(os.listdir(".")) == {FILES} + 1
try:
    os.stat("missing")
except FileNotFoundError:
    pass
os.close(os.open("new", os.O_CREAT | os.O_WRONLY))
os.rename("new", "newer")
os.unlink("newer")
"""
CHANGES = 6  # lookups of a walk beside those of the files


class Usage:
    """The descriptors, inodes and memory that a guest holds."""

    def __init__(self, place: Place, pid: int) -> None:
        stats = dict(line.split() for line in (place.mountpoint / ".tmemfs" / "stats").read_text().splitlines())
        self.inodes = int(stats["inode_count"])
        self.descriptors = int(stats["inode_descriptors"])
        self.fds = len(os.listdir(f"/proc/{pid}/fd"))
        self.memory = memory_of(pid)

    def __repr__(self) -> str:
        """Return it as text for an error message."""
        return f"{self.inodes} inodes, {self.descriptors} O_PATH, {self.fds} descriptors, {self.memory / MIB:.1f} MiB"

    def is_within(self, warm: Usage) -> bool:
        """Return whether it is at most that of before."""
        things = (self.inodes, self.descriptors, self.fds), (warm.inodes, warm.descriptors, warm.fds)
        return all(now <= before + 2 for now, before in zip(*things, strict=True)) and (
            self.memory < warm.memory + PEAK_BYTES
        )


def assert_no_growth(warm: Usage, place: Place, pid: int) -> None:
    """Wait until the last closes and forgets have arrived and the guest holds no more than when warm."""
    with contextlib.suppress(AssertionError):
        wait_until(lambda: Usage(place, pid).is_within(warm), "nothing is left behind")
    end = Usage(place, pid)
    assert end.is_within(warm), f"{warm} -> {end}"


def make_kernel_forget(mountpoint: Path) -> None:
    """Remount, so that the kernel forgets every unused name of this mount and of no other."""
    nosuid_nodev = 2 | 4
    if _libc.mount(None, os.fsencode(mountpoint), None, ctypes.c_ulong(_MS_REMOUNT | nosuid_nodev), None):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def walk(place: Place, pid: int, times: int) -> Usage:
    """Walk so many times, wait for the forgets of files without pages, and measure."""
    for _ in range(times):
        subprocess.run([sys.executable, "-c", WALK, place.mountpoint], check=True, timeout=120)
        make_kernel_forget(place.mountpoint)
    wait_until(lambda: Usage(place, pid).inodes <= FILES // 4 + 10, "the kernel's forgets have arrived")
    return Usage(place, pid)


@pytest.mark.parametrize("option", ["--writeback", "--watch"])
@pytest.mark.parametrize(
    "lookups",
    [
        30_000,
        pytest.param(
            1_000_000,
            marks=[
                pytest.mark.slow,
                pytest.mark.timeout(3600),
                pytest.mark.skipif("not os.environ.get('SLOW')", reason="takes minutes: set SLOW=1 to run it"),
            ],
        ),
    ],
)
def test_created_and_removed_names_leak_no_memory(place: Place, option: str, lookups: int) -> None:
    for number in range(FILES):
        (place.source / f"f{number}").write_bytes(b"x" * 100)
    (place.source / "d").mkdir()
    process = place.serve("--cache", "1M", "--pool", "1M", option)
    warm = walk(place, process.pid, 4)
    end = walk(place, process.pid, lookups // (2 * FILES + CHANGES))
    print(f"{lookups} lookups {option}: {warm} -> {end}")
    assert_no_growth(warm, place, process.pid)


def test_unlinked_files_and_their_pages_leak_nothing(place: Place) -> None:
    process = place.serve("--cache", "1M", "--pool", "256K", "--writeback")

    def churn(times: int) -> Usage:
        for number in range(times):
            path = place.mountpoint / f"f{number % 7}"
            with path.open("wb") as file:
                file.write(bytes([number & 255]) * 30_000)
                path.unlink()
                file.write(b"after")
        wait_until(lambda: Usage(place, process.pid).inodes <= 1, "the last close and forget have arrived")
        return Usage(place, process.pid)

    warm = churn(300)
    churn(1500)
    assert_no_growth(warm, place, process.pid)


@pytest.mark.parametrize("option", ["--writeback", "--watch", "--throttle=latency=10us"])
def test_too_many_open_files_are_an_error_that_the_mount_survives(place: Place, option: str) -> None:
    """The guest may have 200 descriptors; its callers open more files."""
    for number in range(400):
        (place.source / f"f{number}").write_bytes(b"content")
    limited = ("prlimit", "--nofile=200:200", *REAL)
    process = place.serve("--cache", "1M", "--pool", "1M", option, command=limited)
    root, fds, codes = place.mountpoint, [], set()
    elsewhere = place.source.with_name("elsewhere")
    elsewhere.mkdir()
    for number in range(400):
        if number == 300:  # the mount reads the mount table when it changes
            assert run("mount", "-t", "tmpfs", "none", elsewhere).returncode == 0
            assert run("umount", elsewhere).returncode == 0
        try:
            fds.append(os.open(root / f"f{number}", os.O_RDWR))
        except OSError as error:
            codes.add(error.errno)
    assert codes <= {errno.EMFILE, errno.ENFILE}
    assert codes
    assert len(fds) > 50
    assert "cache_hits" in (root / "stats").read_text()
    for fd in fds:
        assert os.pread(fd, 100, 0) == b"content"
        assert os.pwrite(fd, b"CONTENT", 0) == 7
        os.close(fd)

    def open_files() -> int:
        usage = Usage(place, process.pid)
        return usage.fds - usage.descriptors  # plus a few that the guest always has

    wait_until(lambda: open_files() < 50, "the closes have arrived")
    for number in range(400):
        assert len((root / f"f{number}").read_bytes()) == 7
    (root / "new").write_bytes(b"works")
    assert (place.source / "new").read_bytes() == b"works"
    assert "Traceback" not in place.log_text()
