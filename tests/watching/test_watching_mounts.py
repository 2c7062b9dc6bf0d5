"""Changes by others are seen at once with --watch; our own changes drop nothing.

The mounts have time-outs of a minute, so only the watch can make a change visible.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from tests.conftest import Place, wait_until
from tmem.arena import PAGE_SIZE

pytestmark = pytest.mark.mount
SECONDS = 30.0
LONG = ("--attr-timeout", "60", "--negative-timeout", "60")


@pytest.fixture(params=[(), ("--throttle", "latency=2ms")], ids=["local", "slow"])
def mounted(place: Place, request: pytest.FixtureRequest) -> Iterator[Place]:
    """Mount with --watch: with metadata calls in place, and in threads."""
    (place.source / "file").write_bytes(b"a" * 10 * PAGE_SIZE)
    (place.source / "directory").mkdir()
    done = place.mount("--watch", *LONG, *request.param)
    assert done.returncode == 0, done.stderr
    yield place
    assert "Traceback" not in place.log_text()


def counter(place: Place, name: str) -> int:
    lines = (place.mountpoint / ".tmemfs" / "stats").read_text().splitlines()
    return int(dict(line.split() for line in lines)[name])


def starts_with(fd: int, data: bytes) -> bool:
    return os.pread(fd, len(data), 0) == data


def soon(condition: Callable[[], object], what: str) -> None:
    wait_until(condition, what, SECONDS)


def test_an_open_file_shows_content_and_size_that_others_write(mounted: Place) -> None:
    fd = os.open(mounted.mountpoint / "file", os.O_RDONLY)
    try:
        assert os.pread(fd, 1, 0) == b"a"
        with (mounted.source / "file").open("r+b") as theirs:
            theirs.write(b"b")
            theirs.flush()
            soon(lambda: os.pread(fd, 1, 0) == b"b", "the content")
            assert os.fstat(fd).st_size == 10 * PAGE_SIZE
            theirs.truncate(20 * PAGE_SIZE)
            soon(lambda: os.fstat(fd).st_size == 20 * PAGE_SIZE, "the size")
            assert len(os.pread(fd, 30 * PAGE_SIZE, 0)) == 20 * PAGE_SIZE
    finally:
        os.close(fd)


def test_names_that_others_create_rename_and_remove_are_seen(mounted: Place) -> None:
    source, mnt = mounted.source, mounted.mountpoint
    assert not (mnt / "new").exists()
    assert sorted(os.listdir(mnt)) == ["directory", "file"]
    (source / "new").write_text("new")
    soon(lambda: (mnt / "new").exists(), "made")
    assert sorted(os.listdir(mnt)) == ["directory", "file", "new"]
    (source / "new").rename(source / "newer")
    soon(lambda: not (mnt / "new").exists() and (mnt / "newer").exists(), "renamed")
    assert (mnt / "newer").read_text() == "new"
    (source / "other").write_text("other")
    (source / "other").rename(source / "newer")
    soon(lambda: (mnt / "newer").read_text() == "other", "replaced")
    (source / "newer").unlink()
    soon(lambda: not (mnt / "newer").exists(), "removed")
    soon(lambda: sorted(os.listdir(mnt)) == ["directory", "file"], "listed")


def test_new_directories_are_watched_too(mounted: Place) -> None:
    source, mnt = mounted.source, mounted.mountpoint
    assert not (mnt / "theirs").exists()
    (source / "theirs").mkdir()
    soon(lambda: (mnt / "theirs").is_dir(), "their directory")
    (mnt / "ours").mkdir()
    for name in ("theirs", "ours", "directory"):
        assert not (mnt / name / "x").exists()
        (source / name / "x").write_text("1")
        soon((mnt / name / "x").exists, f"made in {name}")
        with (mnt / name / "x").open("rb", buffering=0) as file:
            assert file.read() == b"1"
            (source / name / "x").write_text("2")
            soon(partial(starts_with, file.fileno(), b"2"), f"changed in {name}")
    assert counter(mounted, "watch_directories") == 4


def test_our_own_changes_keep_the_cache_and_the_current_directory(mounted: Place) -> None:
    mnt = mounted.mountpoint
    data = os.urandom(10 * PAGE_SIZE)
    (mnt / "own").write_bytes(data)
    assert (mnt / "own").read_bytes() == data
    reads = counter(mounted, "backing_reads")
    with (mnt / "own").open("r+b", buffering=0) as file:
        for turn in range(30):
            os.pwrite(file.fileno(), b"%d" % turn, turn * 100)
    for turn in range(10):
        (mnt / "own").rename(mnt / "own2")
        (mnt / "own2").rename(mnt / "own")
        (mnt / "own").chmod(0o600 + turn % 2)
    done = mounted.python(
        "import time\n"
        "for turn in range(20):\n"
        "    os.mkdir('w'); os.chdir('w'); time.sleep(0.01 * (turn % 3)); os.getcwd()\n"
        "    os.chdir('..'); os.rmdir('w')\n"
    )
    assert done.returncode == 0, done.stderr
    soon(lambda: counter(mounted, "watch_events") > 50, "the watch has seen it")
    time.sleep(0.1)
    assert len((mnt / "own").read_bytes()) == len(data)
    assert counter(mounted, "coherency_mismatches") == 0
    assert counter(mounted, "backing_reads") <= reads + 1, "once more, where stamps are coarse"
    reads = counter(mounted, "backing_reads")
    assert len((mnt / "own").read_bytes()) == len(data)
    assert counter(mounted, "backing_reads") == reads
