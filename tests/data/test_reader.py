"""Reads: cache, victim queue, pool, backing; what is in flight is shared, and what is stale is never kept."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from tests.parts import MIB, MakeParts, Parts, in_trio, make_parts, page_range, pages_of, run_seeded
from tmemfs.cache.pagecache import PAGE_SIZE
from tmemfs.data.files import OpenFile
from tmemfs.data.readahead import MIN_PAGES

__all__ = ["make_parts"]


class Asked:
    """Start requests and collect their answers."""

    def __init__(self, parts: Parts, nursery: trio.Nursery) -> None:
        self.parts = parts
        self.nursery = nursery
        self.answers: dict[str, bytes | OSError] = {}

    def read(self, name: str, file: OpenFile, offset: int, size: int) -> None:
        async def run() -> None:
            try:
                self.answers[name] = await self.parts.read(file, offset, size)
            except OSError as error:
                self.answers[name] = error

        self.nursery.start_soon(run)

    def write(self, name: str, file: OpenFile, offset: int, data: bytes) -> None:
        async def run() -> None:
            await self.parts.writer.write(file, offset, data)
            self.answers[name] = data

        self.nursery.start_soon(run)


def pages_from(data: bytes | bytearray, first: int, count: int = 1) -> bytes:
    return bytes(data[first * PAGE_SIZE : (first + count) * PAGE_SIZE])


def random_stream(file: OpenFile) -> None:
    """Have nothing read ahead for an open file."""
    file.stream.next_page, file.stream.max_pages = 1 << 40, 0


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
            assert parts.cache.resident <= 32


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
    data = pages_of(1, 50)
    file = parts.make("f", data)
    random_stream(file)
    parts.backing.after_read.shut = True
    async with trio.open_nursery() as nursery:
        asked = Asked(parts, nursery)
        asked.read("one", file, 10 * PAGE_SIZE, 3 * PAGE_SIZE)
        await parts.backing.after_read.holds(1)
        for name in ("two", "three"):
            asked.read(name, file, 11 * PAGE_SIZE, PAGE_SIZE)
        await parts.backing.after_read.holds(1)
        parts.backing.after_read.open()
    assert asked.answers["one"] == pages_from(data, 10, 3)
    assert asked.answers["two"] == asked.answers["three"] == pages_from(data, 11)
    assert (parts.backing.reads, parts.reader.waits) == (1, 2)


@in_trio
async def test_missing_neighbours_are_read_in_one_call(make_parts: MakeParts) -> None:
    parts = make_parts()
    data = pages_of(1, 64)
    file = parts.make("f", data)
    random_stream(file)
    await parts.read(file, 20 * PAGE_SIZE, PAGE_SIZE)
    random_stream(file)
    parts.backing.read_calls.clear()
    assert await parts.read(file, 10 * PAGE_SIZE, 20 * PAGE_SIZE) == pages_from(data, 10, 20)
    assert parts.backing.read_calls == [(10 * PAGE_SIZE, 10 * PAGE_SIZE), (21 * PAGE_SIZE, 9 * PAGE_SIZE)]


@in_trio
async def test_several_runs_are_read_at_the_same_time(make_parts: MakeParts) -> None:
    parts = make_parts()
    data = pages_of(1, 64)
    file = parts.make("f", data)
    for page in (12, 16, 20):
        random_stream(file)
        await parts.read(file, page * PAGE_SIZE, PAGE_SIZE)
    random_stream(file)
    parts.backing.after_read.shut = True
    async with trio.open_nursery() as nursery:
        asked = Asked(parts, nursery)
        asked.read("all", file, 10 * PAGE_SIZE, 12 * PAGE_SIZE)
        await parts.backing.after_read.holds(4)
        parts.backing.after_read.open()
    assert asked.answers["all"] == pages_from(data, 10, 12)


# -- the races -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", [0, MIB])
@in_trio
async def test_a_fill_that_a_write_overtook_is_not_cached(make_parts: MakeParts, pool: int) -> None:
    parts = make_parts(pool=pool)
    data = bytearray(pages_of(1, 50))
    file = parts.make("f", bytes(data))
    random_stream(file)
    parts.backing.after_read.shut = True
    async with trio.open_nursery() as nursery:
        asked = Asked(parts, nursery)
        asked.read("before", file, 5 * PAGE_SIZE, 4 * PAGE_SIZE)
        await parts.backing.after_read.holds(1)  # it has the old bytes
        old = bytes(data)
        data[6 * PAGE_SIZE + 100 : 7 * PAGE_SIZE + 100] = b"n" * PAGE_SIZE
        await parts.writer.write(file, 6 * PAGE_SIZE + 100, b"n" * PAGE_SIZE)
        asked.read("after", file, 6 * PAGE_SIZE, 2 * PAGE_SIZE)
        await parts.backing.after_read.holds(2)  # it did not join the old read
        parts.backing.after_read.let_go()
        await trio.testing.wait_all_tasks_blocked()
        assert asked.answers["before"] == pages_from(old, 5, 4)
        assert not file.inode.pages, "the overtaken bytes entered the cache"
        parts.backing.after_read.open()
    assert asked.answers["after"] == pages_from(data, 6, 2)
    assert await parts.read(file, 0, len(data)) == data


@in_trio
async def test_a_second_fill_of_a_page_that_is_in_flight_is_poisoned_too(make_parts: MakeParts) -> None:
    """A reader that first waits for another's page may then read a page that a third has begun to read meanwhile."""
    parts = make_parts()
    data = bytearray(pages_of(1, 50))
    file = parts.make("f", bytes(data))
    latch = parts.backing.after_read
    latch.shut = True
    async with trio.open_nursery() as nursery:
        asked = Asked(parts, nursery)
        random_stream(file)
        asked.read("first", file, 5 * PAGE_SIZE, PAGE_SIZE)
        await latch.holds(1)
        random_stream(file)
        asked.read("both", file, 5 * PAGE_SIZE, 2 * PAGE_SIZE)  # waits for page 5, will then want page 6
        await latch.holds(1)
        random_stream(file)
        asked.read("second", file, 6 * PAGE_SIZE, PAGE_SIZE)
        await latch.holds(2)
        latch.let_go()  # page 5 is there; page 6 is in flight, for one reader or for two
        await latch.holds(2)
        data[6 * PAGE_SIZE : 7 * PAGE_SIZE] = b"n" * PAGE_SIZE
        await parts.writer.write(file, 6 * PAGE_SIZE, b"n" * PAGE_SIZE)
        latch.open()
    assert await parts.read(file, 6 * PAGE_SIZE, PAGE_SIZE) == b"n" * PAGE_SIZE


