"""Sizes are right when a file grew underneath, and while its pages are written back."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.mounted import Mounted

pytestmark = pytest.mark.mount
Options = tuple[str, ...]


def grow(path: Path, count: int) -> None:
    with path.open("ab") as file:
        file.write(b"+" * count)


@pytest.mark.parametrize("mapped", [False, True], ids=["read", "mapped"])
def test_a_file_that_grew_underneath_is_read_whole_after_a_reopen(
    mounted: Mounted, writing: Options, mapped: bool
) -> None:
    """fstat, SEEK_END, a whole read and O_APPEND right after the open, while the kernel has old attributes."""
    (mounted.source / "f").write_bytes(b"begin")
    root = mounted.start("--attr-timeout", "60", *writing)
    size = 5
    held = os.open(root / "f", os.O_RDONLY) if mapped else -1  # a file that is open elsewhere may keep its old size
    for count in (1, 4091, 4096, 100_000, 1):
        assert os.stat(root / "f").st_size >= 5  # the kernel caches the attributes
        grow(mounted.source / "f", count)
        size += count
        fd = os.open(root / "f", os.O_RDWR | os.O_APPEND)
        assert os.fstat(fd).st_size == size
        assert os.lseek(fd, 0, os.SEEK_END) == size
        assert len(os.pread(fd, size + 10, 0)) == size
        os.write(fd, b"appended")
        size += 8
        assert os.fstat(fd).st_size == size
        os.close(fd)
        assert (mounted.source / "f").read_bytes() == (root / "f").read_bytes()
        assert (mounted.source / "f").stat().st_size == size
    if held >= 0:
        os.close(held)


@pytest.mark.parametrize("others", ["grow", "shrink"])
def test_o_append_writes_at_the_end_that_others_moved(mounted: Mounted, writing: Options, others: str) -> None:
    """As `echo x >> log` in a shell: open and write, without fstat or seek in between."""
    (mounted.source / "log").write_bytes(b"a" * 5000)
    root = mounted.start("--attr-timeout", "60", *writing)
    want = b"a" * 5000
    for turn in range(20):
        assert (root / "log").read_bytes() == want
        if others == "grow":
            grow(mounted.source / "log", 1 + turn * 700)
            want += b"+" * (1 + turn * 700)
        else:
            os.truncate(mounted.source / "log", len(want) - 100)
            want = want[:-100]
        fd = os.open(root / "log", os.O_WRONLY | os.O_APPEND)
        for data in (b"one", b"two"):
            os.write(fd, data)
            want += data
        os.close(fd)
        assert (mounted.source / "log").read_bytes() == want
        fd = os.open(root / "log", os.O_RDONLY)
        assert os.lseek(fd, 0, os.SEEK_END) == len(want)
        os.close(fd)


def test_a_file_shows_its_new_size_while_it_is_written_back(mounted: Mounted) -> None:
    """Write-back takes several slow steps; between the last page and the final stat no page is dirty."""
    root = mounted.start("--writeback", "--attr-timeout", "0", "--throttle", "latency=30ms")
    fd = os.open(root / "f", os.O_RDWR | os.O_CREAT)
    other = os.open(root / "f", os.O_RDONLY)
    for round_number in range(1, 4):
        os.pwrite(fd, b"x" * 5000, (round_number - 1) * 5000)
        pages_left = [True]
        os.close(os.open(root / "f", os.O_RDONLY))  # the release writes back, after close(2) has returned
        deadline = time.monotonic() + 60
        while pages_left[-1]:
            assert os.fstat(other).st_size == round_number * 5000
            assert os.stat(root / "f").st_size == round_number * 5000
            pages_left.append(mounted.stats()["cache_dirty_bytes"] > 0)
            assert time.monotonic() < deadline
        for _ in range(30):
            assert os.fstat(other).st_size == round_number * 5000
    os.close(fd)
    os.close(other)
