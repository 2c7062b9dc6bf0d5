"""Reads from cache, victim queue, pool and backing; fills are shared, errors are never cached."""

from __future__ import annotations

import errno
import os
import random

import pytest
import trio
import trio.testing

from tests.guestparts import MakeParts, make_parts
from tests.io.concurrent import concurrent_requests, pages_from, unstreamed_file
from tests.pagebytes import MIB, pages_of
from tests.scheduling import in_trio
from tmem.arena import PAGE_SIZE
from tmemfs.io.readahead import MIN_PAGES

__all__ = ["make_parts"]


# -- what a read returns ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", [0, MIB])
@in_trio
async def test_every_offset_and_size_gives_the_bytes_of_the_backing(make_parts: MakeParts, pool: int) -> None:
    parts = make_parts(cache=32 * PAGE_SIZE, pool=pool)
    data, generator = pages_of(1, 100)[:-1234], random.Random(1)
    file = parts.make("f", data)
    async with parts.running(readahead=True):
        for _ in range(600):
            offset = generator.randrange(len(data) + 5000)
            size = generator.choice([1, 17, 512, 4096, 4097, 20_000, 131_072])
            assert await parts.read(file, offset, size) == data[offset : offset + size]
            assert parts.memory.resident <= 32


@in_trio
async def test_an_empty_file_and_reads_past_the_end_give_nothing(make_parts: MakeParts) -> None:
    parts = make_parts()
    empty, short = parts.make("empty", b""), parts.make("short", b"abc")
    assert await parts.read(empty, 0, 4096) == b""
    assert await parts.read(short, 3, 10) == await parts.read(short, 1 << 62, 4096) == b""
    assert await parts.read(short, 1, 1 << 20) == b"bc"
    assert parts.backing.pages == 1


@in_trio
async def test_a_sparse_file_reads_as_zeros(make_parts: MakeParts) -> None:
    parts = make_parts()
    file = parts.make("f", b"")
    os.truncate(parts.directory / "f", 1 << 40)
    os.pwrite(file.fd, b"end", (1 << 40) - 3)
    file = parts.open("f")
    assert await parts.read(file, 1 << 39, 9000) == bytes(9000)
    assert await parts.read(file, (1 << 40) - 5, 100) == b"\0\0end"


# -- sharing ---------------------------------------------------------------------------------------------------------


@in_trio
async def test_two_readers_of_one_missing_page_share_one_backing_read(make_parts: MakeParts) -> None:
    parts = make_parts()
    file, data = unstreamed_file(parts, 50)
    parts.backing.after_read.shut = True
    async with concurrent_requests(parts) as requests:
        requests.read("one", file, 10 * PAGE_SIZE, 3 * PAGE_SIZE)
        await parts.backing.after_read.wait_held(1)
        for name in ("two", "three"):
            requests.read(name, file, 11 * PAGE_SIZE, PAGE_SIZE)
        await parts.backing.after_read.wait_held(1)
        parts.backing.after_read.open()
    assert requests.answers["one"] == pages_from(data, 10, 3)
    assert requests.answers["two"] == requests.answers["three"] == pages_from(data, 11)
    assert (parts.backing.reads, parts.reader.waits) == (1, 2)


@in_trio
async def test_missing_neighbours_are_read_in_one_call(make_parts: MakeParts) -> None:
    parts = make_parts()
    file, data = unstreamed_file(parts, 64)
    await parts.read(file, 20 * PAGE_SIZE, PAGE_SIZE)
    parts.backing.read_calls.clear()
    assert await parts.read(file, 10 * PAGE_SIZE, 20 * PAGE_SIZE) == pages_from(data, 10, 20)
    assert parts.backing.read_calls == [(10 * PAGE_SIZE, 10 * PAGE_SIZE), (21 * PAGE_SIZE, 9 * PAGE_SIZE)]


@in_trio
async def test_several_runs_of_pages_are_read_concurrently(make_parts: MakeParts) -> None:
    parts = make_parts()
    file, data = unstreamed_file(parts, 64)
    for page in (12, 16, 20):
        await parts.read(file, page * PAGE_SIZE, PAGE_SIZE)
    parts.backing.after_read.shut = True
    async with concurrent_requests(parts) as requests:
        requests.read("all", file, 10 * PAGE_SIZE, 12 * PAGE_SIZE)
        await parts.backing.after_read.wait_held(4)
        parts.backing.after_read.open()
    assert requests.answers["all"] == pages_from(data, 10, 12)


