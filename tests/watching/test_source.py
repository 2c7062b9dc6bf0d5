"""Another filesystem mounted in place of SOURCE is detected and reported."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.conftest import SECONDS, Place, wait_until
from tests.mounted import mounting
from tmemcommon.mountinfo import MountEntry
from tmemfs.watching.source import leads_to, mounts_on_way


def table(*lines: str) -> list[MountEntry]:
    """Return a mount table of lines `number parent mountpoint type`."""
    fields = [line.split() for line in lines]
    return [MountEntry("0:1", Path(at), kind, "x", int(number), int(parent)) for number, parent, at, kind in fields]


BASE = ("1 0 / ext4", "2 1 /a nfs", "3 2 /a/b/c nfs")


@pytest.mark.parametrize(
    ("lines", "path", "way"),
    [
        (BASE, "/x", [1]),
        (BASE, "/a/b", [1, 2]),
        (BASE, "/a/b/c/d", [1, 2, 3]),
        ((*BASE, "4 2 /a/b ext4"), "/a/b/c", [1, 2, 4]),  # mounted over a directory above a mount, which it hides
        ((*BASE, "4 2 /a ext4", "5 4 /a/b tmpfs"), "/a/b", [1, 2, 4, 5]),
        (("1 0 / rootfs", "2 1 / ext4", "3 2 /a nfs"), "/a", [1, 2, 3]),
        ((), "/a", []),
    ],
)
def test_a_path_leads_through_the_topmost_mounts(lines: tuple[str, ...], path: str, way: list[int]) -> None:
    assert [entry.mount_id for entry in mounts_on_way(table(*lines), Path(path))] == way


@pytest.mark.parametrize(
    ("lines", "leads"),
    [
        (BASE, True),
        (("1 0 / ext4", "9 1 /a nfs"), False),
        ((*BASE, "4 2 /a nfs"), False),
        ((*BASE, "4 2 /a/s nfs"), False),
        ((*BASE, "4 2 /a/s fuse.tmemfs"), True),  # SOURCE and MOUNTPOINT are the same
        ((*BASE, "4 2 /a/s/below nfs"), True),
    ],
)
def test_a_mount_over_the_source_replaces_it(lines: tuple[str, ...], leads: bool) -> None:
    assert leads_to(table(*lines), Path("/a/s"), 2) is leads


@pytest.mark.mount
@pytest.mark.root
def test_a_mount_reports_that_its_source_was_replaced(place: Place) -> None:
    def mount(*words: str) -> None:
        subprocess.run([*words, place.source], check=True, timeout=SECONDS)

    mount("mount", "-t", "tmpfs", "old")
    try:
        with mounting(place) as made:
            made.start()
            assert made.stats()["backing_replaced"] == 0
            mount("mount", "-t", "tmpfs", "new")
            wait_until(lambda: made.stats()["backing_replaced"] == 1, "what was mounted over it is noticed")
            mount("umount")
            wait_until(lambda: made.stats()["backing_replaced"] == 0, "it is gone again")
            mount("umount", "-l")
            mount("mount", "-t", "tmpfs", "new")
            wait_until(lambda: made.stats()["backing_replaced"] == 1, "another source is noticed")
            wait_until(lambda: made.log().count("still shows what was there before") == 2, "the log says so")
    finally:
        mount("umount", "-l")
