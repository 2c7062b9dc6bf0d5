"""tar, rsync, cp and find copy trees into, within and out of a mount, with all metadata."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from pathlib import Path

import pytest

from tests.apps.programs import Options, snapshot
from tests.mounted import Mounted, needs, shell

pytestmark = pytest.mark.mount
LONG = "l" * 200
SECOND = 10**9


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """Create a tree with everything that a copy must keep."""
    generator = random.Random(11)
    top = tmp_path / "original"
    top.mkdir()
    for number in range(90):
        path = top / f"d{number % 7}" / f"e{number % 3}" / f"f{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(generator.randbytes(generator.randrange(9000)) * generator.randrange(1, 9))
        path.chmod(generator.choice([0o644, 0o600, 0o755, 0o444, 0o000, 0o666]))
    (top / "empty").touch()
    (top / "nothing").mkdir(mode=0o700)
    with (top / "sparse").open("wb") as file:
        file.truncate(3 << 20)
        file.seek(1 << 20)
        file.write(b"in the middle")
    (top / os.fsdecode(b"not \xff\xfe utf-8\n")).write_text("name")
    (top / LONG / LONG / LONG).mkdir(parents=True)
    (top / LONG / LONG / LONG / LONG).write_text("deep")
    for number in range(5):
        (top / f"d{number}" / "hard").hardlink_to(top / "d0" / "e0" / "f0")
    (top / "link").symlink_to("d0/e0/f0")
    (top / "dangling").symlink_to("nowhere/" + LONG)
    (top / "directory").symlink_to("d1")
    os.mkfifo(top / "fifo", 0o640)
    with contextlib.suppress(OSError):  # not every filesystem has xattrs
        os.setxattr(top / "d1", "user.directory", b"x")
        os.setxattr(top / "empty", "user.long", b"value " * 100)
        os.setxattr(top / "d0" / "e0" / "f0", "user.hard", b"\0\xff")
    if os.geteuid() == 0:
        for number in range(0, 90, 5):
            path = top / f"d{number % 7}" / f"e{number % 3}" / f"f{number}"
            mode = path.stat().st_mode & 0o7777
            os.chown(path, 1234, 4321)
            path.chmod(mode)
        os.chown(top / "link", 1234, 4321, follow_symlinks=False)
        (top / "d2").chmod(0o3771)
        (top / "d3" / "hard").chmod(0o4755)
    for directory, directories, files in os.walk(top, topdown=False):
        for name in (*files, *directories):
            when = generator.randrange(10**18, 17 * 10**17), generator.randrange(10**18, 17 * 10**17)
            os.utime(os.path.join(directory, name), ns=when, follow_symlinks=False)
    os.utime(top, ns=(SECOND, 1234567890 * SECOND + 987654321))
    return top


COPIES = {
    "tar": 'mkdir "$TO" && tar -C "$FROM" --xattrs --acls --format=pax -cf - . | tar -C "$TO" --xattrs --acls -xpf -',
    "sparse tar": 'mkdir "$TO" && tar -C "$FROM" --xattrs -S --format=pax -cf - . | tar -C "$TO" --xattrs -xpf -',
    "cp": 'cp -a "$FROM" "$TO"',
    "rsync": 'rsync -aHAX "$FROM/" "$TO"',
    "rsync in place": 'rsync -aHAX --inplace --no-whole-file "$FROM/" "$TO"',
}


@needs("tar")
def test_copies_of_copies_keep_everything(mounted: Mounted, writing: Options, original: Path, tmp_path: Path) -> None:
    root = mounted.start(*writing)
    expected = snapshot(original)
    copies = {name: copy for name, copy in COPIES.items() if "rsync" not in name or shutil.which("rsync")}
    source = original
    for name, copy in copies.items():
        shell(copy, root, FROM=source, TO=root / name)
        assert snapshot(root / name) == expected, name
        source = root / name
    shell(COPIES["tar"], root, FROM=source, TO=tmp_path / "out")
    assert snapshot(tmp_path / "out") == expected, "out of the mount"
    shell("rm -rf tar", root)
    assert mounted.stats()["cache_evictions"] > 500
    mounted.end()
    assert sorted(os.listdir(mounted.source)) == sorted(set(copies) - {"tar"})
    for name in set(copies) - {"tar"}:
        assert snapshot(mounted.source / name) == expected, f"{name}, in the backing"


@needs("rsync")
def test_rsync_finds_what_changed_and_nothing_else(
    mounted: Mounted, writing: Options, original: Path, tmp_path: Path
) -> None:
    root = mounted.start(*writing)
    again = 'rsync -aHX --delete -i "$FROM/" "$TO"'
    sums = 'rsync -aHXc --delete -i "$FROM/" "$TO"'
    shell(again, root, FROM=original, TO=root / "in")
    for command in (again, sums):
        assert shell(command, root, FROM=original, TO=root / "in") == ""
    shell(sums, root, FROM=root / "in", TO=tmp_path / "out")
    assert shell(sums, root, FROM=root / "in", TO=tmp_path / "out") == ""
    # A change that keeps size and time, a removed name, and a file that grows at its end.
    hidden = original / "d1" / "e1" / "f1"
    info = hidden.stat()
    data = bytearray(hidden.read_bytes())
    data[len(data) // 2] ^= 255
    hidden.write_bytes(data)
    os.utime(hidden, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert shell(again, root, FROM=original, TO=root / "in") == ""
    (original / "empty").unlink()
    with (original / "sparse").open("ab") as file:
        file.write(b"more")
    found = shell(sums.replace(" -i", " -i --inplace --no-whole-file"), root, FROM=original, TO=root / "in")
    names = sorted(line.split()[-1] for line in found.splitlines())
    assert names == ["./", "d1/e1/f1", "empty", "sparse"]
    expected = snapshot(original)
    for place in (root, mounted.source):
        copied = snapshot(place / "in")
        # After a deletion rsync does not restore the directory's time, on any filesystem.
        assert {**copied, ".": expected["."]} == expected
    mounted.end()
    assert shell(sums, tmp_path, FROM=original, TO=mounted.source / "in") == ""


QUESTIONS = (
    "-newer d0/e0/f0",
    "-newermt 2015-01-01",
    "-size +40k",
    "-size -3",
    "-size 6145k",
    "-links +1 -type f",
    "-links 6 -samefile d0/hard",
    "-perm /111 -type f",
    "-perm -4000",
    "-empty",
    "-type p",
    "-xtype l",
    "-uid 1234 -gid 4321",
    "-path '*l/l*' -type f -size -1k",
    "-mtime -2000 -not -readable",
    "-printf '%i %n '",
)


def test_find_answers_as_on_the_backing(mounted: Mounted, writing: Options, original: Path) -> None:
    shell('cp -a "$FROM" in', mounted.source, FROM=original)
    root = mounted.start(*writing)
    for _ in range(2):
        for question in QUESTIONS:
            command = f"find . {question} -print | sort"
            assert shell(command, root / "in") == shell(command, mounted.source / "in"), question
    # find runs through the mount while the mount changes the tree.
    change = "ln d0/hard another; touch -d 2020-02-02 d1/e1/f1; truncate -s 50000 empty; chmod 4711 empty"
    shell(change, root / "in")
    for question in QUESTIONS:
        command = f"find . {question} -print | sort"
        assert shell(command, root / "in") == shell(command, mounted.source / "in"), question
    assert "./another" in shell("find . -links 7", root / "in")