# -- errors ----------------------------------------------------------------------------------------------------------


@in_trio
async def test_a_read_error_reaches_every_reader_and_is_never_cached(make_parts: MakeParts) -> None:
    parts = make_parts()
    file, data = unstreamed_file(parts, 20)
    parts.backing.before_read.shut = True
    parts.backing.read_error = OSError(errno.EIO, "")
    async with concurrent_requests(parts) as requests:
        requests.read("one", file, 5 * PAGE_SIZE, PAGE_SIZE)
        await parts.backing.before_read.wait_held(1)
        requests.read("two", file, 5 * PAGE_SIZE, 2 * PAGE_SIZE)
        await parts.backing.before_read.wait_held(1)
        parts.backing.before_read.open()
    for answer in requests.answers.values():
        assert isinstance(answer, OSError)
        assert answer.errno == errno.EIO
    assert parts.backing.errors >= 2
    assert not parts.cached_pages(file)
    assert not parts.pages_in_flight(file)
    parts.backing.read_error = None
    assert await parts.read(file, 5 * PAGE_SIZE, PAGE_SIZE) == pages_from(data, 5)


@in_trio
async def test_a_waiter_on_a_failed_readahead_reads_its_page_itself(make_parts: MakeParts) -> None:
    parts = make_parts(cache=4 * MIB)
    data = pages_of(1, 400)
    file = parts.make("f", data)
    async with parts.running(readahead=True), concurrent_requests(parts) as requests:
        await parts.read(file, 0, PAGE_SIZE)
        parts.backing.before_read.shut = True
        parts.backing.read_error = OSError(errno.EIO, "")
        marker = file.stream.marker
        file.stream.next_page = marker
        assert await parts.read(file, marker * PAGE_SIZE, PAGE_SIZE) == pages_from(data, marker)
        await parts.backing.before_read.wait_held(1)  # the window ahead, which will fail
        requests.read("joined", file, (MIN_PAGES + 3) * PAGE_SIZE, PAGE_SIZE)
        await parts.backing.before_read.wait_held(1)
        parts.backing.before_read.release()
        await parts.backing.before_read.wait_held(1)  # the waiter's own read
        parts.backing.read_error = None
        parts.backing.before_read.open()
        await trio.testing.wait_all_tasks_blocked()
        assert requests.answers["joined"] == pages_from(data, MIN_PAGES + 3)
        assert parts.reader.waits == 0


@in_trio
async def test_a_file_that_shrank_underneath_gives_a_short_read_and_new_size(make_parts: MakeParts) -> None:
    parts = make_parts()
    file, data = unstreamed_file(parts, 20)
    os.truncate(parts.directory / "f", 7 * PAGE_SIZE + 5)
    assert await parts.read(file, 5 * PAGE_SIZE, 10 * PAGE_SIZE) == data[5 * PAGE_SIZE : 7 * PAGE_SIZE + 5]
    assert file.inode.file.size == 7 * PAGE_SIZE + 5
    assert await parts.read(file, 12 * PAGE_SIZE, PAGE_SIZE) == b""


@in_trio
async def test_a_reader_that_joined_a_short_fill_reads_on_to_the_new_end(make_parts: MakeParts) -> None:
    parts = make_parts()
    file = parts.make("f", b"x" * 5000)
    parts.backing.after_read.shut = True
    async with concurrent_requests(parts) as requests:
        requests.read("short", file, 0, 5000)
        await parts.backing.after_read.wait_held(1)
        await parts.writer.write(file, 2 * PAGE_SIZE, b"end")  # no page that is being read
        requests.read("long", file, 0, 3 * PAGE_SIZE)
        await trio.testing.wait_all_tasks_blocked()
        parts.backing.after_read.open()
    assert requests.answers == {"short": b"x" * 5000, "long": parts.bytes_on_disk(file)}