@in_trio
async def test_a_fill_that_a_truncate_overtook_is_not_cached(make_parts: MakeParts) -> None:
    parts = make_parts()
    data = pages_of(1, 50)
    file = parts.make("f", data)
    random_stream(file)
    parts.backing.after_read.shut = True
    async with trio.open_nursery() as nursery:
        asked = Asked(parts, nursery)
        asked.read("old", file, 5 * PAGE_SIZE, 4 * PAGE_SIZE)
        await parts.backing.after_read.holds(1)
        await parts.truncate(file, 6 * PAGE_SIZE + 10)
        await parts.truncate(file, 50 * PAGE_SIZE)
        parts.backing.after_read.open()
    want = data[: 6 * PAGE_SIZE + 10].ljust(50 * PAGE_SIZE, b"\0")
    assert await parts.read(file, 0, 50 * PAGE_SIZE) == want


@in_trio
async def test_a_fill_that_a_mismatch_overtook_is_not_cached(make_parts: MakeParts) -> None:
    parts = make_parts()
    file = parts.make("f", pages_of(1, 50))
    random_stream(file)
    parts.backing.after_read.shut = True
    async with trio.open_nursery() as nursery:
        asked = Asked(parts, nursery)
        asked.read("old", file, 5 * PAGE_SIZE, 4 * PAGE_SIZE)
        await parts.backing.after_read.holds(1)
        (parts.directory / "f").write_bytes(pages_of(2, 51))  # by somebody else
        again = parts.open("f")
        parts.backing.after_read.open()
    assert parts.inodes.invalidations == 1
    assert await parts.read(again, 0, 51 * PAGE_SIZE) == pages_of(2, 51)


