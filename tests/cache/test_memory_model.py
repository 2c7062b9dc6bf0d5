"""Files, cache and pool together against the bytes of a backing: a page that is read has the last bytes, or is absent.

A page is dirty, or it is as the backing has it. What a fill brings was read from the backing when it began.
"""

from __future__ import annotations

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.pagebytes import page_of
from tests.tmem.faultysource import FaultySource, every_16th_byte, filled, flipped_bits
from tmem import PAGE_SIZE, SLAB_SIZE, CacheFrames, Tmem
from tmem.engine import lib
from tmemfs.cache.file import File, Fill
from tmemfs.cache.memory import Memory

MOST_PAGES = 96  # of a file
FILES = st.integers(0, 2)
INDEXES = st.integers(0, MOST_PAGES - 1)
COUNTS = st.sampled_from([1, 1, 2, 7, 33, 70])
SEEDS = st.integers(0, 1 << 20)
ZEROS = bytes(PAGE_SIZE)


def content_of(seed: int) -> bytes:
    """Return a page that compresses 2:1, not at all, or is same-filled."""
    kind = seed % 4
    if kind == 0:
        return random.Random(seed).randbytes(PAGE_SIZE)
    return filled(seed) if kind == 1 else page_of(seed)


def contents_of(seed: int, count: int) -> bytes:
    return b"".join(content_of(seed + number) for number in range(count))


