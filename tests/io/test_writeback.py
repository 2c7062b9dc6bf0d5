"""Write-back: dirty pages are bounded, written by age, fsync, close and setattr, and never lost."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Collection

import pytest
import trio
import trio.testing

from tests.guestparts import MakeParts, Parts, make_parts
from tests.io.concurrent import concurrent_requests
from tests.pagebytes import MIB, page_of, pages_of
from tests.scheduling import in_trio, wait_for_new_timestamp
from tmem.arena import PAGE_SIZE
from tmemfs.cache.file import File
from tmemfs.io.files import OpenFile
from tmemfs.io.writeback import MAX_AGE
from tmemfs.namespace.namespace import Namespace

__all__ = ["make_parts"]


async def flush(parts: Parts, file: OpenFile) -> None:
    """Write a file back as close(2) does."""
    assert parts.writeback is not None
    await parts.writeback.sync(file, closing=True)


@in_trio
async def test_a_write_is_in_memory_only_until_it_is_flushed(make_parts: MakeParts) -> None:
    parts = make_parts(writeback=True)
    data = pages_of(1, 8)
    file = parts.make("f", data)
    assert await parts.writer.write(file, 5000, b"new") == 3
    assert parts.bytes_on_disk(file) == data
    assert parts.memory.dirty_pages == 1
    want = data[:5000] + b"new" + data[5003:]
    assert await parts.read(file, 0, len(data)) == want
    await flush(parts, file)
    assert parts.bytes_on_disk(file) == want
    assert parts.memory.dirty_pages == 0
    assert parts.inodes.invalidations == 0
    assert parts.cached_pages(file)


@in_trio
async def test_dirty_pages_are_written_back_by_age(make_parts: MakeParts) -> None:
    parts = make_parts(writeback=True)
    file = parts.make("f", bytes(9000))
    async with parts.running():
        began = trio.current_time()
        await parts.writer.write(file, 0, b"new")
        while parts.memory.dirty_pages:
            assert parts.bytes_on_disk(file)[:3] == bytes(3)
            await trio.sleep(0.1)
        assert MAX_AGE <= trio.current_time() - began <= MAX_AGE * 1.5
    assert parts.bytes_on_disk(file)[:3] == b"new"


@in_trio
async def test_a_hanging_file_does_not_stop_the_write_back_of_others(make_parts: MakeParts) -> None:
    parts = make_parts(writeback=True)
    stuck, fine = parts.make("stuck", bytes(9000)), parts.make("fine", bytes(9000))
    parts.backing.before_write.shut = True
    async with parts.running():
        await parts.writer.write(stuck, 0, b"new")
        await trio.sleep(0.5)
        await parts.writer.write(fine, 0, b"new")
        await trio.sleep(MAX_AGE * 2)
        await parts.backing.before_write.wait_held(2)
        parts.backing.before_write.open()
        await trio.testing.wait_all_tasks_blocked()
    assert parts.bytes_on_disk(fine)[:3] == parts.bytes_on_disk(stuck)[:3] == b"new"


@in_trio
async def test_dirty_pages_never_exceed_a_quarter_of_the_cache(make_parts: MakeParts) -> None:
    parts = make_parts(cache=64 * PAGE_SIZE, writeback=True)
    files = [parts.make(f"f{number}", b"") for number in range(3)]
    want = [bytearray() for _ in files]
    generator = random.Random(1)
    for number in range(300):
        which = generator.randrange(3)
        size = generator.choice([10, 4096, 30_000, 200_000])
        data = page_of(number, size)
        offset = generator.randrange(300_000)
        await parts.writer.write(files[which], offset, data)
        want[which].extend(bytes(max(0, offset + size - len(want[which]))))
        want[which][offset : offset + size] = data
        assert parts.memory.dirty_pages <= 16
        parts.check()
    for file, expected in zip(files, want, strict=True):
        assert await parts.read(file, 0, 1 << 20) == expected
        await flush(parts, file)
        assert parts.bytes_on_disk(file) == expected


@in_trio
async def test_concurrent_writers_keep_within_the_bound_of_dirty_pages(make_parts: MakeParts) -> None:
    parts = make_parts(cache=64 * PAGE_SIZE, writeback=True)
    files = [parts.make(f"f{number}", pages_of(number, 20)) for number in range(8)]
    parts.backing.after_read.shut = True
    async with trio.open_nursery() as nursery:
        for file in files:  # each writes parts of pages, so each first reads the edges
            file.stream.max_pages = 0
            nursery.start_soon(parts.writer.write, file, 100, b"n" * 10 * PAGE_SIZE)
        await parts.backing.after_read.wait_held(8)
        parts.backing.after_read.open()
    assert parts.memory.dirty_pages <= 16
    for number, file in enumerate(files):
        data = pages_of(number, 20)
        want = data[:100] + b"n" * 10 * PAGE_SIZE + data[100 + 10 * PAGE_SIZE :]
        assert await parts.read(file, 0, len(want)) == want
        await flush(parts, file)
        assert parts.bytes_on_disk(file) == want


@pytest.mark.parametrize("seed", range(8))
@in_trio
async def test_a_page_written_in_part_keeps_its_other_bytes_under_pressure(make_parts: MakeParts, seed: int) -> None:
    parts = make_parts(cache=24 * PAGE_SIZE, pool=MIB // 4, writeback=True)
    generator = random.Random(seed)
    file, other = parts.make("f", pages_of(seed, 40)), parts.make("other", pages_of(99, 60))
    want = bytearray(pages_of(seed, 40))
    async with parts.running():
        for number in range(150):
            await parts.read(other, generator.randrange(60) * PAGE_SIZE, 3 * PAGE_SIZE)
            offset, size = generator.randrange(len(want) - 25_000), generator.randrange(1, 24_000)
            data = page_of(number, size)
            await parts.writer.write(file, offset, data)
            want[offset : offset + size] = data
            if generator.random() < 0.2:
                await flush(parts, file)
                parts.evict_all()
        assert await parts.read(file, 0, len(want)) == want
    await flush(parts, file)
    assert parts.bytes_on_disk(file) == want


@in_trio
async def test_a_page_that_leaves_the_cache_during_a_write_in_part_keeps_its_other_bytes(
    make_parts: MakeParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = make_parts(writeback=True, drain_thread=False)
    file, data = await parts.make_cached(4)
    make_dirty = File.make_dirty

    def evict_and_make_dirty(content: File, first: int, last: int, partial: Collection[int] = ()) -> bool:
        parts.evict_all()  # as the engine's thread may, after the page was looked up
        return make_dirty(content, first, last, partial)

    monkeypatch.setattr(File, "make_dirty", evict_and_make_dirty)
    await parts.writer.write(file, PAGE_SIZE + 10, b"new")
    data[PAGE_SIZE + 10 : PAGE_SIZE + 13] = b"new"
    assert await parts.read(file, 0, len(data)) == data
    await flush(parts, file)
    assert parts.bytes_on_disk(file) == data


@in_trio
async def test_a_write_to_a_part_of_a_page_in_the_pool_is_delayed(make_parts: MakeParts) -> None:
    parts = make_parts(writeback=True, cache=64 * PAGE_SIZE, drain_thread=False)
    file, data = await parts.make_cached(40)
    parts.evict_all()
    await parts.read(parts.make("other", pages_of(2, 64)), 0, 64 * PAGE_SIZE)  # a full cache brings few pages up
    for index in range(8):
        at = index * PAGE_SIZE + 10
        await parts.writer.write(file, at, b"new")
        data[at : at + 3] = b"new"
    assert parts.dirty_pages(file) == set(range(8))
    assert parts.backing.pages == 40 + 64, "the rest of each page came from the pool"
    assert await parts.read(file, 0, len(data)) == data
    await flush(parts, file)
    assert parts.bytes_on_disk(file) == data


@in_trio
async def test_a_dirty_file_may_be_larger_than_on_the_backing(make_parts: MakeParts) -> None:
    parts = make_parts(writeback=True)
    file = parts.make("f", b"begin")
    await parts.writer.write(file, 100_000, b"end")
    assert file.inode.file.size == 100_003
    assert parts.bytes_on_disk(file) == b"begin"
    want = b"begin".ljust(100_000, b"\0") + b"end"
    assert await parts.read(file, 0, 1 << 20) == want
    assert await parts.read(file, 50_000, 100) == bytes(100)
    await flush(parts, file)
    assert parts.bytes_on_disk(file) == want == await parts.read(file, 0, 1 << 20)


@in_trio
async def test_a_hole_read_while_the_end_is_written_back_is_not_the_end_of_file(make_parts: MakeParts) -> None:
    parts = make_parts(writeback=True)
    file = parts.make("f", b"begin")
    file.stream.max_pages = 0
    await parts.writer.write(file, 100_000, b"end")
    parts.backing.after_read.shut = True
    async with concurrent_requests(parts) as requests:
        requests.read("hole", file, 8 * PAGE_SIZE, 2 * PAGE_SIZE)
        await parts.backing.after_read.wait_held(1)  # the backing has nothing there yet
        await flush(parts, file)
        parts.backing.after_read.open()
    assert requests.answers == {"hole": bytes(2 * PAGE_SIZE)}


@in_trio
async def test_a_failed_flush_keeps_the_pages_and_reports_the_error_once(make_parts: MakeParts) -> None:
    parts = make_parts(writeback=True)
    file = parts.make("f", bytes(30_000))
    await parts.writer.write(file, 4000, b"n" * 9000)
    parts.backing.data_error = OSError(errno.ENOSPC, "no space")
    with pytest.raises(OSError, match="no space"):
        await flush(parts, file)
    assert parts.memory.dirty_pages == 4
    assert (await parts.read(file, 4000, 9000)) == b"n" * 9000
    async with parts.running():
        await trio.sleep(MAX_AGE * 3)  # tried again without success
        assert parts.memory.dirty_pages == 4
        parts.backing.data_error = None
        await trio.sleep(MAX_AGE * 3)
    assert parts.memory.dirty_pages == 0
    assert parts.bytes_on_disk(file)[4000:13_000] == b"n" * 9000
    with pytest.raises(OSError, match="no space"):
        await parts.writer.sync(file, data_only=False)
    await parts.writer.sync(file, data_only=False)


@in_trio
async def test_fsync_and_a_change_of_attributes_flush_first(make_parts: MakeParts) -> None:
    parts = make_parts(writeback=True)
    file = parts.make("f", bytes(9000))
    await parts.writer.write(file, 10, b"one")
    await parts.writer.sync(file, data_only=True)
    assert parts.bytes_on_disk(file)[10:13] == b"one"
    await parts.writer.write(file, 10, b"two")
    fd = file.fd
    await parts.writer.change(file.inode, lambda: os.utime(fd, (5, 7)), lambda: os.fstat(fd))
    assert parts.bytes_on_disk(file)[10:13] == b"two"
    assert os.fstat(fd).st_mtime == 7


@in_trio
async def test_a_truncate_drops_dirty_pages_beyond_the_end(make_parts: MakeParts) -> None:
    parts = make_parts(writeback=True)
    file = parts.make("f", b"")
    await parts.writer.write(file, 0, b"n" * 50_000)
    await parts.truncate(file, 10_000)
    await parts.writer.write(file, 60_000, b"end")
    want = (b"n" * 10_000).ljust(60_000, b"\0") + b"end"
    assert await parts.read(file, 0, 1 << 20) == want
    await flush(parts, file)
    assert parts.bytes_on_disk(file) == want


@in_trio
async def test_write_back_sets_the_time_of_the_last_write(make_parts: MakeParts) -> None:
    parts = make_parts(writeback=True)
    file = parts.make("f", bytes(9000))
    await parts.writer.write(file, 10, b"one")
    assert parts.writeback is not None
    shown = parts.writeback.dirty_mtime_ns[file.inode]
    await flush(parts, file)
    assert os.fstat(file.fd).st_mtime_ns == shown


@in_trio
async def test_changes_by_others_while_pages_were_dirty_are_seen_at_an_open(make_parts: MakeParts) -> None:
    parts = make_parts(writeback=True)
    file, _ = await parts.make_cached(20)
    await parts.writer.write(file, 0, b"own")
    wait_for_new_timestamp()
    with (parts.directory / "f").open("r+b") as others:
        others.seek(5 * PAGE_SIZE)
        others.write(page_of(77))
    await flush(parts, file)
    parts.open("f")
    assert await parts.read(file, 0, 20 * PAGE_SIZE) == parts.bytes_on_disk(file)


@in_trio
async def test_write_back_continues_when_a_file_is_dropped_during_its_flush(make_parts: MakeParts) -> None:
    """An unlinked file is closed while it is being written back by age."""
    parts = make_parts(writeback=True)
    file = parts.make("f", b"")
    for index in (0, 5, 9):  # three runs
        await parts.writer.write(file, index * PAGE_SIZE, page_of(index))
    parts.backing.after_write.shut = True
    async with parts.running():
        await trio.sleep(MAX_AGE * 1.5)
        await parts.backing.after_write.wait_held(1)
        os.unlink(parts.directory / "f")
        file.inode.unlinked = True
        parts.files.remove(file.number)
        file.inode.file.forget()
        parts.backing.after_write.open()
        await trio.testing.wait_all_tasks_blocked()
        assert parts.writeback is not None
        other = parts.make("other", b"")
        await parts.writer.write(other, 0, b"still alive")
        await trio.sleep(MAX_AGE * 1.5)
    assert parts.bytes_on_disk(other) == b"still alive"


@in_trio
async def test_a_synchronous_file_is_on_the_backing_when_the_write_returns(make_parts: MakeParts) -> None:
    parts = make_parts(writeback=True)
    file = parts.make("f", bytes(9000), os.O_RDWR | os.O_SYNC)
    await parts.writer.write(file, 10, b"new")
    assert parts.bytes_on_disk(file)[10:13] == b"new"


@pytest.mark.timeout(20)
@in_trio
async def test_a_backing_that_writes_no_bytes_is_an_error(
    make_parts: MakeParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = make_parts(writeback=True)
    file = parts.make("f", bytes(9000))
    await parts.writer.write(file, 10, b"new")
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: 0)
    with pytest.raises(OSError, match="Input/output error"):
        await flush(parts, file)
    assert parts.memory.dirty_pages == 1
    monkeypatch.undo()
    assert parts.writeback is not None
    assert await parts.writeback.finish() == []
    assert parts.bytes_on_disk(file)[10:13] == b"new"


@in_trio
async def test_an_append_follows_the_dirty_pages_or_fails_with_them(make_parts: MakeParts) -> None:
    parts = make_parts(writeback=True)
    plain = parts.make("f", b"begin")
    appending = parts.open("f", os.O_RDWR | os.O_APPEND)
    await parts.writer.write(plain, 9000, b"dirty")
    parts.backing.data_error = OSError(errno.ENOSPC, "no space")
    with pytest.raises(OSError, match="no space"):
        await parts.writer.write(appending, 9005, b"appended")
    assert await parts.read(plain, 0, 1 << 20) == b"begin".ljust(9000, b"\0") + b"dirty"
    parts.backing.data_error = None
    await parts.writer.write(appending, 9005, b"appended")
    want = b"begin".ljust(9000, b"\0") + b"dirtyappended"
    assert await parts.read(plain, 0, 1 << 20) == want == parts.bytes_on_disk(plain)


@in_trio
async def test_write_only_files_and_large_writes_are_written_through(make_parts: MakeParts) -> None:
    parts = make_parts(cache=64 * PAGE_SIZE, writeback=True)
    only = parts.make("only", bytes(9000), os.O_WRONLY)
    await parts.writer.write(only, 10, b"new")
    assert (parts.directory / "only").read_bytes()[10:13] == b"new"
    large = parts.make("large", b"")
    await parts.writer.write(large, 10, b"x" * 17 * PAGE_SIZE)
    assert parts.bytes_on_disk(large)[10:] == b"x" * 17 * PAGE_SIZE


@in_trio
async def test_finish_writes_everything_and_returns_the_failed_files(make_parts: MakeParts) -> None:
    parts = make_parts(writeback=True)
    assert parts.writeback is not None
    files = [parts.make(f"f{number}", b"") for number in range(3)]
    for file in files:
        await parts.writer.write(file, 0, b"new")
    parts.backing.data_error = OSError(errno.EIO, "")
    assert await parts.writeback.finish() == [file.inode for file in files]
    parts.backing.data_error = None
    assert await parts.writeback.finish() == []
    assert [parts.bytes_on_disk(file) for file in files] == [b"new"] * 3


@in_trio
async def test_unlinking_a_closed_dirty_file_closes_its_descriptor(make_parts: MakeParts) -> None:
    parts = make_parts(writeback=True)
    file = parts.make("f", b"")
    await parts.writer.write(file, 0, b"dirty")
    parts.backing.data_error = OSError(errno.ENOSPC, "no space")
    with pytest.raises(OSError, match="no space"):
        await flush(parts, file)
    parts.files.remove(file.number)
    assert file.users, "the write-back will be tried again"
    os.unlink(parts.directory / "f")
    parts.inodes.record_unlink(file.inode, 0)
    assert parts.memory.dirty_pages == 0
    assert not file.users, "the descriptor is closed, which frees the space"
    async with parts.running():
        await trio.sleep(MAX_AGE * 3)
    assert not file.inode.errors.failing


@in_trio
async def test_suspended_write_back_writes_everything_and_dirties_nothing(make_parts: MakeParts) -> None:
    parts = make_parts(writeback=True)
    assert parts.writeback is not None
    one, two = parts.make("one", bytes(9000)), parts.make("two", bytes(9000))
    for file in (one, two):
        await parts.writer.write(file, 10, b"new")
    parts.backing.before_write.shut = True
    async with parts.running():
        parts.writeback.suspend()
        await parts.backing.before_write.wait_held(2)
        assert dict(parts.writeback.unwritten()) == {one.inode: None, two.inode: None}
        parts.backing.data_error = OSError(errno.EIO, "broken")
        parts.backing.before_write.open()
        await trio.testing.wait_all_tasks_blocked()
        assert [str(error) for _, error in parts.writeback.unwritten()] == ["[Errno 5] broken"] * 2
        parts.backing.data_error = None
        parts.writeback.suspend()
        assert [error for _, error in parts.writeback.unwritten()] == [None, None], "both will be tried again"
        await trio.testing.wait_all_tasks_blocked()
        assert not list(parts.writeback.unwritten())
        await parts.writer.write(one, 10, b"thr")
        assert parts.bytes_on_disk(one)[10:13] == b"thr"
        assert parts.memory.dirty_pages == 0
        parts.writeback.resume()
        await parts.writer.write(one, 10, b"dir")
        assert parts.memory.dirty_pages == 1
        for file in (one, two):
            with pytest.raises(OSError, match="broken"):
                await flush(parts, file)


@in_trio
async def test_an_unlinked_dirty_file_closes_its_descriptor_once(make_parts: MakeParts) -> None:
    parts = make_parts(writeback=True)
    opener = Namespace(parts).opener
    file = parts.make("f", b"")
    await parts.writer.write(file, 0, b"dirty")
    os.unlink(parts.directory / "f")
    parts.inodes.record_unlink(file.inode, 0)
    await opener.close(file)  # a second close(2) would fail with EBADF, or close another file
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(file.fd)
    assert parts.memory.dirty_pages == 0
