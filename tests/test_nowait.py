"""Non-waiting calls return only what the kernel has in memory, and bring nothing into memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pagebytes import pages_of
from tmemcommon import libc
from tmemfs import nowait
from tmemfs.kernel.mounttable import filesystem_of

SIZE = 64 * 4096


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    """Return a directory with a file, on a filesystem of a disk."""
    if filesystem_of(tmp_path) not in ("ext4", "xfs", "btrfs"):
        pytest.skip("needs a directory on ext4, xfs or btrfs")
    (tmp_path / "file").write_bytes(pages_of(1, 64))
    os.sync()
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        nowait.stat_name(fd, b"file")
        yield fd
    except BlockingIOError:
        pytest.skip("this kernel, or a filter, does not offer openat2")
    finally:
        os.close(fd)


def test_a_name_in_memory_is_found_and_its_link_not_followed(directory: int, tmp_path: Path) -> None:
    assert nowait.stat_name(directory, b"file") == os.stat(tmp_path / "file")
    (tmp_path / "link").symlink_to("file")
    os.lstat(tmp_path / "link")
    assert nowait.stat_name(directory, b"link") == os.lstat(tmp_path / "link")


def test_a_name_that_is_known_to_be_missing_is_missing(directory: int, tmp_path: Path) -> None:
    assert not (tmp_path / "missing").exists()
    assert nowait.stat_name(directory, b"missing") is None


def test_a_name_that_was_never_looked_up_may_wait(directory: int) -> None:
    with pytest.raises(BlockingIOError):
        nowait.stat_name(directory, b"never looked up")


def test_another_filesystem_may_wait() -> None:
    root = os.open("/", os.O_PATH)
    try:
        with pytest.raises(BlockingIOError):
            nowait.stat_name(root, b"proc")
    finally:
        os.close(root)


def test_without_kernel_support_everything_may_wait(
    directory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libc, "_SYS_OPENAT2", 100_000)
    monkeypatch.setattr(libc, "_SYS_CACHESTAT", 100_000)
    with pytest.raises(BlockingIOError):
        nowait.stat_name(directory, b"file")
    with (tmp_path / "file").open("rb") as file, pytest.raises(BlockingIOError):
        nowait.read(file.fileno(), bytearray(4096), 0)


def test_bytes_in_memory_are_read_and_no_other_read_is_started(directory: int, tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        buffer = bytearray(4 * 4096)
        for _ in range(2):  # the first call did not read them
            with pytest.raises(BlockingIOError):
                nowait.read(fd, buffer, 8192)
        os.pread(fd, 6 * 4096, 8192)
        try:
            nowait.read(fd, buffer, 8192 + 100)
        except BlockingIOError:
            pytest.skip("this kernel, or a filter, does not offer cachestat")
        assert buffer == pages_of(1, 64)[8192 + 100 :][: len(buffer)]
        with pytest.raises(BlockingIOError):
            nowait.read(fd, buffer, 40 * 4096)
        with pytest.raises(BlockingIOError):
            nowait.read(fd, buffer, SIZE - 100)
    finally:
        os.close(fd)
