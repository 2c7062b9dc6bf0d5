"""Files on a mount behave as files on the backing, at every limit."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.calls import code_of
from tests.mounted import Mounted, same_bytes
from tests.pagebytes import page_of

pytestmark = pytest.mark.mount
Options = tuple[str, ...]
PAGE = 4096


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 131_071, 131_073, 3_000_000])
def test_files_of_every_size_are_read_and_written_whole(mounted: Mounted, writing: Options, size: int) -> None:
    (mounted.source / "read").write_bytes(page_of(1, size))
    root = mounted.start(*writing)
    assert (root / "read").read_bytes() == page_of(1, size)
    (root / "written").write_bytes(page_of(2, size))
    assert (root / "written").stat().st_size == size
    same_bytes(mounted, "written")
    assert (root / "written").read_bytes() == page_of(2, size)


def test_reads_and_writes_past_limits_end_as_on_the_backing(mounted: Mounted, writing: Options) -> None:
    """Make the same calls on both and compare the answers."""
    root = mounted.start(*writing)

    def answers(directory: Path) -> list[object]:
        fd = os.open(directory / "f", os.O_CREAT | os.O_RDWR)
        found: list[object] = []
        try:
            os.pwrite(fd, b"abc", 0)
            found += [os.pread(fd, 100, 3), os.pread(fd, 100, 1 << 40), os.pread(fd, 0, 0), os.pwrite(fd, b"", 5)]
            found.append(os.fstat(fd).st_size)
            for offset in (-1, (1 << 63) - 1):
                found.append(code_of(lambda offset=offset: os.pread(fd, 10, offset)))  # type: ignore[misc]
                found.append(code_of(lambda offset=offset: os.pwrite(fd, b"x", offset)))  # type: ignore[misc]
            for size in (-1, 1 << 62):
                found.append(code_of(lambda size=size: os.ftruncate(fd, size)))  # type: ignore[misc]
            found.append(os.fstat(fd).st_size)
            found.append(code_of(lambda: os.lseek(fd, -1, os.SEEK_SET)))
            found.append(code_of(lambda: os.truncate(directory / "missing", 0)))
            found.append(code_of(lambda: os.truncate(directory, 0)))
        finally:
            os.close(fd)
        read_only = os.open(directory / "f", os.O_RDONLY)
        write_only = os.open(directory / "f", os.O_WRONLY)
        found.append(code_of(lambda: os.write(read_only, b"x")))
        found.append(code_of(lambda: os.read(write_only, 1)))
        os.close(read_only)
        os.close(write_only)
        found.append(code_of(lambda: os.open(directory, os.O_WRONLY)))
        found.append(code_of(lambda: os.open(directory / "f" / "g", os.O_RDONLY)))
        found.append(code_of(lambda: os.rmdir(directory / "f")))
        found.append((directory / "f").read_bytes())
        return found

    through = answers(root)
    (mounted.source / "f").unlink()
    assert through == answers(mounted.source)


def test_a_sparse_file_stays_sparse_and_reads_as_zeros(mounted: Mounted, writing: Options) -> None:
    root = mounted.start(*writing)
    with (root / "sparse").open("wb") as file:
        file.truncate(1 << 40)
        file.seek(1 << 39)
        file.write(b"middle")
    assert (root / "sparse").stat().st_size == 1 << 40
    assert (mounted.source / "sparse").stat().st_blocks <= 64
    with (root / "sparse").open("rb") as file:
        assert file.read(100_000) == bytes(100_000)
        file.seek((1 << 39) - 10)
        assert file.read(20) == bytes(10) + b"middle" + bytes(4)
        file.seek((1 << 40) - 5)
        assert file.read(100) == bytes(5)


def test_random_writes_truncates_and_reads_equal_a_model(mounted: Mounted, writing: Options) -> None:
    root = mounted.start(*writing)
    generator, model = random.Random(5), bytearray()
    fd = os.open(root / "f", os.O_CREAT | os.O_RDWR)
    for step in range(700):
        offset, size = generator.randrange(2_000_000), generator.choice([1, 100, 4096, 9000, 140_000])
        match generator.randrange(10):
            case 0:
                end = generator.randrange(2_000_000)
                os.ftruncate(fd, end)
                model = model[:end].ljust(end, b"\0")
            case 1 | 2 | 3 | 4:
                data = page_of(step, size)
                assert os.pwrite(fd, data, offset) == size
                model.extend(bytes(max(0, offset + size - len(model))))
                model[offset : offset + size] = data
            case 5 if generator.random() < 0.1:
                os.fsync(fd)
            case _:
                assert os.pread(fd, size, offset) == model[offset : offset + size]
    assert os.fstat(fd).st_size == len(model)
    os.close(fd)
    assert (mounted.source / "f").read_bytes() == model == (root / "f").read_bytes()


def test_appends_by_two_descriptors_do_not_overwrite_each_other(mounted: Mounted, writing: Options) -> None:
    root = mounted.start(*writing)
    one = os.open(root / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    two = os.open(root / "log", os.O_WRONLY | os.O_APPEND)
    for number in range(200):
        os.write(one if number % 2 else two, b"%05d\n" % number)
    os.close(one)
    os.close(two)
    same_bytes(mounted, "log")
    assert (root / "log").read_bytes() == b"".join(b"%05d\n" % number for number in range(200))
