"""Errors of write-backs: every open file reports each error once, and no acknowledged byte is lost."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest
import trio

from tests.guestparts import MakeParts, Parts, make_parts
from tests.pagebytes import page_of
from tests.scheduling import in_trio
from tmem.arena import PAGE_SIZE
from tmemfs.io.files import OpenFile
from tmemfs.io.writeback import MAX_AGE

__all__ = ["make_parts"]

FULL = OSError(errno.ENOSPC, "no space")


async def fsync_fails(parts: Parts, file: OpenFile) -> bool:
    """Return whether an fsync raises the error."""
    file.inode.errors.check()
    try:
        await parts.writer.sync(file, data_only=False)
    except OSError as error:
        return error.errno == errno.ENOSPC
    return False


async def fail_once(parts: Parts, file: OpenFile) -> None:
    """Make write-back by age fail for a while, then succeed."""
    await parts.writer.write(file, 0, b"new")
    async with parts.running():
        parts.backing.data_error = FULL
        await trio.sleep(MAX_AGE * 5)
        parts.backing.data_error = None
        await trio.sleep(MAX_AGE * 3)
    assert not parts.dirty_pages(file)


@in_trio
async def test_each_open_file_reports_each_error_once(make_parts: MakeParts) -> None:
    parts = make_parts(writeback=True)
    files = [parts.make("f", bytes(9000)), parts.open("f"), parts.open("f", os.O_RDONLY)]
    for _ in range(2):
        await fail_once(parts, files[0])
        for file in files:
            assert await fsync_fails(parts, file)
            assert not await fsync_fails(parts, file)


@in_trio
async def test_a_retry_that_fails_again_is_the_same_error(
    make_parts: MakeParts, caplog: pytest.LogCaptureFixture
) -> None:
    parts = make_parts(writeback=True)
    file = parts.make("f", bytes(9000))
    await parts.writer.write(file, 0, b"new")
    async with parts.running():
        parts.backing.data_error = FULL
        await trio.sleep(MAX_AGE * 3)
        for _ in range(3):
            assert await fsync_fails(parts, file), "the page is not on the backing yet"
        await trio.sleep(MAX_AGE * 5)
        parts.backing.data_error = None
    assert [record.getMessage() for record in caplog.records] == [
        "f: write-back failed: no space; it will be tried again"
    ]
    assert not await fsync_fails(parts, file)
    assert parts.bytes_on_disk(file)[:3] == b"new"


@in_trio
async def test_an_unreported_error_is_reported_by_the_next_open_file(make_parts: MakeParts) -> None:
    parts = make_parts(writeback=True)
    await fail_once(parts, parts.make("f", bytes(9000)))
    assert await fsync_fails(parts, parts.open("f"))
    assert not await fsync_fails(parts, parts.open("f"))


@in_trio
async def test_an_error_reported_by_close_is_still_reported_by_fsync(make_parts: MakeParts) -> None:
    parts = make_parts(writeback=True)
    file = parts.make("f", bytes(9000))
    assert parts.writeback is not None
    await fail_once(parts, file)
    for _ in range(2):  # one close(2) for each copy of the descriptor
        with pytest.raises(OSError, match="no space"):
            await parts.writeback.sync(file, closing=True)
    assert await fsync_fails(parts, file)
    await parts.writeback.sync(file, closing=True)
    await parts.writeback.sync(parts.open("f"), closing=True)


@in_trio
async def test_a_file_of_another_user_is_written_back(make_parts: MakeParts, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = make_parts(writeback=True)
    file = parts.make("f", bytes(9000))

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EPERM, "only the owner sets other times than now")

    monkeypatch.setattr(os, "utime", refuse)
    await parts.writer.write(file, 0, b"new")
    await parts.writer.sync(file, data_only=False)
    assert parts.bytes_on_disk(file)[:3] == b"new"
    assert not parts.dirty_pages(file)


@in_trio
async def test_a_synchronous_write_goes_through_its_own_descriptor(
    make_parts: MakeParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = make_parts(writeback=True)
    plain, synchronous = parts.make("f", bytes(9000)), parts.open("f", os.O_RDWR | os.O_SYNC)
    await parts.writer.write(plain, 5000, b"earlier")
    used: list[tuple[int, int]] = []
    pwrite = os.pwrite

    def write(fd: int, data: bytes, offset: int) -> int:
        used.append((fd, offset))
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", write)
    await parts.writer.write(synchronous, 5003, b"on disk")
    assert used[-1] == (synchronous.fd, 5003)
    assert parts.bytes_on_disk(plain)[5000:5010] == b"earon disk"


@pytest.mark.parametrize("taken", [5000, None])
@in_trio
async def test_bytes_written_through_are_not_overwritten_by_older_dirty_pages(
    make_parts: MakeParts, monkeypatch: pytest.MonkeyPatch, taken: int | None
) -> None:
    """Write-back fails; bytes that are written through then are newer than the dirty pages."""
    parts = make_parts(writeback=True)
    file, other = parts.make("f", b""), parts.open("f", os.O_WRONLY)
    await parts.writer.write(file, 0, page_of(1) + page_of(2))
    flush = parts.writeback.flush if parts.writeback is not None else None

    async def fail(inode: object) -> OSError:
        return FULL

    monkeypatch.setattr(parts.writeback, "flush", fail)
    parts.backing.short_write = taken
    data = page_of(3) + page_of(4) + page_of(5)
    assert await parts.writer.write(other, 0, data) == (taken or len(data))
    want = data[:taken] + (page_of(1) + page_of(2))[len(data[:taken]) :]
    assert await parts.read(file, 0, 4 * PAGE_SIZE) == want
    monkeypatch.setattr(parts.writeback, "flush", flush)
    await parts.writer.sync(file, data_only=False)
    assert parts.bytes_on_disk(file) == want
