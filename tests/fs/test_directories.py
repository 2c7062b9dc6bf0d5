"""Large directories: listed whole, changed while they are read, and cheap to list a second time."""

from __future__ import annotations

import os
import stat

import pytest

from tests.mounted import Mounted, shell

pytestmark = pytest.mark.mount


@pytest.mark.parametrize("count", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_large_directory_is_listed_looked_into_and_removed(mounted: Mounted, count: int) -> None:
    many = mounted.source / "many"
    many.mkdir()
    fd = os.open(many, os.O_RDONLY)
    for number in range(count):
        os.mknod(f"f{number}", stat.S_IFREG | 0o644, dir_fd=fd)
    os.close(fd)
    root = mounted.start()
    with os.scandir(root / "many") as entries:
        seen = set()
        for position, entry in enumerate(entries):
            assert entry.name not in seen
            seen.add(entry.name)
            if position == count // 2:
                (root / "many" / "new").touch()
                os.unlink(root / "many" / f"f{count - 1}")
    assert {f"f{number}" for number in range(count - 1)} <= seen
    assert len(os.listdir(root / "many")) == count
    assert (root / "many" / "f7777").stat().st_ino == (many / "f7777").stat().st_ino
    assert mounted.stats()["inode_descriptors"] < 5000
    shell("find many -name 'f*5' -delete", root)
    assert len(os.listdir(root / "many")) == len(os.listdir(many)) == count - count // 10


def test_a_second_ls_of_many_entries_within_the_timeout_asks_the_backing_nothing_for_each(mounted: Mounted) -> None:
    for number in range(5000):
        (mounted.source / f"f{number}").touch()
    root = mounted.start("--attr-timeout", "5m")
    first = shell("ls -l", root)
    before = mounted.stats()["backing_calls"]
    assert shell("ls -l", root) == first
    assert len(first.splitlines()) == 5001
    assert mounted.stats()["backing_calls"] - before < 20


def test_an_attribute_that_was_not_there_is_there_as_soon_as_it_is_set(mounted: Mounted) -> None:
    (mounted.source / "f").touch()
    root = mounted.start("--attr-timeout", "5m", "--throttle", "latency=1ms")
    try:
        os.setxattr(mounted.source / "f", "user.probe", b"")
        os.removexattr(mounted.source / "f", "user.probe")
    except OSError:
        pytest.skip("missing: user xattrs on the backing filesystem")
    for turn in range(5):
        assert os.listxattr(root / "f") == []
        os.setxattr(root / "f", "user.name", b"%d" % turn)
        assert os.listxattr(root / "f") == ["user.name"]
        assert os.getxattr(root / "f", "user.name") == b"%d" % turn
        os.removexattr(root / "f", "user.name")
