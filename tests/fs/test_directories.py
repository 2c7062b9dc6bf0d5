"""Large directories: listed whole, changed during a read, cheap to list a second time."""

from __future__ import annotations

import os
import stat

import pytest

from tests.mounted import VARIANTS, Mounted, shell

pytestmark = pytest.mark.mount
Options = tuple[str, ...]


@pytest.mark.parametrize(
    ("kind", "count"),
    [("through", 10_000), ("writeback", 10_000), pytest.param("through", 100_000, marks=pytest.mark.slow)],
)
def test_a_large_directory_is_listed_whole_while_it_changes(mounted: Mounted, kind: str, count: int) -> None:
    many = mounted.source / "many"
    many.mkdir()
    fd = os.open(many, os.O_RDONLY)
    for number in range(count):
        os.mknod(f"f{number}", stat.S_IFREG | 0o644, dir_fd=fd)
    os.close(fd)
    root = mounted.start(*VARIANTS[kind])
    names = {f"f{number}" for number in range(count)}
    assert set(os.listdir(root / "many")) == names
    seen, changes = set(), 0
    with os.scandir(root / "many") as entries:
        for position, entry in enumerate(entries):
            assert entry.name not in seen
            seen.add(entry.name)
            if position % (count // 50) == 0:
                changes += 1
                os.unlink(root / "many" / f"f{count - changes}")
                (root / "many" / f"new{position}").touch()
    assert {name for name in names if (root / "many" / name).exists()} <= seen
    assert len(os.listdir(root / "many")) == count
    assert (root / "many" / "f7777").stat().st_ino == (many / "f7777").stat().st_ino
    assert mounted.stats()["inode_descriptors"] < 5000
    shell("find many -name 'f*5' -delete", root)
    assert len(os.listdir(root / "many")) == len(os.listdir(many)) == count - count // 10 + changes // 10


def test_a_second_ls_within_the_timeout_makes_no_call_per_entry(mounted: Mounted) -> None:
    for number in range(5000):
        (mounted.source / f"f{number}").touch()
    root = mounted.start("--attr-timeout", "5m")
    first = shell("ls -l", root)
    before = mounted.stats()["backing_calls"]
    assert shell("ls -l", root) == first
    assert len(first.splitlines()) == 5001
    assert mounted.stats()["backing_calls"] - before < 20


def test_a_listing_does_not_cache_the_times_of_a_dirty_file(mounted: Mounted) -> None:
    root = mounted.start("--attr-timeout", "5m", "--writeback")
    with (root / "f").open("w") as file:
        file.write("dirty")
        file.flush()
        for _ in range(2):
            assert os.listdir(root) == ["f"]
        told = (root / "f").stat()
        assert (mounted.source / "f").read_text() == "dirty", "a stat writes back, so that the ctime stays"
    assert (root / "f").stat() == told


def test_an_xattr_is_visible_as_soon_as_it_is_set(mounted: Mounted) -> None:
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


def test_a_listing_shows_dot_and_dot_dot(mounted: Mounted) -> None:
    (mounted.source / "d" / "e").mkdir(parents=True)
    root = mounted.start()
    for directory in (".", "d", "d/e"):
        lines = shell(f"ls -lai {directory}", root).splitlines()[1:]
        names = [line.split()[-1] for line in lines]
        assert names[:2] == [".", ".."]
        assert names == [line.split()[-1] for line in shell(f"ls -lai {directory}", mounted.source).splitlines()[1:]]
    inner = shell("ls -lai d/e", root).splitlines()
    assert inner[1].split()[0] == str((root / "d" / "e").stat().st_ino)
    assert inner[2].split()[0] == str((root / "d").stat().st_ino)


def test_a_rewound_directory_shows_the_current_entries(mounted: Mounted) -> None:
    (mounted.source / "one").touch()
    root = mounted.start()
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    assert os.listdir(fd) == ["one"]
    (root / "two").touch()
    assert sorted(os.listdir(fd)) == ["one", "two"]
    os.close(fd)
