"""The same calls have the same outcome in the mount and in a plain directory of the same filesystem."""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.calls import code_of
from tests.mounted import Mounted, shell
from tests.pagebytes import pages_of
from tmemcommon import libc

pytestmark = pytest.mark.mount
Options = tuple[str, ...]
Answers = list[object]
NOREPLACE, EXCHANGE = 1, 2
AT_FDCWD = -100


def renameat2(old: Path, new: Path, flags: int) -> None:
    libc.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags)


@pytest.fixture
def plain(mounted: Mounted) -> Path:
    """Return a plain directory beside the source."""
    directory = mounted.source.parent / "plain"
    directory.mkdir()
    return directory


def both(mounted: Mounted, plain: Path, steps: Callable[[Path], Answers]) -> Answers:
    """Run the steps in both directories; assert that the answers agree, and return them."""
    through = steps(mounted.root)
    assert through == steps(plain)
    return through


def test_rename_flags(mounted: Mounted, plain: Path, variant: Options) -> None:
    mounted.start(*variant)

    def steps(top: Path) -> Answers:
        (top / "d").mkdir()
        (top / "a").write_bytes(pages_of(1, 3))
        (top / "d" / "b").write_bytes(pages_of(2, 4))
        (top / "a").read_bytes(), (top / "d" / "b").read_bytes()
        found: Answers = [code_of(lambda: renameat2(top / "a", top / "d" / "b", NOREPLACE))]
        renameat2(top / "a", top / "d" / "b", EXCHANGE)
        found += [(top / "a").read_bytes() == pages_of(2, 4), (top / "d" / "b").read_bytes() == pages_of(1, 3)]
        renameat2(top / "a", top / "d", EXCHANGE)  # a file and a directory
        found += [stat.S_ISDIR((top / "a").stat().st_mode), (top / "d").stat().st_size, os.listdir(top / "a")]
        renameat2(top / "d", top / "new", NOREPLACE)
        found += [(top / "new").read_bytes() == pages_of(2, 4), sorted(os.listdir(top))]
        for flags, new in ((EXCHANGE, "missing"), (NOREPLACE | EXCHANGE, "a"), (1 << 7, "missing")):
            found.append(code_of(lambda flags=flags, new=new: renameat2(top / "new", top / new, flags)))  # type: ignore[misc]
        return found

    assert both(mounted, plain, steps)[0] == "EEXIST"


def test_times_are_set_left_out_and_taken_from_the_clock(mounted: Mounted, plain: Path, writing: Options) -> None:
    mounted.start(*writing)

    def steps(top: Path) -> Answers:
        path = top / "f"
        path.write_bytes(b"content")
        found: Answers = []

        def told() -> None:
            st = path.stat()
            found.append(
                ["now" if abs(ns - time.time_ns()) < 10**11 else ns for ns in (st.st_atime_ns, st.st_mtime_ns)]
            )

        libc.utimensat(os.fspath(path), (11, 123_456_789), (22, 999_999_999))
        told()
        libc.utimensat(os.fspath(path), (0, libc.UTIME_OMIT), (33, 1))
        told()
        libc.utimensat(os.fspath(path), (44, 2), (0, libc.UTIME_OMIT))
        told()
        before = path.stat().st_ctime_ns
        libc.utimensat(os.fspath(path), (0, libc.UTIME_OMIT), (0, libc.UTIME_OMIT))
        found.append(path.stat().st_ctime_ns == before)
        libc.utimensat(os.fspath(path), (0, libc.UTIME_NOW), (0, libc.UTIME_OMIT))
        told()
        libc.utimensat(os.fspath(path), (55, 3), (0, libc.UTIME_NOW))
        told()
        return found

    found = both(mounted, plain, steps)
    assert found[:3] == [
        [11_123_456_789, 22_999_999_999],
        [11_123_456_789, 33_000_000_001],
        [44_000_000_002, 33_000_000_001],
    ]
    assert found[3:] == [True, ["now", 33_000_000_001], [55_000_000_003, "now"]]


