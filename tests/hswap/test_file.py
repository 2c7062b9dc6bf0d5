"""The file .tmemfs/hswap of a real mount: offsets, sizes, O_DIRECT, mappings, concurrent writers, errors."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import Place, wait_until
from tests.mounted import Mounted

pytestmark = pytest.mark.mount
PAGE = 4096
SIZE = 4 << 20


@pytest.fixture
def mounted(place: Place) -> Iterator[Mounted]:
    """Return a mount with a swap-like file; it is unmounted and checked at teardown."""
    made = Mounted(place)
    try:
        made.start("--hswap", str(SIZE), "--hswap-overflow", os.fspath(overflow_of(place)), "--pool", "1M")
        yield made
        made.end()
    finally:
        made.stop_watchdog()
    assert not overflow_of(place).exists()


def overflow_of(place: Place) -> Path:
    return place.log.with_name("overflow")


def hswap_of(mounted: Mounted) -> Path:
    return mounted.root / ".tmemfs" / "hswap"


def arena_of(pid: int) -> Path:
    """Return the path of a mount's arena in /proc; other descriptors may be closed meanwhile."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if "tmem-arena" in os.readlink(entry):
                return entry
    raise AssertionError("the mount has no arena")


def test_the_file_has_a_size_and_mode_0600_and_is_not_listed(mounted: Mounted, place: Place) -> None:
    found = hswap_of(mounted).stat()
    assert found.st_size == SIZE
    assert stat.S_IMODE(found.st_mode) == stat.S_IMODE(overflow_of(place).stat().st_mode) == 0o600
    assert os.listdir(mounted.root) == os.listdir(mounted.root / ".tmemfs") == []


def test_writes_of_any_size_and_offset_are_read_back(mounted: Mounted) -> None:
    chance = random.Random(1)
    model = bytearray(SIZE)
    fd = os.open(hswap_of(mounted), os.O_RDWR)
    try:
        for _ in range(150):
            offset, size = chance.randrange(SIZE), chance.choice([1, 100, PAGE, 5000, 70_000, 300_000])
            data = chance.choice([bytes(size), b"\x11" * size, chance.randbytes(size)])[: SIZE - offset]
            assert os.pwrite(fd, data, offset) == len(data)
            model[offset : offset + len(data)] = data
            offset, size = chance.randrange(SIZE), chance.choice([1, 100, PAGE, 5000, 70_000, 300_000])
            assert os.pread(fd, size, offset) == model[offset : offset + size]
        os.fsync(fd)
        os.fdatasync(fd)
    finally:
        os.close(fd)
    assert hswap_of(mounted).read_bytes() == model
    stats = mounted.stats()
    assert stats["hswap_overflow_pages"] > 0
    assert stats["hswap_pool_pages"] > 0


def test_direct_io_and_a_shared_mapping_see_the_same_bytes(mounted: Mounted) -> None:
    fd = os.open(hswap_of(mounted), os.O_RDWR | os.O_DIRECT)
    try:
        with mmap.mmap(-1, 16 * PAGE) as block, mmap.mmap(fd, SIZE) as mapping:
            block[:] = random.Random(2).randbytes(16 * PAGE)
            assert os.pwritev(fd, [block], 8 * PAGE) == 16 * PAGE
            assert mapping[8 * PAGE : 24 * PAGE] == block[:]
            mapping[10 * PAGE : 10 * PAGE + 3] = b"abc"
            mapping.flush()
            assert os.preadv(fd, [block], 8 * PAGE) == 16 * PAGE
            assert block[2 * PAGE : 2 * PAGE + 3] == b"abc"
            mapping[SIZE - 1] = 7
    finally:
        os.close(fd)
    with hswap_of(mounted).open("rb") as file:
        file.seek(SIZE - 1)
        assert file.read() == b"\x07"


