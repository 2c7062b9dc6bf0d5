"""Write-through: the backing has the bytes before the write returns, and cached pages agree with it."""

from __future__ import annotations

import errno
import os
import random

import pytest
import trio
import trio.testing

from tests.guestparts import MakeParts, make_parts
from tests.pagebytes import page_of, pages_of
from tests.scheduling import in_trio, wait_for_new_timestamp
from tmem.arena import PAGE_SIZE

__all__ = ["make_parts"]


@in_trio
async def test_a_finished_write_is_on_the_backing_and_read_back_from_memory(make_parts: MakeParts) -> None:
    parts = make_parts()
    file, data = await parts.make_cached(30)
    generator = random.Random(1)
    for number in range(100):
        offset, size = generator.randrange(40 * PAGE_SIZE), generator.choice([1, 100, 4096, 9000])
        patch = page_of(number, size)
        assert await parts.writer.write(file, offset, patch) == size
        data.extend(bytes(max(0, offset + size - len(data))))
        data[offset : offset + size] = patch
        assert parts.bytes_on_disk(file) == data
        assert await parts.read(file, 0, 1 << 20) == data
    assert parts.inodes.invalidations == 0, "own writes do not count as changes by others"


@in_trio
async def test_writes_to_one_file_are_serial_and_to_two_files_concurrent(make_parts: MakeParts) -> None:
    parts = make_parts()
    one, two = parts.make("one", bytes(9000)), parts.make("two", bytes(9000))
    parts.backing.after_write.shut = True
    async with trio.open_nursery() as nursery:
        for file in (one, one, two):
            nursery.start_soon(parts.writer.write, file, 0, b"x" * 100)
        await parts.backing.after_write.wait_held(2)
        parts.backing.after_write.release()
        await parts.backing.after_write.wait_held(2)
        parts.backing.after_write.open()


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
@in_trio
async def test_a_failed_write_reaches_the_caller_and_drops_the_range(make_parts: MakeParts, code: int) -> None:
    parts = make_parts()
    file, _ = await parts.make_cached(10)
    parts.backing.data_error = OSError(code, "")
    with pytest.raises(OSError, match="Errno") as caught:
        await parts.writer.write(file, 3 * PAGE_SIZE + 5, b"n" * PAGE_SIZE)
    assert caught.value.errno == code
    assert parts.backing.errors == 1
    assert sorted(set(range(10)) - parts.cached_pages(file)) == [3, 4], "the content of the backing is unknown there"
    parts.backing.data_error = None
    os.pwrite(file.fd, b"half", 3 * PAGE_SIZE + 5)  # what the failed write may have left
    assert await parts.read(file, 3 * PAGE_SIZE, PAGE_SIZE) == parts.bytes_on_disk(file)[3 * PAGE_SIZE : 4 * PAGE_SIZE]


@in_trio
async def test_a_short_write_returns_its_size_and_drops_the_rest_of_the_range(make_parts: MakeParts) -> None:
    parts = make_parts()
    file, _ = await parts.make_cached(10)
    parts.backing.short_write = 5000
    assert await parts.writer.write(file, 2 * PAGE_SIZE, b"n" * 3 * PAGE_SIZE) == 5000
    assert not {3, 4} & parts.cached_pages(file)
    assert parts.cached(file, 2) == b"n" * PAGE_SIZE
    assert await parts.read(file, 0, 10 * PAGE_SIZE) == parts.bytes_on_disk(file)


@in_trio
async def test_a_change_by_others_just_before_an_own_write_is_noticed(make_parts: MakeParts) -> None:
    parts = make_parts()
    file, _ = await parts.make_cached(10)
    wait_for_new_timestamp()
    (parts.directory / "f").write_bytes(pages_of(2, 10))
    await parts.writer.write(file, 0, b"own")
    assert await parts.read(file, 0, 10 * PAGE_SIZE) == b"own" + pages_of(2, 10)[3:]


@in_trio
async def test_metadata_changes_of_our_own_keep_the_pages(make_parts: MakeParts) -> None:
    parts = make_parts()
    file, _ = await parts.make_cached(10)
    fd = file.fd
    await parts.writer.change(file.inode, lambda: os.fchmod(fd, 0o600), lambda: os.fstat(fd))
    await parts.writer.change(file.inode, lambda: os.utime(fd, (1, 2)), lambda: os.fstat(fd))
    assert parts.open("f").inode is file.inode
    assert parts.inodes.invalidations == 0
    assert len(parts.cached_pages(file)) == 10


@pytest.mark.timeout(20)
@in_trio
async def test_a_refused_truncate_changes_nothing_and_returns_at_once(make_parts: MakeParts) -> None:
    parts = make_parts()
    file, data = await parts.make_cached(10)
    parts.evict_all()
    with pytest.raises(OSError, match="Errno") as caught:
        await parts.truncate(file, 1 << 62)
    assert caught.value.errno in (errno.EFBIG, errno.EINVAL)
    assert await parts.read(file, 0, 1 << 20) == data


