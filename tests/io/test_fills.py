"""A fill that a write, a truncate or a new version overtook is not cached."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from tests.guestparts import MakeParts, Parts, make_parts
from tests.io.concurrent import Requests, concurrent_requests, pages_from, unstreamed_file
from tests.pagebytes import MIB, pages_of
from tests.scheduling import in_trio
from tmem.arena import PAGE_SIZE
from tmemfs.io.files import OpenFile

__all__ = ["make_parts"]


@asynccontextmanager
async def held_fill(parts: Parts, file: OpenFile) -> AsyncIterator[Requests]:
    """Start a read of four pages from page 5 on; it has the old bytes, and goes on after the block."""
    latch = parts.backing.after_read
    latch.shut = True
    async with concurrent_requests(parts) as requests:
        requests.read("held", file, 5 * PAGE_SIZE, 4 * PAGE_SIZE)
        await latch.wait_held(1)
        yield requests
        latch.open()


@pytest.mark.parametrize("pool", [0, MIB])
@in_trio
async def test_a_fill_overtaken_by_a_write_is_not_cached(make_parts: MakeParts, pool: int) -> None:
    parts = make_parts(pool=pool)
    file, data = unstreamed_file(parts, 50)
    async with held_fill(parts, file) as requests:
        old = bytes(data)
        data[6 * PAGE_SIZE + 100 : 7 * PAGE_SIZE + 100] = b"n" * PAGE_SIZE
        await parts.writer.write(file, 6 * PAGE_SIZE + 100, b"n" * PAGE_SIZE)
        requests.read("after", file, 6 * PAGE_SIZE, 2 * PAGE_SIZE)
        await parts.backing.after_read.wait_held(2)  # it did not join the old read
        parts.backing.after_read.release()
        await trio.testing.wait_all_tasks_blocked()
        assert requests.answers["held"] == pages_from(old, 5, 4)
        assert not parts.cached_pages(file), "the overtaken bytes entered the cache"
    assert requests.answers["after"] == pages_from(data, 6, 2)
    assert await parts.read(file, 0, len(data)) == data


@in_trio
async def test_a_second_fill_of_a_page_that_is_in_flight_is_poisoned_too(make_parts: MakeParts) -> None:
    """A reader waits for a fill of another, then reads a page that a third reader is already filling."""
    parts = make_parts()
    file, data = unstreamed_file(parts, 50)
    latch = parts.backing.after_read
    latch.shut = True
    async with concurrent_requests(parts) as requests:
        requests.read("first", file, 5 * PAGE_SIZE, PAGE_SIZE)
        await latch.wait_held(1)
        requests.read("both", file, 5 * PAGE_SIZE, 2 * PAGE_SIZE)  # waits for page 5, then reads page 6
        await latch.wait_held(1)
        requests.read("second", file, 6 * PAGE_SIZE, PAGE_SIZE)
        await latch.wait_held(2)
        latch.release()  # page 5 is cached; page 6 is in flight, for one reader or for two
        await latch.wait_held(2)
        data[6 * PAGE_SIZE : 7 * PAGE_SIZE] = b"n" * PAGE_SIZE
        await parts.writer.write(file, 6 * PAGE_SIZE, b"n" * PAGE_SIZE)
        latch.open()
    assert await parts.read(file, 6 * PAGE_SIZE, PAGE_SIZE) == b"n" * PAGE_SIZE


@in_trio
async def test_a_fill_overtaken_by_a_truncate_is_not_cached(make_parts: MakeParts) -> None:
    parts = make_parts()
    file, data = unstreamed_file(parts, 50)
    async with held_fill(parts, file):
        await parts.truncate(file, 6 * PAGE_SIZE + 10)
        await parts.truncate(file, 50 * PAGE_SIZE)
    want = data[: 6 * PAGE_SIZE + 10].ljust(50 * PAGE_SIZE, b"\0")
    assert await parts.read(file, 0, 50 * PAGE_SIZE) == want


@in_trio
async def test_a_fill_overtaken_by_a_new_version_is_not_cached(make_parts: MakeParts) -> None:
    parts = make_parts()
    file, _ = unstreamed_file(parts, 50)
    async with held_fill(parts, file):
        (parts.directory / "f").write_bytes(pages_of(2, 51))  # by others
        again = parts.open("f")
    assert parts.inodes.invalidations == 1
    assert await parts.read(again, 0, 51 * PAGE_SIZE) == pages_of(2, 51)


@in_trio
async def test_a_page_got_from_the_pool_during_a_write_is_updated(make_parts: MakeParts) -> None:
    parts = make_parts()
    file, data = await parts.make_cached(20)
    parts.evict_all()  # all in the pool
    parts.backing.before_write.shut = True
    async with concurrent_requests(parts) as requests:
        requests.write("write", file, 3 * PAGE_SIZE + 7, b"n" * 5000)
        await parts.backing.before_write.wait_held(1)
        assert await parts.read(file, 2 * PAGE_SIZE, 4 * PAGE_SIZE) == pages_from(data, 2, 4)
        parts.evict_all()  # and back into the pool, old
        parts.backing.before_write.open()
    data[3 * PAGE_SIZE + 7 : 3 * PAGE_SIZE + 5007] = b"n" * 5000
    assert await parts.read(file, 0, len(data)) == data