@in_trio
async def test_an_old_page_brought_back_during_a_write_is_brought_up_to_date(make_parts: MakeParts) -> None:
    parts = make_parts()
    data = bytearray(pages_of(1, 20))
    file = parts.make("f", bytes(data))
    await parts.read(file, 0, len(data))
    parts.evict_all()  # all in the pool
    parts.backing.before_write.shut = True
    async with trio.open_nursery() as nursery:
        asked = Asked(parts, nursery)
        asked.write("write", file, 3 * PAGE_SIZE + 7, b"n" * 5000)
        await parts.backing.before_write.holds(1)
        assert await parts.read(file, 2 * PAGE_SIZE, 4 * PAGE_SIZE) == pages_from(data, 2, 4)
        parts.evict_all()  # and back into the pool, old
        parts.backing.before_write.open()
    data[3 * PAGE_SIZE + 7 : 3 * PAGE_SIZE + 5007] = b"n" * 5000
    assert await parts.read(file, 0, len(data)) == data


# -- trouble ---------------------------------------------------------------------------------------------------------


@in_trio
async def test_an_error_reaches_every_reader_is_counted_and_never_cached(make_parts: MakeParts) -> None:
    parts = make_parts()
    data = pages_of(1, 20)
    file = parts.make("f", data)
    random_stream(file)
    parts.backing.before_read.shut = True
    parts.backing.read_error = OSError(errno.EIO, "")
    async with trio.open_nursery() as nursery:
        asked = Asked(parts, nursery)
        asked.read("one", file, 5 * PAGE_SIZE, PAGE_SIZE)
        await parts.backing.before_read.holds(1)
        asked.read("two", file, 5 * PAGE_SIZE, 2 * PAGE_SIZE)
        await parts.backing.before_read.holds(1)
        parts.backing.before_read.open()
    for answer in asked.answers.values():
        assert isinstance(answer, OSError)
        assert answer.errno == errno.EIO
    assert parts.backing.errors >= 2
    assert not file.inode.pages
    assert not file.inode.fills
    parts.backing.read_error = None
    assert await parts.read(file, 5 * PAGE_SIZE, PAGE_SIZE) == pages_from(data, 5)


@in_trio
async def test_a_waiter_reads_again_what_a_failed_readahead_did_not_bring(make_parts: MakeParts) -> None:
    parts = make_parts(cache=4 * MIB)
    data = pages_of(1, 400)
    file = parts.make("f", data)
    async with parts.running(readahead=True):
        await parts.read(file, 0, PAGE_SIZE)
        parts.backing.before_read.shut = True
        parts.backing.read_error = OSError(errno.EIO, "")
        marker = file.stream.marker
        file.stream.next_page = marker
        assert await parts.read(file, marker * PAGE_SIZE, PAGE_SIZE) == pages_from(data, marker)
        await parts.backing.before_read.holds(1)  # the window ahead, which will fail
        asked = Asked(parts, parts.reader.nursery or pytest.fail("no readahead"))
        asked.read("joined", file, (MIN_PAGES + 3) * PAGE_SIZE, PAGE_SIZE)
        await parts.backing.before_read.holds(1)
        parts.backing.before_read.let_go()
        await parts.backing.before_read.holds(1)  # the waiter's own read
        parts.backing.read_error = None
        parts.backing.before_read.open()
        await trio.testing.wait_all_tasks_blocked()
        assert asked.answers["joined"] == pages_from(data, MIN_PAGES + 3)
        assert parts.reader.waits == 0


@in_trio
async def test_a_file_that_shrank_underneath_gives_a_short_read_and_its_new_size(make_parts: MakeParts) -> None:
    parts = make_parts()
    data = pages_of(1, 20)
    file = parts.make("f", data)
    random_stream(file)
    os.truncate(parts.directory / "f", 7 * PAGE_SIZE + 5)
    assert await parts.read(file, 5 * PAGE_SIZE, 10 * PAGE_SIZE) == data[5 * PAGE_SIZE : 7 * PAGE_SIZE + 5]
    assert file.inode.size == 7 * PAGE_SIZE + 5
    assert await parts.read(file, 12 * PAGE_SIZE, PAGE_SIZE) == b""


