"""Names, links and special files behave on a mount as on the backing."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys

import pytest

from tests.calls import code_of
from tests.mounted import Mounted, same_bytes, shell
from tests.pagebytes import pages_of

pytestmark = pytest.mark.mount
Options = tuple[str, ...]


@pytest.mark.parametrize(
    "name",
    [b"n" * 255, b"\xff\xfe\x80", b"new\nline", b" ", "naïve ☃".encode(), b"-rf", b"\\", b"%s%n", b"a\xed\xa0\x80"],
)
def test_names_are_bytes(mounted: Mounted, name: bytes) -> None:
    root = os.fsencode(mounted.start())
    path = os.path.join(root, name)
    with open(path, "xb") as file:
        file.write(b"content")
    assert os.listdir(root) == [name] == os.listdir(os.fsencode(mounted.source))
    os.rename(path, path[:-1] + b"+")
    os.mkdir(path)
    os.symlink(name, os.path.join(path, name[:250]))
    assert os.readlink(os.path.join(path, name[:250])) == name
    with open(path[:-1] + b"+", "rb") as file:
        assert file.read() == b"content"
    os.unlink(os.path.join(path, name[:250]))
    os.rmdir(path)


@pytest.mark.parametrize("length", [256, 1000, 1024, 1025, 4000])
def test_a_name_that_is_too_long_is_refused_as_on_the_backing(mounted: Mounted, length: int) -> None:
    root = mounted.start()
    name = "n" * length
    for call in (os.stat, os.mkdir, os.unlink, lambda path: os.rename(mounted.root / "there", path), os.listdir):
        (mounted.source / "there").touch()
        assert code_of(lambda call=call: call(root / name)) == "ENAMETOOLONG"  # type: ignore[misc]
    assert code_of(lambda: os.open(root / name, os.O_CREAT | os.O_WRONLY)) == "ENAMETOOLONG"


def test_a_missing_name_is_not_cached_by_default(mounted: Mounted) -> None:
    root = mounted.start()
    assert not (root / "later").exists()
    (mounted.source / "later").write_text("now")
    assert (root / "later").read_text() == "now"


def test_hard_links_share_content_whatever_name_is_used(mounted: Mounted, writing: Options) -> None:
    root = mounted.start(*writing)
    (root / "a").write_bytes(pages_of(1, 5))
    os.link(root / "a", root / "b")
    assert (root / "a").stat().st_ino == (root / "b").stat().st_ino
    assert (root / "a").stat().st_nlink == (root / "b").stat().st_nlink == 2
    with (root / "b").open("r+b") as file:
        file.write(b"changed")
        file.flush()
        with (root / "a").open("rb") as other:
            assert other.read(7) == b"changed"
    (root / "a").unlink()
    assert (root / "b").stat().st_nlink == 1
    assert (root / "b").read_bytes() == b"changed" + pages_of(1, 5)[7:]
    same_bytes(mounted, "b")


def test_a_rename_over_a_cached_file_replaces_it(mounted: Mounted, writing: Options) -> None:
    root = mounted.start(*writing)
    for number in range(20):
        (root / "new").write_bytes(pages_of(number, 3))
        old = (root / "target").open("rb") if number else None
        os.replace(root / "new", root / "target")
        assert (root / "target").read_bytes() == pages_of(number, 3)
        if old is not None:
            assert old.read() == pages_of(number - 1, 3), "an open file keeps its content"
            old.close()
    assert os.listdir(root) == ["target"]


def test_an_exchange_swaps_two_files(mounted: Mounted) -> None:
    root = mounted.start()
    (root / "a").write_text("a")
    (root / "d").mkdir()
    (root / "d" / "b").write_text("b")
    assert shell("mv --exchange a d/b 2>/dev/null || echo unknown", root) in ("", "unknown\n")
    swapped = (mounted.source / "a").read_text() == "b"
    assert ((root / "a").read_text(), (root / "d" / "b").read_text()) == (("b", "a") if swapped else ("a", "b"))


def test_directories_are_renamed_with_all_that_is_open_in_them(mounted: Mounted, writing: Options) -> None:
    root = mounted.start(*writing)
    (root / "a" / "b").mkdir(parents=True)
    with (root / "a" / "b" / "f").open("w+b") as file:
        file.write(b"before")
        file.flush()
        os.rename(root / "a", root / "z")
        file.write(b" after")
        file.flush()
        assert (root / "z" / "b" / "f").read_bytes() == b"before after"
        assert not (root / "a").exists()
        os.rename(root / "z" / "b", root / "b")
        file.seek(0)
        assert file.read() == b"before after"
    same_bytes(mounted, "b/f")
    assert code_of(lambda: os.rename(root / "z", root / "z" / "inside")) == "EINVAL"
    assert code_of(lambda: os.rmdir(root / "b")) == "ENOTEMPTY"


def test_an_unlinked_file_lives_until_its_last_close(mounted: Mounted, variant: Options) -> None:
    root = mounted.start(*variant)
    data = pages_of(1, 400)
    for number in range(30):
        fd = os.open(root / "temporary", os.O_CREAT | os.O_EXCL | os.O_RDWR)
        os.write(fd, data)
        os.unlink(root / "temporary")
        assert os.fstat(fd).st_nlink == 0
        if number % 10 == 0:
            assert os.pread(fd, len(data), 0) == data
        os.ftruncate(fd, 5000)
        os.pwrite(fd, b"end", 4999)
        assert os.pread(fd, 100, 4990) == data[4990:4999] + b"end"
        assert os.fstat(fd).st_size == 5002
        if number % 3 == 0:
            os.fchmod(fd, 0o600)
        os.close(fd)
    assert os.listdir(root) == [] == os.listdir(mounted.source)
    assert mounted.stats()["backing_errors"] == 0


def test_symlinks_fifos_sockets_and_devices_keep_their_types(mounted: Mounted) -> None:
    root = mounted.start()
    os.symlink("target", root / "link")
    os.mkfifo(root / "fifo", 0o640)
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(root)
        try:
            server.bind("socket")
        finally:
            os.chdir(here)
    for name, kind in (("link", stat.S_IFLNK), ("fifo", stat.S_IFIFO), ("socket", stat.S_IFSOCK)):
        for directory in (root, mounted.source):
            assert stat.S_IFMT(os.lstat(directory / name).st_mode) == kind
    assert os.readlink(root / "link") == "target"
    assert stat.S_IMODE(os.lstat(root / "fifo").st_mode) == 0o640
    writer = subprocess.Popen([sys.executable, "-c", f"open({os.fspath(root / 'fifo')!r}, 'w').write('through')"])
    assert shell("timeout 60 cat fifo", root) == "through"
    assert writer.wait(60) == 0
    assert code_of(lambda: os.symlink("x", root / "link")) == "EEXIST"


def test_extended_attributes_are_those_of_the_backing(mounted: Mounted) -> None:
    root = mounted.start()
    (root / "f").write_text("x")
    try:
        os.setxattr(mounted.source / "f", "user.probe", b"1")
    except OSError:
        pytest.skip("missing: user xattrs on the backing filesystem")
    os.setxattr(root / "f", "user.name", b"\0value\xff")
    os.setxattr(root / "f", "user.empty", b"")
    assert sorted(os.listxattr(root / "f")) == sorted(os.listxattr(mounted.source / "f"))
    assert os.getxattr(mounted.source / "f", "user.name") == b"\0value\xff" == os.getxattr(root / "f", "user.name")
    os.removexattr(root / "f", "user.name")
    assert code_of(lambda: os.getxattr(root / "f", "user.name")) == "ENODATA"
    assert code_of(lambda: os.removexattr(root / "f", "user.name")) == "ENODATA"
    assert os.getxattr(root / "f", "user.empty") == b""


def test_modes_owners_and_times_go_to_the_backing(mounted: Mounted, writing: Options) -> None:
    root = mounted.start(*writing)
    (root / "f").write_text("content")
    os.chmod(root / "f", 0o4751)
    os.utime(root / "f", ns=(1_234_567_890_123_456_789, 1_000_000_000_000_000_001))
    if os.geteuid() == 0:
        os.chown(root / "f", 12, 34)
    one, other = os.stat(root / "f"), os.stat(mounted.source / "f")
    for name in ("st_mode", "st_uid", "st_gid", "st_atime_ns", "st_mtime_ns", "st_size", "st_nlink", "st_ino"):
        assert getattr(one, name) == getattr(other, name), name
    (root / "f").write_text("more")
    assert os.stat(root / "f").st_mtime > 1_700_000_000


def test_statfs_is_that_of_the_backing(mounted: Mounted) -> None:
    root = mounted.start()
    one, other = os.statvfs(root), os.statvfs(mounted.source)
    assert (one.f_bsize, one.f_blocks, one.f_namemax) == (other.f_bsize, other.f_blocks, other.f_namemax)
    with (root / "f").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 100_000)
    assert (mounted.source / "f").stat().st_size == 100_000
