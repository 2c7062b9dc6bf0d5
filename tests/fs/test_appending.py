"""O_APPEND: appends by several writers, on the mount and underneath, are all kept, whole and in each writer's order."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import Place
from tests.mounted import SMALL, Mounted
from tests.pagebytes import pages_of

pytestmark = pytest.mark.mount
Options = tuple[str, ...]
APPEND = os.O_APPEND | os.O_CREAT


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """Open a file for the block: a descriptor left open by a failed test would keep its mount busy."""
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.mark.parametrize("options", [(), ("--writeback",), ("--watch",), ("--throttle", "latency=20us")], ids=str)
def test_appends_on_both_sides_lose_nothing_and_are_read_at_once(mounted: Mounted, options: Options) -> None:
    root = mounted.start(*options)
    want = b""
    with (
        opened(root / "log", APPEND | os.O_RDWR) as here,
        opened(mounted.source / "log", APPEND | os.O_WRONLY) as there,
    ):
        for number in range(60):
            theirs = b"theirs %d\n" % number * (number % 3)
            ours = pages_of(number, 1) * (number % 20 == 7) + b"ours %d\n" % number
            os.write(there, theirs)
            os.write(here, ours)
            want += theirs + ours
            assert os.fstat(here).st_size == os.lseek(here, 0, os.SEEK_END) == len(want)
            assert os.pread(here, 1 << 20, 0) == want
            if number % 10 == 0:  # the kernel writes mapped pages, up to the size that it knows
                with mmap.mmap(here, 0, prot=mmap.PROT_READ) as view:
                    assert view[:] == want
    assert (mounted.source / "log").read_bytes() == (root / "log").read_bytes() == want


WRITER = """
import os, sys
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)
for number in range(100):
    os.write(fd, b"%s %d " % (sys.argv[2].encode(), number) + b"." * (number * 37 % 500) + b"\\n")
os.close(fd)
"""


def test_processes_on_two_mounts_and_the_source_append_to_one_file(
    mounted: Mounted, place: Place, tmp_path: Path, writing: Options
) -> None:
    root, second = mounted.start(*writing), tmp_path / "second"
    second.mkdir()
    other = place.serve(*SMALL, *writing, mountpoint=second)
    (mounted.source / "log").touch()
    places = [root, root, second, mounted.source]
    try:
        writers = [
            subprocess.Popen([sys.executable, "-c", WRITER, at / "log", f"writer{number}"])
            for number, at in enumerate(places)
        ]
        assert [writer.wait(60) for writer in writers] == [0] * len(writers)
    finally:
        other.terminate()
        other.communicate(timeout=60)
    lines = (mounted.source / "log").read_bytes().splitlines(keepends=True)
    for number in range(len(places)):
        mine = [line for line in lines if line.startswith(b"writer%d " % number)]
        assert mine == [b"writer%d %d " % (number, i) + b"." * (i * 37 % 500) + b"\n" for i in range(100)]
    assert (root / "log").read_bytes() == b"".join(lines)


def test_a_mapping_of_an_o_append_file_is_written_in_place(mounted: Mounted, writing: Options) -> None:
    root = mounted.start(*writing)
    if "shared mmap on" not in mounted.log():
        pytest.skip("missing: shared mmap on direct I/O (Linux 6.6)")
    data = bytearray(pages_of(1, 3)[:10_000])
    (root / "f").write_bytes(data)
    with opened(root / "f", os.O_RDWR | os.O_APPEND) as fd, mmap.mmap(fd, 0) as view:
        for start in (0, 4200, 9990):  # the first page, one in the middle, and the last
            view[start : start + 5] = data[start : start + 5] = b"store"
            view.flush()
            assert (mounted.source / "f").read_bytes() == data
            os.write(fd, b"added %d" % start)
            data += b"added %d" % start
            assert (mounted.source / "f").read_bytes() == data
    assert (root / "f").read_bytes() == data


@pytest.mark.parametrize("reads", [False, True])
def test_whole_pages_are_appended_although_the_kernels_size_is_old(
    mounted: Mounted, writing: Options, reads: bool
) -> None:
    root = mounted.start(*writing, "--attr-timeout", "0")
    want = pages_of(0, 1)
    (mounted.source / "log").write_bytes(want)
    with (
        opened(root / "log", APPEND | os.O_RDWR) as here,
        opened(mounted.source / "log", APPEND | os.O_WRONLY) as there,
    ):
        for number in range(1, 6):
            if reads:
                assert os.pread(here, 1 << 20, 0) == want
            for part in range(number % 3):
                os.write(there, pages_of(100 * number + part, 1))
                want += pages_of(100 * number + part, 1)
                os.stat(root / "log")  # so that this mount knows its size, and perhaps the kernel
            os.write(here, pages_of(number, 1))
            want += pages_of(number, 1)
    assert (mounted.source / "log").read_bytes() == (root / "log").read_bytes() == want


def test_appends_follow_dirty_bytes_written_before(mounted: Mounted, writing: Options) -> None:
    root = mounted.start(*writing)
    (mounted.source / "f").write_bytes(b"old content")
    with (
        opened(root / "f", APPEND | os.O_WRONLY | os.O_TRUNC) as truncating,
        opened(root / "f", os.O_RDWR) as plain,
    ):
        os.write(truncating, b"one ")
        os.pwrite(plain, b"two and more ", 4)  # dirty with --writeback, and beyond the end of the backing
        os.write(truncating, b"three ")
        os.pwrite(plain, b"ONE", 0)
        os.ftruncate(plain, 8)
        os.write(truncating, b"four")
        assert os.pread(plain, 100, 0) == b"ONE two four"
        os.fsync(plain)
        assert (mounted.source / "f").read_bytes() == b"ONE two four"
