"""Large directories: listed whole, changed during a read, cheap to list a second time."""

from __future__ import annotations

import os
import stat

import pytest

from tests.mounted import Mounted, shell

pytestmark = pytest.mark.mount
Options = tuple[str, ...]


@pytest.mark.parametrize("count", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_large_directory_can_be_listed_with_attributes_and_removed(mounted: Mounted, count: int) -> None:
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
        assert (mounted.source / "f").read_text() == "dirty", (
            "a stat writes back; otherwise the ctime would change after it"
        )
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


def test_a_directory_of_5000_entries_is_listed_whole_and_removed(mounted: Mounted, writing: Options) -> None:
    for number in range(5000):
        (mounted.source / f"f{number:05}").write_bytes(b"%d" % number)
    root = mounted.start(*writing)
    want = [f"f{number:05}" for number in range(5000)]
    assert sorted(os.listdir(root)) == want
    assert shell("ls -l | tail -n +2 | wc -l; find . -type f -size -2 | wc -l", root).split() == ["5000", "5000"]
    seen = set()
    with os.scandir(root) as entries:  # entries come and go while the directory is read
        for position, entry in enumerate(entries):
            seen.add(entry.name)
            if position % 100 == 0:
                os.unlink(root / f"f{4999 - position // 10:05}")
                (root / f"new{position}").touch()
    assert {name for name in want if (root / name).exists()} <= seen
    shell("cat f000*  > ../cat; rm -rf ./f* ./new*", root)
    assert os.listdir(root) == [] == os.listdir(mounted.source)


def test_a_rewound_directory_shows_the_current_entries(mounted: Mounted) -> None:
    (mounted.source / "one").touch()
    root = mounted.start()
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    assert os.listdir(fd) == ["one"]
    (root / "two").touch()
    assert sorted(os.listdir(fd)) == ["one", "two"]
    os.close(fd)