@in_trio
async def test_a_file_that_grows_underneath_is_read_on_after_the_attribute_timeout(make_parts: MakeParts) -> None:
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
        parts.make("other", pages_of(2, 400))  # gets the number of the closed descriptor
        await trio.testing.wait_all_tasks_blocked()
    again = parts.open("f")
    assert await parts.read(again, 0, len(data)) == data


# -- readahead -------------------------------------------------------------------------------------------------------


@in_trio
async def test_a_sequential_reader_finds_its_pages_there(make_parts: MakeParts) -> None:
    parts = make_parts(cache=8 * MIB, pool=0)
    data = pages_of(1, 1500)
    file = parts.make("f", data)
    async with parts.running(readahead=True):
        for page in range(1500):
            assert await parts.read(file, page * PAGE_SIZE, PAGE_SIZE) == pages_from(data, page)
            await trio.testing.wait_all_tasks_blocked()
    assert parts.backing.pages == 1500, "every page was read once"
    assert parts.backing.reads < 12
    assert parts.reader.hits >= 1495
    assert max(size for _, size in parts.backing.read_calls) <= 2 * MIB + PAGE_SIZE


@in_trio
async def test_a_random_reader_gets_no_page_that_it_did_not_ask_for(make_parts: MakeParts) -> None:
    parts = make_parts(cache=8 * MIB)
    data, generator = pages_of(1, 1500), random.Random(1)
    file = parts.make("f", data)
    pages = generator.sample(range(2, 1500, 3), 300)
    async with parts.running(readahead=True):
        for page in pages:
            assert await parts.read(file, page * PAGE_SIZE, PAGE_SIZE) == pages_from(data, page)
    assert parts.backing.pages == 300
    assert parts.backing.readahead_pages == 0


# -- counters --------------------------------------------------------------------------------------------------------


