"""Changes by others that leave the stat of a file equal: each read is no older than the last open."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from tests.guestparts import MakeParts, Parts, make_parts
from tests.pagebytes import page_of, pages_of
from tests.scheduling import in_trio, wait_for_new_timestamp
from tmem.arena import PAGE_SIZE
from tmemfs.inodes.stamps import SECOND, Stamps
from tmemfs.io.files import OpenFile

__all__ = ["make_parts"]

STAMP = 1_700_000_001 * SECOND  # of a backing with whole seconds
GRAIN = 1.1
OLD, NEW = pages_of(1, 4), pages_of(2, 4)


@contextmanager
def same_stamps(path: Path) -> Iterator[None]:
    """Change a file as others do, but keep its mtime: a version here is size and mtime."""
    st = path.stat()
    yield
    os.utime(path, ns=(st.st_atime_ns, st.st_mtime_ns))


def coarse(make_parts: MakeParts, stamp: int = STAMP, **more: object) -> tuple[Parts, OpenFile, Path]:
    """Return the parts of a guest whose backing shows whole seconds, and a file that was just made."""
    parts = make_parts(version_by="size,mtime", stamps=Stamps(own_clock=None), **more)
    path = parts.directory / "f"
    path.write_bytes(OLD)
    os.utime(path, ns=(stamp, stamp))
    return parts, parts.open("f"), path


def rewrite(path: Path, data: bytes = NEW) -> None:
    """Overwrite a file as others do, within the grain of its stamp."""
    with same_stamps(path), path.open("r+b") as theirs:
        theirs.write(data)


async def reads_of(parts: Parts, data: bytes) -> int:
    """Open the file and read it; return how often the backing was read."""
    before = parts.backing.reads
    assert await parts.read(parts.open("f"), 0, len(data)) == data
    return parts.backing.reads - before


@pytest.mark.parametrize("where", ["cache", "pool", "in flight"])
@in_trio
async def test_a_rewrite_in_the_same_grain_is_seen_at_the_next_open(make_parts: MakeParts, where: str) -> None:
    parts, file, path = coarse(make_parts)
    parts.backing.after_read.shut = where == "in flight"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(parts.read, file, 0, len(OLD))
        await parts.backing.after_read.wait_held(int(where == "in flight"))
        if where == "pool":
            parts.evict_all()
            assert parts.pooled(file, 0)
        rewrite(path)
        again = parts.open("f")
        parts.backing.after_read.open()
    assert await parts.read(again, 0, len(NEW)) == NEW


@in_trio
async def test_each_open_within_the_grain_reads_again_and_one_after_it(make_parts: MakeParts) -> None:
    parts, file, path = coarse(make_parts)
    await parts.read(file, 0, len(OLD))
    for turn in range(5):
        rewrite(path, pages_of(turn, 4))
        assert await reads_of(parts, pages_of(turn, 4)) == 1
    rewrite(path)
    await trio.sleep(GRAIN)
    assert [await reads_of(parts, NEW) for _ in range(3)] == [1, 0, 0]


@in_trio
async def test_a_file_older_than_another_change_is_read_once(make_parts: MakeParts) -> None:
    parts, _, path = coarse(make_parts)
    later = parts.directory / "later"
    later.touch()
    os.utime(later, ns=(STAMP + 2 * SECOND,) * 2)
    parts.lookup("later")
    os.utime(path, ns=(STAMP - SECOND - 1,) * 2)  # so its version is new
    assert [await reads_of(parts, OLD) for _ in range(3)] == [1, 0, 0]


@in_trio
async def test_a_file_from_the_future_is_read_twice(make_parts: MakeParts) -> None:
    parts, file, _ = coarse(make_parts, 4_000_000_000 * SECOND)
    await parts.read(file, 0, len(OLD))
    await trio.sleep(2 * GRAIN)
    assert [await reads_of(parts, OLD) for _ in range(3)] == [1, 0, 0]


@pytest.mark.parametrize("writeback", [False, True])
@in_trio
async def test_a_rewrite_within_the_grain_of_our_write_is_seen_at_an_open(
    make_parts: MakeParts, writeback: bool
) -> None:
    parts, file, path = coarse(make_parts, writeback=writeback)
    await trio.sleep(GRAIN)
    assert await reads_of(parts, OLD) == 1
    await parts.writer.write(file, 100, b"own")
    if parts.writeback is not None:
        await parts.writeback.sync(file)
    rewrite(path)
    assert await reads_of(parts, NEW) == 1
    await trio.sleep(2 * GRAIN)
    assert [await reads_of(parts, NEW) for _ in range(3)] == [1, 0, 0]


@in_trio
async def test_our_writes_need_no_reread_where_each_change_has_its_own_stamp(make_parts: MakeParts) -> None:
    parts, file, _ = coarse(make_parts)
    await trio.sleep(GRAIN)
    assert await reads_of(parts, OLD) == 1
    parts.inodes._stamps.compare(file.inode.key[0], 5, 6)
    await parts.writer.write(file, 0, page_of(9))
    assert await reads_of(parts, page_of(9) + OLD[PAGE_SIZE:]) == 0


@pytest.mark.parametrize("writeback", [False, True])
@in_trio
async def test_a_write_by_others_before_the_stat_of_our_write_is_seen(
    make_parts: MakeParts, monkeypatch: pytest.MonkeyPatch, writeback: bool
) -> None:
    parts = make_parts(writeback=writeback)  # each change has its stamp
    file, path, pwrite = parts.make("f", OLD), parts.directory / "f", os.pwrite
    wait_for_new_timestamp()
    path.write_bytes(NEW)  # so others do write to it

    def before_others(fd: int, data: bytes, offset: int) -> int:
        written = pwrite(fd, data, offset)
        with path.open("r+b") as theirs:
            theirs.write(b"theirs")
        return written

    assert await reads_of(parts, NEW) == 1
    monkeypatch.setattr(os, "pwrite", before_others)
    await parts.writer.write(file, PAGE_SIZE, b"own")
    if parts.writeback is not None:
        await parts.writeback.sync(file)
    monkeypatch.undo()
    want = b"theirs" + NEW[6:PAGE_SIZE] + b"own" + NEW[PAGE_SIZE + 3 :]
    assert await reads_of(parts, want) == 1


@in_trio
async def test_a_write_by_others_between_two_calls_of_a_write_back_is_seen(
    make_parts: MakeParts,
) -> None:
    parts = make_parts(writeback=True)  # each change has its stamp
    assert parts.writeback is not None
    file, path = parts.make("f", OLD), parts.directory / "f"
    await parts.read(file, 0, len(OLD))
    await parts.writer.write(file, PAGE_SIZE, b"own")
    parts.backing.after_write.shut = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(parts.writeback.sync, file)
        await parts.backing.after_write.wait_held(1)  # the page is written, the time is not set yet
        with path.open("r+b") as theirs:
            theirs.write(b"theirs")
        parts.backing.after_write.open()
    want = b"theirs" + OLD[6:PAGE_SIZE] + b"own" + OLD[PAGE_SIZE + 3 :]
    assert await reads_of(parts, want) == 1


@pytest.mark.parametrize("where", ["cache", "pool"])
@pytest.mark.parametrize("waited", [0.0, GRAIN])
@in_trio
async def test_a_write_back_of_one_byte_writes_no_stale_bytes_of_its_page(
    make_parts: MakeParts, waited: float, where: str
) -> None:
    parts, file, path = coarse(make_parts, writeback=True)
    assert parts.writeback is not None
    await parts.read(file, 0, len(OLD))
    if where == "pool":
        parts.evict_all()
    rewrite(path)
    await trio.sleep(waited)
    await parts.writer.write(file, 10, b"own")
    await parts.writer.write(file, 3 * PAGE_SIZE - 2, b"own")
    await parts.writeback.sync(file)
    want = bytearray(NEW)
    want[10:13] = want[3 * PAGE_SIZE - 2 : 3 * PAGE_SIZE + 1] = b"own"
    assert parts.bytes_on_disk(file) == want


@in_trio
async def test_a_page_changed_by_others_is_read_again_before_a_partial_write(
    make_parts: MakeParts,
) -> None:
    parts, file, path = coarse(make_parts, writeback=True)
    assert parts.writeback is not None
    await parts.read(file, 0, len(OLD))
    path.write_bytes(NEW)  # with a stamp of its own; the file stays open
    await parts.writer.write(file, 10, b"own")
    await parts.writeback.sync(file)
    assert parts.bytes_on_disk(file) == NEW[:10] + b"own" + NEW[13:]


@in_trio
async def test_an_open_of_a_provisional_file_keeps_dirty_pages(make_parts: MakeParts) -> None:
    parts, file, path = coarse(make_parts, writeback=True)
    await parts.read(file, 0, len(OLD))
    await parts.writer.write(file, 0, page_of(9))
    with same_stamps(path), path.open("r+b") as theirs:
        theirs.seek(PAGE_SIZE)
        theirs.write(NEW[PAGE_SIZE:])
    want = page_of(9) + NEW[PAGE_SIZE:]
    assert await parts.read(parts.open("f"), 0, len(OLD)) == want
