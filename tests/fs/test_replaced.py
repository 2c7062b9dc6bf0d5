"""Names that others replace or remove: the next open finds the current file, however long names are cached."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import SECONDS
from tests.mounted import VARIANTS, Mounted

pytestmark = pytest.mark.mount
BELIEVING = ("--attr-timeout", "5m")


@pytest.fixture
def root(mounted: Mounted) -> Path:
    """Mount with names cached for longer than any test takes."""
    return mounted.start(*BELIEVING)


def replace(path: Path, text: str, mode: int = 0o644) -> None:
    """Replace a file by a rename, as editors and package managers do."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text)
    new.chmod(mode)
    os.replace(new, path)


def test_an_open_finds_the_file_that_replaced_a_known_one(mounted: Mounted, root: Path) -> None:
    source = mounted.source
    for text in ("one", "two", "three"):
        replace(source / "f", text)
        assert (root / "f").read_text() == text
    assert os.stat(root / "f").st_ino == (source / "f").stat().st_ino

    replace(source / "f", "others'")
    with (root / "f").open("a") as file:
        file.write(" and ours")
    assert (source / "f").read_text() == "others' and ours"
    replace(source / "f", "others'")
    (root / "f").write_text("ours")
    assert (source / "f").read_text() == "ours", "O_TRUNC truncated the old file"

    for status in (3, 4):
        replace(source / "program", f"#!/bin/sh\nexit {status}\n", 0o755)
        assert subprocess.run([root / "program"], check=False, timeout=SECONDS).returncode == status

    os.rename(source / "f", source / "moved")
    with pytest.raises(FileNotFoundError):
        (root / "f").open()
    assert (root / "moved").read_text() == "ours"
    os.unlink(source / "moved")
    with pytest.raises(FileNotFoundError):
        (root / "moved").open()
    with (root / "moved").open("x") as file:
        file.write("made anew")
    assert (source / "moved").read_text() == "made anew"


def test_an_open_below_a_replaced_directory_or_link_finds_the_new_one(mounted: Mounted, root: Path) -> None:
    source = mounted.source
    for version in ("v1", "v2"):
        (source / version / "in").mkdir(parents=True)
        (source / version / "in" / "f").write_text(version)
    (source / "current").symlink_to("v1")
    assert (root / "current" / "in" / "f").read_text() == "v1"
    (source / "new").symlink_to("v2")
    os.replace(source / "new", source / "current")
    assert (root / "current" / "in" / "f").read_text() == "v2"

    assert (root / "v1" / "in" / "f").read_text() == "v1"
    os.rename(source / "v1", source / "old")
    os.rename(source / "v2", source / "v1")
    assert (root / "v1" / "in" / "f").read_text() == "v2"
    assert os.listdir(root / "v1") == ["in"]
    assert (root / "old" / "in" / "f").read_text() == "v1"

    os.rename(source / "old", source / "gone")
    (source / "old").mkdir()
    assert os.listdir(root / "old") == []
    (source / "old" / "made").touch()
    assert os.listdir(root / "old") == ["made"], "equal times within a tick"
    (source / "old" / "made").unlink()
    (source / "old").rmdir()
    with pytest.raises(FileNotFoundError):
        os.listdir(root / "old")


def test_of_two_hard_links_only_the_replaced_name_changes(mounted: Mounted, root: Path) -> None:
    source = mounted.source
    names = [f"n{number}" for number in range(12)]
    (source / "n0").write_text("old")
    for name in names[1:]:
        os.link(source / "n0", source / name)
    for count in (2, 12):
        assert {(root / name).read_text() for name in names[:count]} == {"old"}
        replace(source / "n0", "new")
        assert {(root / name).read_text() for name in names[1:count]} == {"old"}
        assert (root / "n0").read_text() == "new"
        os.link(source / "n1", source / "again")
        os.replace(source / "again", source / "n0")
    assert (root / "n0").read_text() == "old"


def test_a_file_without_a_name_is_opened_again_by_its_descriptor(mounted: Mounted, root: Path) -> None:
    source = mounted.source
    for name in ("ours", "others'", "replaced", "moved"):
        (source / name).write_text(name)
    held = {name: os.open(root / name, os.O_PATH) for name in os.listdir(source)}
    os.mkdir(source / "d")
    (source / "d" / "f").write_text("in d")
    directory = os.open(root / "d", os.O_RDONLY)
    assert os.path.exists(f"/proc/self/fd/{directory}/f")
    try:
        for fd in held.values():
            os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY))  # open at the backing once
        os.unlink(root / "ours")
        os.unlink(source / "others'")
        replace(source / "replaced", "new")
        os.rename(source / "moved", source / "elsewhere")
        for _ in range(2):
            for name, fd in held.items():
                assert Path(f"/proc/self/fd/{fd}").read_text() == name
        assert (root / "replaced").read_text() == "new"
        os.rename(source / "d", source / "e")
        for _ in range(2):
            fd = os.open("f", os.O_RDONLY, dir_fd=directory)
            assert os.read(fd, 100) == b"in d"
            os.close(fd)
    finally:
        for fd in (*held.values(), directory):
            os.close(fd)


REPLACE_FOR_EVER = """
import os, sys
number = 0
while True:
    number += 1
    with open(sys.argv[1] + ".new", "w") as file:
        file.write(f"{number}\\n" * 100)
    os.replace(sys.argv[1] + ".new", sys.argv[1])
    if number == 1:
        print("ready", flush=True)
"""


def test_opens_of_a_constantly_replaced_name_never_fail(mounted: Mounted) -> None:
    root = mounted.start(*BELIEVING, *VARIANTS["threads"])
    words = [sys.executable, "-c", REPLACE_FOR_EVER, os.fspath(mounted.source / "f")]
    others = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert others.stdout is not None
        assert others.stdout.readline() == "ready\n"
        last = 0
        for _ in range(200):
            found = (root / "f").read_text().split()
            assert len(found) == 100
            assert len(set(found)) == 1
            assert int(found[0]) >= last, "the listing went back to an older state"
            last = int(found[0])
    finally:
        others.kill()
        others.communicate(timeout=SECONDS)


class Directory:
    """opendir(3), readdir(3), rewinddir(3): Python's scandir reads a directory whole when it opens it."""

    libc = ctypes.CDLL(None, use_errno=True)
    libc.opendir.restype = libc.readdir.restype = ctypes.c_void_p
    for function in (libc.readdir, libc.rewinddir, libc.closedir):
        function.argtypes = [ctypes.c_void_p]

    def __init__(self, path: Path) -> None:
        self._stream = self.libc.opendir(os.fsencode(path))
        assert self._stream

    def names(self) -> list[str]:
        """Return the names up to the end."""
        found = []
        while entry := self.libc.readdir(self._stream):
            found.append(ctypes.string_at(entry + 19).decode())
        return sorted(set(found) - {".", ".."})

    def rewind(self) -> None:
        self.libc.rewinddir(self._stream)

    def close(self) -> None:
        self.libc.closedir(self._stream)


def test_a_listing_shows_the_entries_at_its_first_read_or_rewind(mounted: Mounted, root: Path) -> None:
    assert os.listdir(root) == []
    directory = Directory(root)
    try:
        (root / "a").touch()
        assert directory.names() == ["a"]
        (root / "b").touch()
        assert directory.names() == []
        directory.rewind()
        assert directory.names() == ["a", "b"]
        (mounted.source / "others'").touch()
        directory.rewind()
        (root / "c").touch()
        assert directory.names() == ["a", "b", "c", "others'"]
    finally:
        directory.close()