class Workload:
    """Concurrent seeded readers and changers of a few files; every byte read must have been current meanwhile.

    Sectors of 512 bytes are written whole, each with the number of its write. A read may see the sector of a write
    that was the last one completed before it began, or of one that was under way while it ran.
    """

    SECTOR = 512
    SECTORS = 600

    def __init__(self, parts: Parts, seed: int) -> None:
        self.parts = parts
        self.generator = random.Random(seed)
        self.clock = 0
        self.requested = 0
        self.files = [parts.make(f"f{number}", self.stamp(0) * self.SECTORS) for number in range(3)]
        # for each file and sector: (number, begin, end) of every change; the number -1 is a truncation away
        self.history: list[list[list[tuple[int, int, int]]]] = [
            [[(0, 0, 0)] for _ in range(self.SECTORS)] for _ in self.files
        ]
        self.numbers: Iterator[int] = iter(range(1, 1 << 30))

    def stamp(self, number: int) -> bytes:
        return number.to_bytes(8, "little") * (self.SECTOR // 8)

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    async def read(self) -> None:
        which = self.generator.randrange(3)
        file, first = self.files[which], self.generator.randrange(self.SECTORS)
        count = min(self.generator.choice([1, 3, 8, 40, 200]), self.SECTORS - first)
        begin = self.tick()
        size_before = file.inode.size
        offset, size = first * self.SECTOR, count * self.SECTOR
        inside = max(0, min(size, size_before - offset))
        data = await self.parts.read(file, offset, size)
        end = self.tick()
        self.requested += page_range(offset, inside)
        assert len(data) % self.SECTOR == 0
        for position in range(len(data) // self.SECTOR):
            sector = data[position * self.SECTOR : (position + 1) * self.SECTOR]
            number = int.from_bytes(sector[:8], "little")
            assert sector == self.stamp(number), "a sector is torn"
            allowed = self.allowed(self.history[which][first + position], begin, end)
            assert number in allowed, (which, first + position, number, allowed)

    @staticmethod
    def allowed(changes: list[tuple[int, int, int]], begin: int, end: int) -> set[int]:
        done = [change for change in changes if change[2] <= begin]
        last = max(done, key=lambda change: change[2])
        return {last[0]} | {change[0] for change in changes if change[1] <= end and change[2] > begin}

    async def write(self) -> None:
        which = self.generator.randrange(3)
        first = self.generator.randrange(self.SECTORS)
        count = min(self.generator.choice([1, 2, 8, 30]), self.SECTORS - first)
        number, begin = next(self.numbers), self.tick()
        changes = self.history[which][first : first + count]
        for sector in changes:
            sector.append((number, begin, 1 << 60))
        data = self.stamp(number) * count
        assert await self.parts.writer.write(self.files[which], first * self.SECTOR, data) == len(data)
        self.finish(changes, number, begin)

    def finish(self, changes: list[list[tuple[int, int, int]]], number: int, begin: int) -> None:
        end = self.tick()
        for sector in changes:
            sector[sector.index((number, begin, 1 << 60))] = (number, begin, end)

    def drop(self) -> None:
        for inode in self.parts.inodes.known():
            self.parts.content.renew(inode)

    async def resize(self) -> None:
        await self.parts.precache.resize(self.generator.choice([16, 40, 64, 128]) * PAGE_SIZE)

    async def client(self, steps: int) -> None:
        for _ in range(steps):
            dice = self.generator.random()
            if dice < 0.70:
                await self.read()
            elif dice < 0.95:
                await self.write()
            elif dice < 0.97:
                self.drop()
            elif dice < 0.99:
                await self.resize()
            else:
                await trio.sleep(self.generator.random() * 3)
            self.parts.cache.check()

    async def run(self, clients: int, steps: int) -> None:
        async with self.parts.running(readahead=True), trio.open_nursery() as nursery:
            for _ in range(clients):
                nursery.start_soon(self.client, steps)


@pytest.mark.parametrize("writeback", [False, True])
@pytest.mark.parametrize("pool", [0, MIB // 2])
@pytest.mark.parametrize("seed", range(4))
def test_concurrent_readers_and_writers_see_only_bytes_that_were_current(
    make_parts: MakeParts, seed: int, pool: int, writeback: bool
) -> None:
    parts = make_parts(cache=64 * PAGE_SIZE, pool=pool, writeback=writeback)
    parts.backing.jitter = random.Random(seed)

    async def main() -> None:
        work = Workload(parts, seed)
        await work.run(clients=6, steps=120)
        if parts.writeback is not None:
            assert await parts.writeback.finish() == []
        else:
            assert parts.requested() == work.requested
        await parts.precache.resize(64 * PAGE_SIZE)
        for which, file in enumerate(work.files):
            disk = parts.bytes_on_disk(file)
            for index, changes in enumerate(work.history[which]):
                number = int.from_bytes(disk[index * 512 : index * 512 + 8], "little")
                assert number in work.allowed(changes, work.clock, work.clock)
            assert await parts.read(file, 0, len(disk)) == disk

    run_seeded(main, seed)


class Truncating(Workload):
    """The same with sizes that change; the bytes are compared in the end, the counters throughout."""

    async def client(self, steps: int) -> None:
        for _ in range(steps):
            file = self.files[self.generator.randrange(3)]
            dice = self.generator.random()
            if dice < 0.6:
                offset = self.generator.randrange(self.SECTOR * self.SECTORS)
                await self.parts.read(file, offset, self.generator.choice([100, 4096, 30_000]))
            elif dice < 0.8:
                await self.write()
            elif dice < 0.9:
                await self.parts.truncate(file, self.generator.randrange(self.SECTOR * self.SECTORS))
            elif dice < 0.95:
                await self.resize()
            else:
                self.drop()
            self.parts.cache.check()


@pytest.mark.parametrize("writeback", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_after_any_mix_of_changes_the_mount_equals_the_backing(
    make_parts: MakeParts, seed: int, writeback: bool
) -> None:
    parts = make_parts(cache=64 * PAGE_SIZE, pool=MIB // 2, writeback=writeback)
    parts.backing.jitter = random.Random(seed)

    async def main() -> None:
        work = Truncating(parts, seed)
        await work.run(clients=5, steps=100)
        if parts.writeback is not None:
            assert await parts.writeback.finish() == []
        await parts.precache.resize(64 * PAGE_SIZE)
        for file in work.files:
            disk = parts.bytes_on_disk(file)
            assert file.inode.size == len(disk)
            assert await parts.read(file, 0, 1 << 22) == disk

    run_seeded(main, seed)
