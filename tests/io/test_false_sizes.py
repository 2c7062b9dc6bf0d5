"""Files whose stat reports a false size: reads return exactly the bytes of the backing."""

from __future__ import annotations

import os
import stat

import pytest

from tests.guestparts import MakeParts, make_parts
from tests.io.concurrent import concurrent_requests
from tests.pagebytes import pages_of
from tests.scheduling import in_trio
from tmem.arena import PAGE_SIZE
from tmemfs.inodes.stamps import Stamps

__all__ = ["make_parts"]

CONTENTS = [b"abc", pages_of(1, 1), pages_of(2, 3)[:-5], pages_of(3, 300)[:-1]]
CASES = [
    pytest.param(content, size, id=f"{len(content)}-{size}")
    for content in CONTENTS
    for size in (0, 4096, 1 << 21)
    if not 0 < size < len(content)
]


def claim(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Make stat report this size for every regular file."""

    def lie(st: os.stat_result) -> os.stat_result:
        times = {f"st_{which}time_ns": getattr(st, f"st_{which}time_ns") for which in "amc"}
        more = {name: getattr(st, name) for name in ("st_blksize", "st_blocks", "st_rdev")}
        return os.stat_result([*st[:6], size, *st[7:]], times | more) if stat.S_ISREG(st.st_mode) else st

    fstat, lookup = os.fstat, os.stat
    monkeypatch.setattr(os, "fstat", lambda fd: lie(fstat(fd)))
    monkeypatch.setattr(os, "stat", lambda *args, **more: lie(lookup(*args, **more)))


@pytest.mark.parametrize(("content", "size"), CASES)
@pytest.mark.parametrize("step", [100, PAGE_SIZE, 131_072])
@in_trio
async def test_a_file_ends_where_the_backing_ends(
    make_parts: MakeParts, monkeypatch: pytest.MonkeyPatch, content: bytes, size: int, step: int
) -> None:
    if step == 100 and len(content) > 100_000:
        content = content[:10_000]
    parts = make_parts(cache=4 << 20)
    (parts.directory / "f").write_bytes(content)
    claim(monkeypatch, size)
    file, found = parts.open("f"), b""
    async with parts.running(readahead=True):
        while data := await parts.read(file, len(found), step):
            found += data
        assert found == content
        reads = parts.backing.reads
        for offset in range(0, len(content) + step, step):
            assert await parts.read(file, offset, step) == content[offset : offset + step]
        assert await parts.read(file, len(content), step) == b""
        assert parts.backing.reads == reads, "the end that was found is remembered"
    assert parts.requested() <= parts.memory.hits + parts.memory.misses + 512


@in_trio
async def test_a_file_that_stat_calls_empty_is_read_anew_at_each_open(
    make_parts: MakeParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = make_parts()
    claim(monkeypatch, 0)
    for content in (b"one", b"three", b""):
        (parts.directory / "f").write_bytes(content)
        os.utime(parts.directory / "f", (1, 1))
        assert await parts.read(parts.open("f"), 0, 4096) == content


@in_trio
async def test_an_empty_file_is_read_once_per_version(make_parts: MakeParts) -> None:
    parts = make_parts()
    file = parts.make("f", b"")
    for _ in range(3):
        assert await parts.read(file, 0, 4096) == await parts.read(parts.open("f"), 0, 4096) == b""
    assert (parts.backing.reads, parts.backing.pages, parts.memory.misses) == (1, 0, 0)
    await parts.writer.write(file, 0, b"abc")
    assert await parts.read(file, 0, 4096) == b"abc"


@in_trio
async def test_readers_of_a_file_of_unknown_size_share_the_read_to_its_end(
    make_parts: MakeParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = make_parts()
    (parts.directory / "f").write_bytes(b"content")
    claim(monkeypatch, 0)
    file = parts.open("f")
    parts.backing.after_read.shut = True
    async with concurrent_requests(parts) as requests:
        for name in ("one", "two"):
            requests.read(name, file, 0, 4096)
        await parts.backing.after_read.wait_held(1)
        parts.backing.after_read.open()
    assert requests.answers == {"one": b"content", "two": b"content"}
    assert parts.backing.reads == 1


@pytest.mark.parametrize("read_before", [False, True])
@pytest.mark.parametrize("writeback", [False, True])
@pytest.mark.parametrize("size", [0, 4096])
@in_trio
async def test_a_write_to_a_file_of_false_size_writes_only_its_bytes(
    make_parts: MakeParts, monkeypatch: pytest.MonkeyPatch, size: int, writeback: bool, read_before: bool
) -> None:
    parts = make_parts(writeback=writeback)
    (parts.directory / "f").write_bytes(b"content")
    claim(monkeypatch, size)
    file = parts.open("f")
    if read_before:
        assert await parts.read(file, 0, 4096) == b"content"
    await parts.writer.write(file, 0, b"C")
    if parts.writeback is not None:
        await parts.writeback.sync(file)
    assert parts.bytes_on_disk(file) == b"Content" == await parts.read(file, 0, 4096)


@in_trio
async def test_dirty_pages_of_a_file_found_empty_survive_an_open(make_parts: MakeParts) -> None:
    parts = make_parts(writeback=True, stamps=Stamps(own_clock=None))  # just made: its pages are provisional
    file = parts.make("f", b"")
    assert await parts.read(file, 0, 4096) == b""
    await parts.writer.write(file, 0, b"written")
    assert await parts.read(parts.open("f"), 0, 4096) == b"written"
    assert parts.writeback is not None
    await parts.writeback.sync(file)
    assert parts.bytes_on_disk(file) == b"written"


@in_trio
async def test_a_write_during_the_read_that_finds_the_end_moves_the_end(make_parts: MakeParts) -> None:
    parts = make_parts()
    file = parts.make("f", b"")
    parts.backing.after_read.shut = True
    async with concurrent_requests(parts) as requests:
        requests.read("end", file, 0, 4096)
        await parts.backing.after_read.wait_held(1)
        await parts.writer.write(file, 300_000, b"far behind")
        parts.backing.after_read.open()
    after = bytes(300_000) + b"far behind"
    found = requests.answers["end"]
    assert isinstance(found, bytes)
    assert after.startswith(found)
    assert await parts.read(file, 0, 1 << 20) == after
    assert not file.inode.virtual