def test_concurrent_writers_of_one_page_keep_each_others_bytes(mounted: Mounted) -> None:
    writers, rounds, part = 8, 40, PAGE // 8

    def write(number: int) -> None:
        chance = random.Random(number)
        with hswap_of(mounted).open("r+b", buffering=0) as file:
            for _ in range(rounds):
                offset = chance.randrange(1000) * PAGE + number * part
                data = chance.randbytes(part)
                os.pwrite(file.fileno(), data, offset)
                assert os.pread(file.fileno(), part, offset) == data, f"{offset=}"

    fd = os.open(hswap_of(mounted), os.O_RDWR)
    for start in range(0, SIZE, 1 << 19):
        os.pwrite(fd, random.Random(start).randbytes(1 << 19), start)  # most of it overflows
    os.close(fd)
    with ThreadPoolExecutor(writers) as threads:
        list(threads.map(write, range(writers)))
    assert mounted.stats()["hswap_overflow_reads"] > 0


def test_the_size_is_fixed(mounted: Mounted) -> None:
    fd = os.open(hswap_of(mounted), os.O_RDWR)
    try:
        for size in (0, SIZE - PAGE, SIZE + PAGE):
            with pytest.raises(OSError, match="not permitted"):
                os.ftruncate(fd, size)
        os.ftruncate(fd, SIZE)
        assert os.pwrite(fd, b"x" * 100, SIZE - 10) == 10
        for offset in (SIZE, SIZE + 12345):
            with pytest.raises(OSError, match="No space"):
                os.pwrite(fd, b"x", offset)
            assert os.pread(fd, 10, offset) == b""
        assert os.fstat(fd).st_size == SIZE
    finally:
        os.close(fd)
    with pytest.raises(PermissionError):
        hswap_of(mounted).open("wb")
    with pytest.raises(OSError, match="not permitted"):
        hswap_of(mounted).unlink()


def test_zero_pages_and_same_filled_pages_take_no_memory(mounted: Mounted) -> None:
    before = mounted.stats()["pool_lent_bytes"]
    fd = os.open(hswap_of(mounted), os.O_RDWR)
    try:
        os.pwrite(fd, b"\x42" * (100 * PAGE), 0)
        stats = mounted.stats()
        assert stats["pool_lent_bytes"] == before
        assert stats["hswap_pool_pages"] == stats["pool_same_filled_pages"] == 100
        os.pwrite(fd, random.Random(1).randbytes(100 * PAGE), 0)
        assert mounted.stats()["pool_used_bytes"] >= 99 * PAGE
        os.pwrite(fd, bytes(100 * PAGE), 0)
        stats = mounted.stats()
        assert stats["hswap_pool_pages"] == stats["hswap_overflow_pages"] == stats["pool_used_bytes"] == 0
        assert stats["hswap_flushes"] == 100
        assert os.pread(fd, 100 * PAGE, 0) == bytes(100 * PAGE)
    finally:
        os.close(fd)


def test_a_flipped_bit_is_an_error_that_names_the_page(mounted: Mounted) -> None:
    process = mounted.process
    assert process is not None
    fd = os.open(hswap_of(mounted), os.O_RDWR)
    try:
        os.pwrite(fd, random.Random(1).randbytes(3 * PAGE), 7 * PAGE)
        arena = os.open(arena_of(process.pid), os.O_RDWR)
        content = os.pread(arena, 3 * PAGE, 0)
        assert content.strip(b"\0"), "the first slab is the one in use"
        os.pwrite(arena, bytes(byte ^ 1 for byte in content), 0)
        os.close(arena)
        for page in (7, 8, 9):
            with pytest.raises(OSError, match="Input/output") as caught:
                os.pread(fd, PAGE, page * PAGE)
            assert caught.value.errno == errno.EIO
        lines = [f"page {page} of the swap-like file" for page in (7, 8, 9)]
        wait_until(lambda: all(line in mounted.log() for line in lines), "the log says so")
        assert os.pread(fd, PAGE, 0) == bytes(PAGE)
        new = random.Random(2).randbytes(3 * PAGE)
        os.pwrite(fd, new, 7 * PAGE)
        assert os.pread(fd, 3 * PAGE, 7 * PAGE) == new
        assert mounted.stats()["hswap_corrupt"] >= 3
    finally:
        os.close(fd)
