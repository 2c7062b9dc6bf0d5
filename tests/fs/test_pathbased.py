"""A source that is a FUSE filesystem over paths: each name of a file is a node of its own, which ends with the name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import SECONDS, Place, wait_until
from tests.mounted import Mounted, needs
from tmemfs.kernel.kernelmount import unmount
from tmemfs.kernel.mounttable import top_mount

pytestmark = [pytest.mark.mount, needs("bindfs")]


@pytest.fixture
def behind(place: Place) -> Iterator[Path]:
    """Mount a directory on the source with bindfs and short timeouts; return that directory."""
    directory = place.source.parent / "behind"
    directory.mkdir()
    at = os.fspath(place.source)
    process = place.start("bindfs", "-f", "-o", "attr_timeout=0,entry_timeout=0", os.fspath(directory), at)
    try:
        wait_until(lambda: top_mount(place.source) is not None, "bindfs is mounted")
        yield directory
    finally:
        while top_mount(place.source) is not None:
            unmount(place.source, lazy=True)
        process.kill()
        process.wait(SECONDS)


def test_a_file_can_be_used_by_its_other_name_after_an_unlink(behind: Path, mounted: Mounted) -> None:
    root = mounted.start("--attr-timeout", "5m")
    has_xattrs = True
    for number, way in enumerate(("unlinked", "replaced", "removed by others", "held open")):
        first, other = root / f"first{number}", root / f"other{number}"
        first.write_text(way)
        try:
            os.setxattr(first, "user.way", way.encode())
        except OSError:
            has_xattrs = False
        os.link(first, other)
        held = os.open(first, os.O_RDONLY)
        if way != "held open":
            os.close(held)
        if way == "replaced":
            (root / "new").write_text("another file")
            os.rename(root / "new", first)
            assert first.read_text() == "another file"
        elif way == "removed by others":
            (behind / first.name).unlink()
        else:
            first.unlink()
        assert other.read_text() == way
        assert other.stat().st_nlink == 1
        if has_xattrs:
            assert os.getxattr(other, "user.way") == way.encode()
        if way == "held open":
            assert os.read(held, 100) == way.encode()
            os.close(held)
        other.chmod(0o600)
        os.truncate(other, 3)
        with other.open("a") as file:
            file.write(" and more")
        os.link(other, root / f"third{number}")
        os.unlink(other)
        assert (behind / f"third{number}").read_text() == way[:3] + " and more" == (root / f"third{number}").read_text()
        assert (root / f"third{number}").stat().st_mode & 0o777 == 0o600


def test_renamed_links_and_directories_are_used_by_their_new_names(behind: Path, mounted: Mounted) -> None:
    root = mounted.start("--attr-timeout", "5m")
    (root / "link").symlink_to("target")
    os.link(root / "link", root / "second", follow_symlinks=False)
    os.unlink(root / "link")
    assert os.readlink(root / "second") == "target"
    (root / "d").mkdir()
    (root / "d" / "f").write_text("in d")
    assert os.listdir(root / "d") == ["f"]
    os.rename(behind / "d", behind / "e")
    assert (root / "e" / "f").read_text() == "in d"
    assert os.listdir(root / "e") == ["f"]
    (root / "e" / "g").write_text("new")
    assert sorted(os.listdir(behind / "e")) == ["f", "g"]