@in_trio
async def test_a_write_far_beyond_the_end_leaves_a_hole_of_zeros(make_parts: MakeParts) -> None:
    parts = make_parts()
    file = parts.make("f", b"begin")
    assert await parts.read(file, 0, 100) == b"begin"
    await parts.writer.write(file, 1_000_000, b"end")
    want = b"begin".ljust(1_000_000, b"\0") + b"end"
    assert await parts.read(file, 0, 1 << 20) == want == parts.bytes_on_disk(file)


@in_trio
async def test_an_append_goes_to_the_backings_end_not_to_the_kernels_offset(make_parts: MakeParts) -> None:
    parts = make_parts()
    file = parts.make("f", pages_of(1, 2)[:5000], os.O_RDWR | os.O_APPEND)
    await parts.read(file, 0, 5000)
    for offset in (5000, 0, 4096, 1 << 40):
        with (parts.directory / "f").open("ab") as others:
            others.write(b"others")
        assert await parts.writer.write(file, offset, b"own") == 3
        assert parts.bytes_on_disk(file).endswith(b"othersown")
        assert await parts.read(file, 0, 1 << 20) == parts.bytes_on_disk(file)
    assert parts.inodes.invalidations == 4


@in_trio
async def test_an_append_beside_an_append_of_others_keeps_no_page(
    make_parts: MakeParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = make_parts()
    data = pages_of(1, 3)[:10_000]
    file = parts.make("f", data, os.O_RDWR | os.O_APPEND)
    await parts.read(file, 0, len(data))
    parts.evict_all()
    await parts.read(file, 0, PAGE_SIZE)
    pwrite = os.pwrite

    def after_others(fd: int, own: bytes, offset: int) -> int:
        with (parts.directory / "f").open("r+b") as others:  # between our two stats
            others.write(b"begin")
            others.seek(0, os.SEEK_END)
            others.write(b"others")
        return pwrite(fd, own, offset)

    monkeypatch.setattr(os, "pwrite", after_others)
    assert await parts.writer.write(file, len(data), b"own") == 3
    monkeypatch.undo()
    want = b"begin" + data[5:] + b"othersown"
    assert parts.bytes_on_disk(file) == want == await parts.read(file, 0, 1 << 20)
    assert file.inode.file.size == len(want)


@in_trio
async def test_mapped_pages_are_written_in_place_through_an_o_append_descriptor(
    make_parts: MakeParts,
) -> None:
    parts = make_parts()
    data = bytearray(pages_of(1, 4)[:15_000])
    file = parts.make("f", bytes(data), os.O_RDWR | os.O_APPEND)
    await parts.read(file, 0, 1)  # so that the kernel may have pages of it
    for offset, size in ((0, PAGE_SIZE), (PAGE_SIZE, 2 * PAGE_SIZE), (3 * PAGE_SIZE, 15_000 - 3 * PAGE_SIZE)):
        page = page_of(offset, size)
        assert await parts.writer.write(file, offset, page) == size
        data[offset : offset + size] = page
        assert parts.bytes_on_disk(file) == data == await parts.read(file, 0, 1 << 20)


@pytest.mark.parametrize("reads", [False, True])
@in_trio
async def test_a_whole_page_at_an_outdated_end_is_appended(make_parts: MakeParts, reads: bool) -> None:
    parts = make_parts()
    want = page_of(0)
    file = parts.make("f", want, os.O_RDWR | os.O_APPEND)
    if reads:
        await parts.read(file, 0, 1)
    for number in range(1, 4):
        with (parts.directory / "f").open("ab") as others:
            others.write(page_of(10 + number))
        want += page_of(10 + number)
        parts.lookup("f")  # the guest knows the new size, the kernel does not
    for number in range(1, 4) if reads else range(3):
        assert await parts.writer.write(file, number * PAGE_SIZE, page_of(number)) == PAGE_SIZE
        want += page_of(number)
    assert parts.bytes_on_disk(file) == want == await parts.read(file, 0, 1 << 20)


@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_RDWR | os.O_APPEND], ids=["at an offset", "appended"])
@pytest.mark.timeout(20)
@in_trio
async def test_a_backing_that_writes_no_bytes_is_an_error(
    make_parts: MakeParts, monkeypatch: pytest.MonkeyPatch, flags: int
) -> None:
    parts = make_parts()
    file = parts.make("f", b"x" * 9000, flags)
    takes = [5, 0]
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[: takes.pop(0)], offset))
    assert await parts.writer.write(file, 9000, b"0123456789") == 5, "as much as was taken"
    takes = [0]
    with pytest.raises(OSError, match="Errno") as caught:
        await parts.writer.write(file, 9005, b"0123456789")
    assert caught.value.errno == errno.EIO
    monkeypatch.undo()
    assert await parts.read(file, 0, 1 << 20) == b"x" * 9000 + b"01234"


@in_trio
async def test_fsync_returns_the_error_of_the_backing(make_parts: MakeParts) -> None:
    parts = make_parts()
    file = parts.make("f", b"x")
    await parts.writer.sync(file, data_only=False)
    parts.backing.data_error = OSError(errno.EIO, "")
    with pytest.raises(OSError, match="Errno") as caught:
        await parts.writer.sync(file, data_only=True)
    assert caught.value.errno == errno.EIO
    parts.backing.data_error = None
