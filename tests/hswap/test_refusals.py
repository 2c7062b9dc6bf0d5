"""Refused hswap options: one line that names the thing and the remedy, exit code 2, nothing mounted."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Place, wait_until
from tests.mounted import Mounted
from tmemcommon.sizes import MIB, ConfigError
from tmemfs.config import MountConfig
from tmemfs.hswap.overflow import HEADER
from tmemfs.hswap.swaparea import default_overflow
from tmemfs.lifecycle import loopswap
from tmemfs.options import parse_options

PLAIN = MountConfig(Path("/source"), Path("/mnt"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"hswap_bytes": 4096}, "hswap of 4096 bytes is too small: give --hswap at least 64K"),
        ({"hswap_bytes": MIB, "pool_bytes": 0}, "hswap needs a pool: give --pool SIZE, or no --hswap"),
        ({"hswap_bytes": 5 << 40}, "hswap of 5497558138880 bytes is too large: give --hswap at most 4T"),
        (
            {"hswap_bytes": MIB, "options": parse_options(["ro"])},
            "hswap cannot be written on a read-only mount: give no --hswap, or no -o ro",
        ),
        ({"hswap_overflow": Path("/x")}, "--hswap-overflow '/x' needs --hswap SIZE: give both"),
    ],
)
def test_hswap_options_that_cannot_work_are_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        MountConfig(PLAIN.source, PLAIN.mountpoint, **given)  # type: ignore[arg-type]
    assert str(caught.value) == said


def _busy(place: Place) -> Path:
    path = place.log.with_name("foreign")
    path.write_text("precious")
    return path


@pytest.mark.mount
@pytest.mark.parametrize(
    ("where", "size", "said"),
    [
        (lambda place: place.source / "overflow", "1M", "would be visible in the mount: give --hswap-overflow outside"),
        (lambda place: place.mountpoint / "overflow", "1M", "would be visible in the mount"),
        (lambda place: place.log.with_name("nowhere") / "overflow", "1M", "give another --hswap-overflow"),
        (_busy, "1M", "exists and is not one of tmemfs: remove it or give another --hswap-overflow"),
        (lambda place: place.log.with_name("overflow"), "4T", "give a smaller --hswap, or --hswap-overflow on a"),
        (lambda place: place.log.with_name("overflow"), "lots", "size 'lots' is not understood"),
    ],
)
def test_a_mount_whose_hswap_cannot_work_is_refused_in_one_line(
    place: Place, where: Callable[[Place], Path], size: str, said: str
) -> None:
    path = where(place)
    before = path.exists()
    done = place.mount("--hswap", size, "--hswap-overflow", str(path))
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not place.is_mounted()
    assert path.exists() == before


def test_the_overflow_file_is_in_the_state_directory_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_overflow(Path("/mnt/a")) == Path("/var/lib/tmemfs/mnt-a.overflow")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_STATE_HOME", "/home/me/state")
    assert default_overflow(Path("/mnt/a")) == Path("/home/me/state/tmemfs/mnt-a.overflow")


@pytest.mark.mount
def test_a_mount_that_fails_later_leaves_no_overflow_file(place: Place) -> None:
    path = place.log.with_name("overflow")
    command = ("--hswap", "1M", "--hswap-overflow", str(path), "--pool", f"unix:{place.log.with_name('no-socket')}")
    done = place.mount(*command)
    assert done.returncode == 2
    assert "no-socket" in done.stderr
    assert not path.exists()


@pytest.mark.mount
def test_the_next_mount_removes_the_leftover_of_a_killed_guest(place: Place) -> None:
    path = place.log.with_name("overflow")
    words = ("--hswap", "1M", "--hswap-overflow", str(path))
    process = place.serve(*words)
    with (place.mountpoint / ".tmemfs" / "hswap").open("r+b", buffering=0) as file:
        file.write(b"x" * 5000)
    process.kill()
    process.wait(30)
    assert path.exists()
    assert path.read_bytes()[: len(HEADER)] == HEADER
    mounted = Mounted(place)
    try:
        root = mounted.start(*words)
        assert (root / ".tmemfs" / "hswap").read_bytes() == bytes(1 << 20), "the content ended with that mount"
        mounted.end()
    finally:
        mounted.stop_watchdog()
    assert not path.exists()


@pytest.mark.mount
@pytest.mark.root
def test_a_full_disk_is_an_error_and_the_page_keeps_its_content(place: Place) -> None:
    """The overflow file is on a filesystem of 1 MiB: pool and file together are full before the file's end."""
    disk = place.log.with_name("disk")
    disk.mkdir()
    mounted = Mounted(place)
    assert os.system(f"mount -t tmpfs -o size=1M none '{disk}'") == 0
    try:
        root = mounted.start("--hswap", "2500K", "--hswap-overflow", str(disk / "overflow"), "--pool", "2M")
        (disk / "others").write_bytes(os.urandom(700 << 10))
        written = {}
        fd = os.open(root / ".tmemfs" / "hswap", os.O_RDWR)
        for page in range(625):
            content = os.urandom(4096)
            try:
                os.pwrite(fd, content, page * 4096)
                written[page] = content
            except OSError as error:
                written[page] = bytes(4096)
                assert error.strerror == "No space left on device"  # noqa: PT017
        assert 520 < sum(map(any, written.values())) < 625
        for page, content in written.items():
            assert os.pread(fd, 4096, page * 4096) == content
        os.close(fd)
        assert mounted.stats()["hswap_overflow_errors"] > 0
        wait_until(lambda: "No space left on device" in mounted.log(), "the log says so")
        mounted.end()
    finally:
        mounted.stop_watchdog()
        assert os.system(f"umount -l '{disk}'") == 0


@pytest.mark.mount
def test_swapon_says_what_is_missing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert loopswap.obstacle() == "swapping needs root: use sudo"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", os.fspath(place.source))
    assert loopswap.obstacle() == "losetup is missing: install the packages mount and util-linux"