class Backed:
    """A file, and what its backing has."""

    def __init__(self, memory: Memory, seed: int) -> None:
        self.file: File = memory.new_file()
        self.bytes = bytearray(contents_of(seed, MOST_PAGES))
        self.dirty: dict[int, bytes] = {}
        self.fills: list[tuple[Fill, bytes]] = []  # each with what it read

    @property
    def pages(self) -> int:
        return -(-len(self.bytes) // PAGE_SIZE)

    def on_disk(self, index: int) -> bytes:
        return bytes(self.bytes[index * PAGE_SIZE : (index + 1) * PAGE_SIZE]).ljust(PAGE_SIZE, b"\0")

    def last(self, index: int) -> bytes:
        """Return the page as it was left by the last change."""
        return self.dirty.get(index) or self.on_disk(index)

    def extend(self, size: int) -> None:
        if size > len(self.bytes):
            self.bytes.extend(bytes(size - len(self.bytes)))

    def check_read(self, first: int, count: int, *, sequential: bool) -> set[int]:
        """Read pages; return those that are there. Each has its last bytes."""
        out = bytearray(count * PAGE_SIZE)
        rest = self.file.gather(first, first + count - 1, out, sequential=sequential)
        absent = {index for start, end, _ in rest for index in range(start, end + 1)}
        there = set(range(first, first + count)) - absent
        for index in there:
            place = (index - first) * PAGE_SIZE
            assert out[place : place + PAGE_SIZE] == self.last(index), f"other bytes in page {index}"
        assert self.dirty.keys() & absent == set(), "a dirty page was lost"
        return there


class MemoryMachine(RuleBasedStateMachine):
    """Three files in 24 frames and 5 slabs."""

    thread = False

    def __init__(self) -> None:
        super().__init__()
        self.source = FaultySource(5 * SLAB_SIZE)
        self.tmem = Tmem(self.source, lambda: self.now, cache=CacheFrames(24, 48, thread=self.thread))
        self.now = 0.0
        self.memory = Memory(self.tmem)
        self.backed = [Backed(self.memory, seed * 1000) for seed in range(3)]

    # -- reads and fills -----------------------------------------------------------------------------------------

    def start(self, who: int, first: int, count: int, ahead: bool) -> tuple[Fill, bytes]:
        backed = self.backed[who]
        last = min(first + count, max(backed.pages, first + 1)) - 1
        fill = backed.file.begin_fill(first, last, ahead=ahead, unread=first + 1)
        return fill, bytes(backed.bytes[first * PAGE_SIZE : (last + 1) * PAGE_SIZE])

    @rule(who=FILES, first=INDEXES, count=COUNTS, ahead=st.booleans(), bypass=st.booleans())
    def fill(self, who: int, first: int, count: int, ahead: bool, bypass: bool) -> None:
        fill, data = self.start(who, first, count, ahead)
        fill.finish(data, bypass=bypass)

    @rule(who=FILES, first=INDEXES, count=COUNTS, ahead=st.booleans())
    def begin_fill(self, who: int, first: int, count: int, ahead: bool) -> None:
        if len(self.backed[who].fills) < 4:
            self.backed[who].fills.append(self.start(who, first, count, ahead))

    @precondition(lambda self: any(backed.fills for backed in self.backed))
    @rule(who=FILES, which=st.integers(0, 3), fails=st.booleans(), bypass=st.booleans())
    def end_fill(self, who: int, which: int, fails: bool, bypass: bool) -> None:
        fills = self.backed[who].fills
        if which < len(fills):
            fill, data = fills.pop(which)
            if fails:
                fill.abandon()
            else:
                fill.finish(data, bypass=bypass)

    @rule(who=FILES, first=INDEXES, count=COUNTS, sequential=st.booleans())
    def read(self, who: int, first: int, count: int, sequential: bool) -> None:
        self.backed[who].check_read(first, count, sequential=sequential)

    @rule(who=FILES, first=INDEXES, count=COUNTS, sequential=st.booleans())
    def read_through(self, who: int, first: int, count: int, sequential: bool) -> None:
        """Read as the mount does: what is absent is filled."""
        backed = self.backed[who]
        there = backed.check_read(first, count, sequential=sequential)
        for index in range(first, min(first + count, backed.pages)):
            if index not in there and backed.file.fill_of(index) is None:
                self.fill(who, index, 1, False, False)

    @rule(who=FILES, offset=st.integers(0, MOST_PAGES * PAGE_SIZE), size=st.integers(1, 9000), sequential=st.booleans())
    def read_whole(self, who: int, offset: int, size: int, sequential: bool) -> None:
        backed = self.backed[who]
        indexes = range(offset // PAGE_SIZE, (offset + size - 1) // PAGE_SIZE + 1)
        start = offset - indexes[0] * PAGE_SIZE
        for read in (backed.file.hit, backed.file.read):
            data = read(offset, size, sequential=sequential)
            if data is not None:
                assert data == b"".join(map(backed.last, indexes))[start : start + size]

    # -- changes -------------------------------------------------------------------------------------------------

    @rule(who=FILES, first=INDEXES, skip=st.integers(0, 4095), size=st.integers(1, 20_000), seed=SEEDS)
    def overwrite(self, who: int, first: int, skip: int, size: int, seed: int) -> None:
        backed, offset = self.backed[who], first * PAGE_SIZE + skip
        data = contents_of(seed, size // PAGE_SIZE + 1)[:size]
        backed.extend(offset + size)
        backed.bytes[offset : offset + size] = data
        for index in backed.dirty:
            start, end = max(offset, index * PAGE_SIZE), min(offset + size, (index + 1) * PAGE_SIZE)
            if start < end:
                page = bytearray(backed.dirty[index])
                page[start % PAGE_SIZE : start % PAGE_SIZE + end - start] = data[start - offset : end - offset]
                backed.dirty[index] = bytes(page)
        backed.file.overwrite(offset, data)

    @rule(who=FILES, pages=st.sampled_from([0, 20, 60, 80, 95, 96]), more=st.sampled_from([0, 0, 1, 2000, 4095]))
    def truncate(self, who: int, pages: int, more: int) -> None:
        backed, size = self.backed[who], pages * PAGE_SIZE + more
        del backed.bytes[size:]
        backed.extend(size)
        for index in list(backed.dirty):
            if index * PAGE_SIZE >= size:
                del backed.dirty[index]
            elif (index + 1) * PAGE_SIZE > size:
                backed.dirty[index] = backed.dirty[index][: size % PAGE_SIZE].ljust(PAGE_SIZE, b"\0")
        backed.file.truncate(size)
        assert backed.file.size == size

    @rule(who=FILES, first=INDEXES, count=st.sampled_from([1, 5, 40, 1 << 40, 1 << 51]))
    def drop(self, who: int, first: int, count: int) -> None:
        backed = self.backed[who]
        backed.file.drop(first, first + count - 1)
        backed.dirty = {index: page for index, page in backed.dirty.items() if not first <= index < first + count}
        assert not [i for i in range(first, min(first + count, MOST_PAGES)) if backed.file.has(i)]

    @rule(who=FILES, how=st.sampled_from(["clean", "all", "file"]), seed=SEEDS)
    def drop_many(self, who: int, how: str, seed: int) -> None:
        """Drop the clean pages, all pages, or the file with its pages, where no fill is in flight for it."""
        backed = self.backed[who]
        if how == "clean":
            backed.file.drop_clean()
            assert backed.file.held_pages() == len(backed.dirty)
        elif how == "all":
            backed.file.forget()
            backed.dirty.clear()
            assert not backed.file.holds()
        elif not backed.fills:
            self.backed[who] = Backed(self.memory, seed)

    @rule(who=FILES, first=INDEXES, count=st.sampled_from([1, 5, 40, 1 << 40]))
    def flush_pool(self, who: int, first: int, count: int) -> None:
        file = self.backed[who].file
        file.flush_pool(first, first + count - 1)
        if not self.thread:  # which could move pages into the pool meanwhile
            assert not [index for index in range(first, min(first + count, MOST_PAGES)) if file.is_pooled(index)]

    # -- dirty pages ---------------------------------------------------------------------------------------------

    @rule(who=FILES, first=INDEXES, count=st.sampled_from([1, 2, 9, 30]), seed=SEEDS)
    def write_back_later(self, who: int, first: int, count: int, seed: int) -> None:
        backed, data = self.backed[who], contents_of(seed, count)
        if backed.file.make_dirty(first, first + count - 1):
            backed.file.overwrite(first * PAGE_SIZE, data)
            backed.extend((first + count) * PAGE_SIZE)
            for number in range(count):
                backed.dirty[first + number] = data[number * PAGE_SIZE : (number + 1) * PAGE_SIZE]

    @rule(who=FILES, first=INDEXES, count=COUNTS)
    def write_back(self, who: int, first: int, count: int) -> None:
        backed = self.backed[who]
        for index in [index for index in backed.dirty if first <= index < first + count]:
            page = backed.file.copy_out(index, index)
            assert page == backed.dirty.pop(index)
            backed.bytes[index * PAGE_SIZE : (index + 1) * PAGE_SIZE] = page
        backed.file.mark_clean(first, first + count - 1)

    # -- cache and pool ------------------------------------------------------------------------------------------

    @rule(count=st.integers(1, 40))
    def evict(self, count: int) -> None:
        self.memory.evict(count)

    @rule(most=st.integers(1, 40))
    def drain(self, most: int) -> None:
        lib.tmem_drain(self.memory.engine, most)

    @rule(most=st.integers(1, 300))
    def sweep(self, most: int) -> None:
        lib.tmem_sweep(self.memory.engine, most)

    @rule(frames=st.sampled_from([1, 10, 16, 24, 30, 48]), steps=st.sampled_from([0, 1, 1000]), most=st.integers(1, 48))
    def resize(self, frames: int, steps: int, most: int) -> None:
        lib.tmem_release(self.memory.lease)
        lib.tmem_resize(self.memory.engine, frames)
        assert self.memory.frames == frames
        left = 1
        while steps and (left := lib.tmem_shrink(self.memory.engine, most)) == 1:
            steps -= 1
        if left == 0:
            assert self.memory.settled

    @rule(slabs=st.integers(1, 3))
    def give_up(self, slabs: int) -> None:
        out = self.source.slabs_out
        assert self.tmem.give_up(slabs) == out - self.source.slabs_out <= slabs

    @rule(which=st.integers(0, 4), who=FILES)
    def lose(self, which: int, who: int) -> None:
        slabs = self.source.slabs_of(False)
        if slabs and not self.source.raises:
            slab = slabs[which % len(slabs)]
            self.source.revoke(slab)
            self.backed[who].check_read(0, MOST_PAGES, sequential=True)  # some of it is zeros now
            self.tmem.lose(slab)

    @rule(at=st.integers(0, 15), who=FILES, sequential=st.booleans())
    def flip(self, at: int, who: int, sequential: bool) -> None:
        """Flip a bit in every 16 stored bytes: what is read from a slot is absent, and never other bytes."""
        with flipped_bits(self.source.fd, every_16th_byte(self.source.fd, at)):
            self.backed[who].check_read(0, MOST_PAGES, sequential=sequential)

    @rule(seed=SEEDS)
    def work_frozen(self, seed: int) -> None:
        self.tmem.freeze()
        self.work(seed)
        self.tmem.thaw()

    @rule(fault=st.sampled_from(["refuses", "raises"]), seed=SEEDS)
    def work_without_source(self, fault: str, seed: int) -> None:
        setattr(self.source, fault, True)
        self.work(seed)
        self.give_up(1)
        setattr(self.source, fault, False)
        self.now += 2.0

    @rule(slabs=st.integers(2, 5))
    def resize_pool(self, slabs: int) -> None:
        self.source.resize(slabs * SLAB_SIZE)
        self.tmem.follow_capacity()

    @rule(seed=SEEDS)
    def work(self, seed: int) -> None:
        """Read here and there, in order and not, and now and then write."""
        source = random.Random(seed)
        for _ in range(20):
            who, first, count = source.randrange(3), source.randrange(MOST_PAGES), source.choice((1, 1, 4, 20))
            self.read_through(who, first, count, source.random() < 0.3)
            if source.random() < 0.1:
                self.overwrite(who, first, 0, source.randrange(1, 9000), source.randrange(1 << 20))
            if source.random() < 0.3:
                self.memory.evict(source.randrange(20))

    @rule()
    def restock(self) -> None:
        self.tmem.restock()

    # -- what always holds ---------------------------------------------------------------------------------------

    @invariant()
    def everything_adds_up(self) -> None:
        self.tmem.check()
        self.source.check()
        counts = self.tmem.counts()
        assert counts.slabs == self.source.slabs_out
        assert counts.dirty_pages == sum(len(backed.dirty) for backed in self.backed)
        assert counts.used_frames <= counts.frames or not counts.settled

    @invariant()
    def dirty_pages_stay(self) -> None:
        for backed in self.backed:
            assert backed.file.dirty_pages() == sorted(backed.dirty)
            for index, page in backed.dirty.items():
                assert backed.file.copy_out(index, index) == page

    @invariant()
    def pages_in_frames_have_the_last_bytes(self) -> None:
        if not self.thread:  # or they could move meanwhile
            for backed in self.backed:
                for index in filter(backed.file.is_cached, range(MOST_PAGES + 31)):
                    assert backed.file.copy_out(index, index) == backed.last(index)

    def teardown(self) -> None:
        for backed in self.backed:
            backed.check_read(0, MOST_PAGES + 31, sequential=False)
            for fill, _ in backed.fills:
                fill.abandon()
        self.tmem.check()
        self.backed.clear()
        self.memory.close()
        self.source.close()


class ThreadedMemoryMachine(MemoryMachine):
    """The same with the engine's own thread, which gets slabs when it asks for them."""

    thread = True

    @invariant()
    def bring_slabs(self) -> None:
        self.tmem.restock()


TestMemory = MemoryMachine.TestCase
TestMemory.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestThreadedMemory = ThreadedMemoryMachine.TestCase
TestThreadedMemory.settings = settings(max_examples=15, stateful_step_count=50, deadline=None)