CHANGES: dict[str, Callable[[Path], object]] = {
    "write": lambda top: (top / "f").open("r+b").write(b"x"),
    "append": lambda top: (top / "f").open("ab").write(b"x"),
    "truncate": lambda top: os.truncate(top / "f", 100),
    "truncate to the same size": lambda top: os.truncate(top / "f", 9000),
    "open to truncate": lambda top: (top / "f").open("wb").close(),
    "open": lambda top: (top / "f").open("r+b").close(),
    "chmod": lambda top: (top / "f").chmod(0o600),
    "chown": lambda top: os.chown(top / "f", os.getuid(), os.getgid()),
    "chown that changes nothing": lambda top: os.chown(top / "f", -1, -1),
    "chown of a directory that changes nothing": lambda top: os.chown(top / "d", -1, -1),
    "time of access": lambda top: os.utime(top / "f", ns=(1, (top / "f").stat().st_mtime_ns)),
    "link": lambda top: (top / "g").hardlink_to(top / "f"),
    "unlink a link": lambda top: (top / "other").unlink(),
    "rename": lambda top: (top / "f").rename(top / "g"),
    "xattr": lambda top: os.setxattr(top / "f", "user.name", b"value"),
    "make a name": lambda top: (top / "d" / "new").touch(),
    "remove a name": lambda top: (top / "d" / "old").unlink(),
    "move a name out": lambda top: (top / "d" / "old").rename(top / "moved"),
    "read": lambda top: (top / "f").read_bytes(),
    "list": lambda top: os.listdir(top / "d"),
}


class Times:
    """The modification and change times of a file, of a directory in its directory, and of its directory."""

    def __init__(self, top: Path) -> None:
        top.mkdir()
        self._top = top
        (top / "d").mkdir()
        (top / "d" / "old").touch()
        (top / "f").write_bytes(bytes(9000))
        (top / "other").hardlink_to(top / "f")
        self._file = os.open(top / "f", os.O_RDONLY)  # its name differs in both
        self._before = self._now()

    def _now(self) -> list[int]:
        stats = os.fstat(self._file), (self._top / "d").stat(), self._top.stat()
        return [ns for st in stats for ns in (st.st_mtime_ns, st.st_ctime_ns)]

    def moved(self) -> list[bool]:
        """Return which of them are later than before."""
        moved = [new > old for new, old in zip(self._now(), self._before, strict=True)]
        os.close(self._file)
        return moved


def test_each_change_updates_the_same_times_as_on_the_backing(mounted: Mounted, plain: Path, writing: Options) -> None:
    mounted.start(*writing)
    tops = mounted.root, plain
    changes = dict(CHANGES)
    if code_of(lambda: os.setxattr(plain, "user.probe", b"")) != "none":
        del changes["xattr"]
    times = {(change, top): Times(top / change) for change in changes for top in tops}
    time.sleep(0.02)  # several ticks of the coarse clock
    for change, top in times:
        changes[change](top / change)
    for change in changes:
        through, elsewhere = (times[change, top].moved() for top in tops)
        assert through == elsewhere, change


def test_links_and_paths_work_up_to_their_limits(mounted: Mounted, plain: Path) -> None:
    mounted.start()

    def steps(top: Path) -> Answers:
        found: Answers = []
        for length in (1, 59, 60, 255, 1023, 4094, 4095, 4096):
            name = top / f"link{length}"
            found.append(code_of(lambda name=name, length=length: os.symlink("x" * length, name)))  # type: ignore[misc]
            found.append(os.readlink(name) == "x" * length if name.is_symlink() else None)
        (top / "loop").symlink_to("loop")
        found.append(code_of(lambda: (top / "loop").read_bytes()))
        here = os.getcwd()
        try:
            os.chdir(top)
            for _ in range(30):  # 6,000 bytes: longer than a path may be
                os.mkdir("d" * 200)
                os.chdir("d" * 200)
            Path("deep").write_bytes(b"deep")
            found += [Path("deep").read_bytes(), os.listdir(".")]
        finally:
            os.chdir(here)
        found.append(code_of(lambda: os.stat(top / "/".join(["d" * 200] * 30))))
        shell("rm -rf ddd*", top)
        return [*found, sorted(os.listdir(top))]

    both(mounted, plain, steps)


