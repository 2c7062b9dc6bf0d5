"""Concurrent readers and writers: every byte read was current during the read, and the counters add up."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import trio

from tests.guestparts import MakeParts, Parts, make_parts
from tests.pagebytes import MIB, pages_touched
from tests.scheduling import run_seeded
from tmem.arena import PAGE_SIZE

__all__ = ["make_parts"]


class Workload:
    """Concurrent seeded readers and writers of a few files.

    Sectors of 512 bytes are written whole, each with the number of its write. A read may see the last write of a sector
    that was complete before the read began, or any write that overlaps the read.
    """

    SECTOR = 512
    SECTORS = 600

    def __init__(self, parts: Parts, seed: int) -> None:
        self.parts = parts
        self.generator = random.Random(seed)
        self.clock = 0
        self.requested = 0
        self.files = [parts.make(f"f{number}", self.stamp(0) * self.SECTORS) for number in range(3)]
        # for each file and sector: (number, begin, end) of every write
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
        size_before = file.inode.file.size
        offset, size = first * self.SECTOR, count * self.SECTOR
        inside = max(0, min(size, size_before - offset))
        data = await self.parts.read(file, offset, size)
        end = self.tick()
        self.requested += pages_touched(offset, inside)
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
        for inode in self.parts.inodes.all():
            inode.file.drop_clean()

    async def resize(self) -> None:
        await self.parts.memory.resize(self.generator.choice([16, 40, 64, 128]) * PAGE_SIZE)

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
            self.parts.memory.check()

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
        await parts.memory.resize(64 * PAGE_SIZE)
        for which, file in enumerate(work.files):
            disk = parts.bytes_on_disk(file)
            for index, changes in enumerate(work.history[which]):
                number = int.from_bytes(disk[index * 512 : index * 512 + 8], "little")
                assert number in work.allowed(changes, work.clock, work.clock)
            assert await parts.read(file, 0, len(disk)) == disk

    run_seeded(main, seed)


class Truncating(Workload):
    """The same with truncates; the bytes are compared at the end."""

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
            self.parts.memory.check()


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
        await parts.memory.resize(64 * PAGE_SIZE)
        for file in work.files:
            disk = parts.bytes_on_disk(file)
            assert file.inode.file.size == len(disk)
            assert await parts.read(file, 0, 1 << 22) == disk

    run_seeded(main, seed)