@in_trio
async def test_growth_underneath_is_read_after_the_attribute_timeout(make_parts: MakeParts) -> None:
    parts = make_parts(attr_timeout=1.0)
    file = parts.make("f", b"a" * 5000)
    assert await parts.read(file, 0, 1 << 17) == b"a" * 5000
    with (parts.directory / "f").open("ab") as log:
        log.write(b"b" * 5000)
    await trio.sleep(1.1)
    assert await parts.read(file, 5000, 1 << 17) == b"b" * 5000
    assert await parts.read(file, 0, 1 << 17) == b"a" * 5000 + b"b" * 5000


@in_trio
async def test_a_descriptor_is_never_read_after_its_file_was_closed(make_parts: MakeParts) -> None:
    parts = make_parts(cache=4 * MIB)
    data = pages_of(1, 400)
    file = parts.make("f", data)
    async with parts.running(readahead=True):
        await parts.read(file, 0, PAGE_SIZE)
        file.stream.next_page = file.stream.marker
        assert parts.reader.hit(file, file.stream.marker * PAGE_SIZE, PAGE_SIZE) is not None  # starts readahead
        parts.files.remove(file.number)
        if not file.users:
            os.close(file.fd)
        parts.make("other", pages_of(2, 400))  # reuses the number of the closed descriptor
        await trio.testing.wait_all_tasks_blocked()
    again = parts.open("f")
    assert await parts.read(again, 0, len(data)) == data


# -- readahead -------------------------------------------------------------------------------------------------------


@in_trio
async def test_a_sequential_reader_hits_pages_read_ahead(make_parts: MakeParts) -> None:
    parts = make_parts(cache=16 * MIB, pool=0)
    data = pages_of(1, 1500)
    file = parts.make("f", data)
    async with parts.running(readahead=True):
        for page in range(1500):
            assert await parts.read(file, page * PAGE_SIZE, PAGE_SIZE) == pages_from(data, page)
            await trio.testing.wait_all_tasks_blocked()
    assert parts.backing.pages == 1500, "every page was read once"
    assert parts.backing.reads < 12
    assert parts.memory.hits >= 1495
    assert max(size for _, size in parts.backing.read_calls) <= 2 * MIB + PAGE_SIZE


@in_trio
async def test_a_random_reader_causes_only_the_reads_it_needs(make_parts: MakeParts) -> None:
    parts = make_parts(cache=8 * MIB)
    data, generator = pages_of(1, 1500), random.Random(1)
    file = parts.make("f", data)
    pages = generator.sample(range(2, 1500, 3), 300)
    async with parts.running(readahead=True):
        for page in pages:
            assert await parts.read(file, page * PAGE_SIZE, PAGE_SIZE) == pages_from(data, page)
    assert parts.backing.pages == 300
    assert parts.backing.readahead_pages == 0


@in_trio
async def test_a_read_ahead_page_is_counted_as_used_once_unless_waited_for(
    make_parts: MakeParts,
) -> None:
    parts = make_parts(cache=4 * MIB)
    file = parts.make("f", pages_of(1, 100))
    await parts.read(file, 0, PAGE_SIZE)  # and MIN_PAGES after it
    assert (parts.memory.hits, parts.memory.readahead_hits) == (0, 0)
    for ahead in (20, 0):
        await parts.read(file, 0, 21 * PAGE_SIZE)
        assert parts.memory.readahead_hits == 20, ahead
    await parts.read(file, 25 * PAGE_SIZE, PAGE_SIZE)
    assert parts.memory.readahead_hits == 21
    other = parts.make("other", pages_of(2, 100))
    parts.backing.after_read.shut = True
    async with concurrent_requests(parts) as requests:
        requests.read("one", other, 0, PAGE_SIZE)
        await parts.backing.after_read.wait_held(1)
        requests.read("two", other, 5 * PAGE_SIZE, PAGE_SIZE)  # this page is being read ahead
        await parts.backing.after_read.wait_held(1)
        parts.backing.after_read.open()
    assert parts.reader.waits == 1
    await parts.read(other, 5 * PAGE_SIZE, PAGE_SIZE)
    assert parts.memory.readahead_hits == 21
    left = parts.backing.readahead_pages - 21 - 1
    parts.evict_all()
    assert parts.memory.unused == left
