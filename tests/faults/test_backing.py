"""A backing that is full, read-only, gone or back again: callers get its errno, no byte is lost or invented."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.calls import code_of, sync
from tests.conftest import SECONDS, run, wait_until
from tests.faults.conftest import Opened
from tests.mounted import Mounted
from tests.pagebytes import pages_of
from tmemfs.kernel.kernelmount import unmount
from tmemfs.kernel.mounttable import top_mount

pytestmark = [pytest.mark.mount, pytest.mark.root]
Options = tuple[str, ...]
MIB = 1 << 20
CHUNK = 64 << 10


@pytest.fixture(params=["tmpfs", "ext4"])
def small(request: pytest.FixtureRequest, mounted: Mounted, opened: Opened, tmp_path: Path) -> Iterator[Mounted]:
    """Mount a filesystem of a few MiB on the source."""
    if request.param == "tmpfs":
        words = ["mount", "-t", "tmpfs", "-o", "size=6M", "tmpfs", os.fspath(mounted.source)]
    else:
        image = tmp_path / "image"
        with image.open("wb") as file:
            file.truncate(12 * MIB)
        if shutil.which("mkfs.ext4") is None:
            pytest.skip("mkfs.ext4 is missing")
        subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True, timeout=SECONDS)
        words = ["mount", "-o", "loop", os.fspath(image), os.fspath(mounted.source)]
    done = run(*words)
    if done.returncode:
        pytest.skip(f"no {request.param} to be had: {done.stderr.strip()}")
    try:
        yield mounted
        opened.close()
        mounted.end()
    finally:
        if mounted.process is not None:
            mounted.process.kill()
            mounted.process.communicate(timeout=SECONDS)
        while top_mount(mounted.root) is not None:
            unmount(mounted.root, lazy=True)
        while top_mount(mounted.source) is not None:
            unmount(mounted.source, lazy=True)


def fill(fd: int, *, synced: bool) -> tuple[int, str]:
    """Append chunks until an error; return how many were acknowledged, and the error."""
    safe = 0
    try:
        for number in range(1000):
            data = pages_of(number, CHUNK // 4096)
            done = 0
            while done < CHUNK:
                done += os.pwrite(fd, data[done:], number * CHUNK + done)
            if synced:
                os.fsync(fd)
            safe = number + 1
    except OSError as error:
        return safe, errno.errorcode[error.errno or 0]
    return safe, "none"


def remount(directory: Path, how: str) -> None:
    done = run("mount", "-o", f"remount,{how}", directory)
    assert done.returncode == 0, done.stderr


def remove_ballast(small: Mounted) -> None:
    """Free space. The guest holds a file until the kernel forgets it, a moment after the unlink."""
    os.unlink(small.root / "ballast")

    def has_room() -> bool:
        space = os.statvfs(small.source)
        return space.f_bavail * space.f_frsize >= MIB

    wait_until(has_room, "the backing has room again")


def safe_chunks(path: Path, count: int) -> bool:
    content = path.read_bytes()
    wanted = (pages_of(number, CHUNK // 4096) for number in range(count))
    return all(content[number * CHUNK :][:CHUNK] == chunk for number, chunk in enumerate(wanted))


def test_a_full_backing_fails_the_write_and_keeps_earlier_bytes(
    small: Mounted, writing: Options, opened: Opened
) -> None:
    """A write counts once it is acknowledged (write-through) or fsynced (write-back)."""
    (small.source / "ballast").write_bytes(os.urandom(2 * MIB))
    (small.source / "other").write_bytes(b"other" * 2000)
    root = small.start(*writing)
    fd = opened(root / "f")
    safe, code = fill(fd, synced=bool(writing))
    assert (code, safe > 10) == ("ENOSPC", True)
    assert safe_chunks(small.source / "f", safe)
    assert safe_chunks(root / "f", safe)
    assert (root / "other").read_bytes() == b"other" * 2000
    free = os.statvfs(root)
    assert free.f_bavail * free.f_frsize < CHUNK
    remove_ballast(small)
    for number in range(safe, safe + 4):
        os.pwrite(fd, pages_of(number, CHUNK // 4096), number * CHUNK)
    sync(fd)
    assert safe_chunks(small.source / "f", safe + 4)
    assert safe_chunks(root / "f", safe + 4)


def test_writeback_reports_enospc_and_writes_once_there_is_space(small: Mounted, opened: Opened) -> None:
    """Writes that were only acknowledged are not lost while the mount lives: write-back retries them."""
    (small.source / "ballast").write_bytes(os.urandom(2 * MIB))
    root = small.start("--writeback", "--cache", "64M")
    space = os.statvfs(small.source)
    chunks = space.f_bfree * space.f_frsize // CHUNK + 4  # a little more than fits
    fd = opened(root / "f")
    for number in range(chunks):
        os.pwrite(fd, pages_of(number, CHUNK // 4096), number * CHUNK)
    assert code_of(lambda: os.fsync(fd)) == "ENOSPC"
    assert safe_chunks(root / "f", chunks)
    remove_ballast(small)
    sync(fd)
    assert safe_chunks(small.source / "f", chunks)


def test_space_freed_by_a_truncate_can_be_written_again(small: Mounted, writing: Options, opened: Opened) -> None:
    root = small.start(*writing)
    fd = opened(root / "f")
    assert fill(fd, synced=False)[1] == "ENOSPC" or code_of(lambda: os.fsync(fd)) == "ENOSPC"
    os.ftruncate(fd, 0)
    sync(fd)
    (root / "g").write_bytes(b"fits")
    assert (small.source / "g").read_bytes() == b"fits"


def test_a_read_only_backing_refuses_changes_and_is_read(small: Mounted, writing: Options) -> None:
    (small.source / "f").write_bytes(b"content" * 1000)
    remount(small.source, "ro")
    root = small.start(*writing)
    for call in (
        lambda: os.open(root / "f", os.O_RDWR),
        lambda: os.open(root / "f", os.O_WRONLY | os.O_TRUNC),
        lambda: os.open(root / "new", os.O_CREAT | os.O_WRONLY),
        lambda: os.truncate(root / "f", 1),
        lambda: os.mkdir(root / "d"),
        lambda: os.unlink(root / "f"),
        lambda: os.rename(root / "f", root / "g"),
        lambda: os.link(root / "f", root / "g"),
        lambda: os.symlink("f", root / "g"),
        lambda: os.chmod(root / "f", 0o600),
        lambda: os.utime(root / "f"),
        lambda: os.setxattr(root / "f", "user.a", b"b"),
    ):
        assert code_of(call) == "EROFS"
    assert (root / "f").read_bytes() == b"content" * 1000
    assert os.listdir(root) == os.listdir(small.source)
    remount(small.source, "rw")
    (root / "f").write_bytes(b"again")
    assert (small.source / "f").read_bytes() == b"again"


def test_a_writer_gets_the_error_of_a_backing_that_became_read_only(small: Mounted) -> None:
    (small.source / "f").write_bytes(b"content")
    root = small.start()
    assert (root / "f").read_bytes() == b"content"
    remount(small.source, "ro")
    assert code_of(lambda: (root / "f").write_bytes(b"other")) == "EROFS"
    assert (root / "f").read_bytes() == b"content"
    remount(small.source, "rw")
    (root / "f").write_bytes(b"other")
    assert (root / "f").read_bytes() == b"other"


def test_a_mount_with_ro_refuses_changes(mounted: Mounted) -> None:
    (mounted.source / "f").write_bytes(b"content")
    root = mounted.start("-o", "ro")
    assert code_of(lambda: (root / "f").write_bytes(b"x")) == "EROFS"
    assert code_of(lambda: os.mkdir(root / "d")) == "EROFS"
    assert (root / "f").read_bytes() == b"content"


def test_a_backing_directory_that_was_removed_is_an_error_and_not_empty(mounted: Mounted, opened: Opened) -> None:
    (mounted.source / "d").mkdir()
    (mounted.source / "f").write_bytes(b"1234" * 4096)
    (mounted.source / "d" / "g").write_bytes(b"5678")
    root = mounted.start("--attr-timeout", "0")
    fd = opened(root / "f", os.O_RDONLY)
    assert os.listdir(root / "d") == ["g"]
    shutil.rmtree(mounted.source)
    try:
        for call in (
            lambda: os.listdir(root),
            lambda: os.listdir(root / "d"),
            lambda: (root / "f").read_bytes(),
            lambda: (root / "new").write_bytes(b"lost"),
            lambda: os.mkdir(root / "e"),
            lambda: os.stat(root / "d"),
        ):
            assert code_of(call) in ("ENOENT", "ESTALE")
        assert os.pread(fd, 1 << 20, 0) == b"1234" * 4096  # the file is open, so the backing still has it
        assert "cache_hits" in (root / ".tmemfs" / "stats").read_text()
    finally:
        mounted.source.mkdir()


def test_a_source_that_is_unmounted_lazily_is_served_until_the_end(small: Mounted, writing: Options) -> None:
    """The mount keeps the filesystem in use, so all files stay, and writes arrive."""
    (small.source / "f").write_bytes(b"content" * 1000)
    root = small.start(*writing)
    unmount(small.source, lazy=True)
    assert os.listdir(small.source) == []
    assert (root / "f").read_bytes() == b"content" * 1000
    assert "f" in os.listdir(root)
    (root / "g").write_bytes(b"new")
    assert (root / "g").read_bytes() == b"new"
    assert not (small.source / "g").exists()


def test_a_filesystem_remounted_below_the_source_is_served_again(small: Mounted, tmp_path: Path) -> None:
    """A submount of the source: while it is unmounted, the directory below it shows; once remounted, its files."""
    below = small.source / "below"
    below.mkdir()
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "f").write_bytes(b"inner content")
    assert run("mount", "--bind", inner, below).returncode == 0
    try:
        root = small.start("--attr-timeout", "0")
        assert (root / "below" / "f").read_bytes() == b"inner content"
        unmount(below, lazy=True)
        assert code_of(lambda: (root / "below" / "f").read_bytes()) in ("ENOENT", "ESTALE")
        assert run("mount", "--bind", inner, below).returncode == 0
        assert (root / "below" / "f").read_bytes() == b"inner content"
        assert os.listdir(root / "below") == ["f"]
    finally:
        while top_mount(below) is not None:
            unmount(below, lazy=True)
