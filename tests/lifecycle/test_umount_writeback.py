"""`tmemfs umount` of a mount with dirty pages that cannot be written back: every loss is reported."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.calls import code_of
from tests.conftest import REAL, Place, has_ended, run, wait_until
from tests.fs.failing import FailingBacking, backing

__all__ = ["backing"]

pytestmark = pytest.mark.mount


@pytest.fixture
def dirty(place: Place, backing: FailingBacking) -> Iterator[Path]:
    """Return a mount with two dirty files; one of them cannot be written back."""
    assert place.mount("--writeback").returncode == 0
    for name in ("bad", "good"):
        (place.mountpoint / name).write_bytes(b"old " + name.encode())
    backing.fail("write bad EIO")
    for name in ("bad", "good"):
        fd = os.open(place.mountpoint / name, os.O_RDWR)
        os.pwrite(fd, b"new", 0)
        code_of(lambda fd=fd: os.close(fd))  # type: ignore[misc]
    yield place.mountpoint
    backing.fail()


def umount(place: Place, *options: str) -> subprocess.CompletedProcess[str]:
    return run(*REAL, "umount", *options, place.mountpoint)


def test_umount_refuses_names_the_files_and_changes_nothing(place: Place, backing: FailingBacking, dirty: Path) -> None:
    done = umount(place)
    assert done.returncode == 1
    assert "stays mounted" in done.stderr
    assert "'bad' (Input/output error)" in done.stderr
    assert "good" not in done.stderr
    assert (backing.directory / "good").read_bytes() == b"new good"
    wait_until(lambda: "bad: write-back failed: Input/output error" in place.log_text(), "the log says so")
    assert place.is_mounted()
    assert (dirty / ".tmemfs" / "writeback").read_text() == "1\nbad\t1\tInput/output error\n"

    backing.fail("write bad hang")
    done = umount(place, "--timeout", "0.5s")
    assert done.returncode == 1
    assert "'bad' (being written)" in done.stderr

    backing.fail()
    with (dirty / "bad").open("rb") as file:  # the mount is in use, and will be for long
        done = umount(place)
        assert done.returncode == 1
        assert "in use" in done.stderr
        assert file.read() == b"new bad"
        assert (backing.directory / "bad").read_bytes() == b"new bad"
    assert (dirty / ".tmemfs" / "writeback").read_text() == "1\n"
    done = umount(place)
    assert (done.returncode, done.stderr) == (0, "")


def test_waiting_for_the_backing_loses_nothing(place: Place, backing: FailingBacking, dirty: Path) -> None:
    pid = place.logged_pid()
    waiting = place.start(*REAL, "umount", "--wait-backing", os.fspath(dirty))
    assert waiting.stderr is not None
    assert "is being written back: 'bad'" in waiting.stderr.readline()
    (dirty / "later").write_bytes(b"written meanwhile")
    assert (backing.directory / "later").read_bytes() == b"written meanwhile", "nothing stays dirty from now on"
    backing.fail()
    assert waiting.wait(60) == 0
    assert has_ended(pid)
    assert (backing.directory / "bad").read_bytes() == b"new bad"
    assert "lost" not in place.log_text()


@pytest.mark.parametrize("trouble", ["EIO", "hang"])
def test_discarded_files_are_named(place: Place, backing: FailingBacking, dirty: Path, trouble: str) -> None:
    pid = place.logged_pid()
    backing.fail(f"write bad {trouble}")
    done = umount(place, "--discard", "--timeout", "0.5s")
    assert "lost with the mount: 'bad'" in done.stderr
    assert not place.is_mounted()
    backing.fail()
    wait_until(lambda: has_ended(pid), "the process has ended")
    assert "bad: 1 dirty pages are lost" in place.log_text()
    assert (backing.directory / "good").read_bytes() == b"new good"
    if trouble == "EIO":
        assert done.returncode == 0
        assert (backing.directory / "bad").read_bytes() == b"old bad"


def test_lost_pages_are_logged_after_a_plain_umount(place: Place, backing: FailingBacking, dirty: Path) -> None:
    pid = place.logged_pid()
    assert run("umount", dirty).returncode == 0
    wait_until(lambda: has_ended(pid), "the process has ended")
    assert "bad: 1 dirty pages are lost, not written back: Input/output error" in place.log_text()
    assert (backing.directory / "good").read_bytes() == b"new good"