def test_locks_of_both_kinds_exclude_other_processes(mounted: Mounted) -> None:
    root = mounted.start()
    (root / "f").write_bytes(bytes(100))
    ask = (
        "import errno, fcntl, os, sys\nfd = os.open('f', os.O_RDWR)\nfound = []\n"
        "for call, *where in ((fcntl.flock,), (fcntl.lockf, 10, 0), (fcntl.lockf, 10, 50)):\n"
        "    try: call(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, *where); found.append('free')\n"
        "    except OSError as error: found.append('held')\n"
        "print(*found)"
    )

    def free() -> str:
        return subprocess.run(
            [sys.executable, "-c", ask], cwd=root, capture_output=True, text=True, timeout=60, check=True
        ).stdout.strip()

    with (root / "f").open("r+b") as file:
        assert free() == "free free free"
        fcntl.flock(file, fcntl.LOCK_EX)
        assert free() == "held free free"
        fcntl.lockf(file, fcntl.LOCK_EX, 10, 0)
        assert free() == "held held free"
        fcntl.flock(file, fcntl.LOCK_UN)
        assert free() == "free held free"
    assert free() == "free free free"


def test_every_kind_of_sync_works(mounted: Mounted, writing: Options) -> None:
    root = mounted.start(*writing)
    (root / "d").mkdir()
    fd, directory = os.open(root / "d" / "f", os.O_CREAT | os.O_RDWR), os.open(root / "d", os.O_RDONLY)
    for turn, sync in enumerate((os.fsync, os.fdatasync)):
        os.pwrite(fd, b"%d" % turn * 5000, turn * 5000)
        sync(fd)
        assert (mounted.source / "d" / "f").read_bytes()[turn * 5000 :] == b"%d" % turn * 5000
        sync(directory)
    for turn, flag in enumerate((os.O_SYNC, os.O_DSYNC)):
        synced = os.open(root / "d" / "f", os.O_WRONLY | flag)
        os.pwrite(synced, b"synced%d" % turn, 100 * turn)
        assert (mounted.source / "d" / "f").read_bytes()[100 * turn :][:7] == b"synced%d" % turn
        os.close(synced)
    os.close(fd)
    os.close(directory)
    os.sync()


def test_with_sync_every_write_is_on_the_backing_when_it_returns(mounted: Mounted) -> None:
    (mounted.source / "old").touch()
    root = mounted.start("--writeback", "-o", "sync")
    for name, flags in (("old", os.O_RDWR), ("new", os.O_RDWR | os.O_CREAT)):
        fd = os.open(root / name, flags, 0o644)
        os.write(fd, b"bytes")
        assert (mounted.source / name).read_bytes() == b"bytes"
        os.close(fd)


def test_seek_hole_reports_data_and_copies_are_whole(mounted: Mounted, writing: Options) -> None:
    """There is no handler for lseek: the whole file counts as data, which POSIX allows."""
    root = mounted.start(*writing)
    with (root / "f").open("wb") as file:
        file.seek(1 << 20)
        file.write(b"end")
    size = (1 << 20) + 3
    with (root / "f").open("rb") as file:
        assert os.lseek(file.fileno(), 5000, os.SEEK_DATA) == 5000
        assert os.lseek(file.fileno(), 5000, os.SEEK_HOLE) == size
        assert code_of(lambda: os.lseek(file.fileno(), size, os.SEEK_DATA)) == "ENXIO"
    shell("cp --sparse=always f g; cp --reflink=auto f h; cmp f g; cmp f h", root)
    assert (mounted.source / "g").stat().st_blocks < (mounted.source / "h").stat().st_blocks + 1
    assert (root / "g").stat().st_blocks == (mounted.source / "g").stat().st_blocks


def test_unsupported_calls_fail_and_programs_fall_back(mounted: Mounted) -> None:
    root = mounted.start()
    (root / "f").write_bytes(pages_of(1, 10))
    with (root / "f").open("r+b") as file, (root / "g").open("w+b") as other:
        punch = libc.FALLOC_FL_PUNCH_HOLE | libc.FALLOC_FL_KEEP_SIZE
        assert code_of(lambda: libc.fallocate(file.fileno(), punch, 0, 4096)) in ("ENOTSUP", "ENOSYS")
        done = 0
        while done < 10 * 4096:
            done += os.copy_file_range(file.fileno(), other.fileno(), 10 * 4096 - done, done, done)
        os.posix_fallocate(other.fileno(), 0, 20 * 4096)
        assert os.pread(other.fileno(), 1 << 20, 0) == pages_of(1, 10) + bytes(10 * 4096)
    assert code_of(lambda: os.open(root, os.O_TMPFILE | os.O_RDWR)) in ("ENOTSUP", "EISDIR")
