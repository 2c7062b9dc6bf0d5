"""The races of docs/design/coherency.md and pool.md on real threads: cffi drops the interpreter's lock at each call.

A page has a version in each of its words. A reader notes the version of the last change that ended, then reads: each
word that it finds has that version or a later one. The backing is an array of versions; what a fill brings is what the
array had when the fill began.
"""

from __future__ import annotations

import contextlib
import errno
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import trio

from tests.scheduling import in_trio
from tests.tmem.faultysource import FaultySource
from tmem import PAGE_SIZE, SLAB_SIZE, CacheFrames, Tmem
from tmem.engine import ffi, lib
from tmemfs.cache.file import File, Fill
from tmemfs.cache.memory import Memory

SECONDS = 1.0
PAGES = 64
WORDS = PAGE_SIZE // 8
NOISE = int.from_bytes(random.Random(1).randbytes(PAGE_SIZE // 2), "little")  # half of a page compresses
REPEATED = sum(1 << 64 * word for word in range(WORDS))

Step = Callable[[random.Random], None]


def page_of(index: int, version: int) -> bytes:
    """Return the page with a version: each word has its number and version, half of the words under noise."""
    return ((index << 32 | version) * REPEATED ^ NOISE).to_bytes(PAGE_SIZE, "little")


def versions_in(page: bytes, index: int) -> set[int]:
    """Return the versions in a page. A word of zeros has none: a page is zeros until its first bytes are written."""
    words = memoryview((int.from_bytes(page, "little") ^ NOISE).to_bytes(PAGE_SIZE, "little")).cast("Q")
    found = set(words)
    if {word >> 32 for word in found} != {index}:
        found = {word for word, raw in zip(words, memoryview(page).cast("Q"), strict=True) if raw}
    assert {word >> 32 for word in found} <= {index}, f"page {index} has other bytes"
    return {word & 0xFFFF_FFFF for word in found}


class View:
    """What one thread needs to call the engine: a lease and buffers of its own."""

    def __init__(self, memory: Memory) -> None:
        self.engine = memory.engine
        self.lease = lib.tmem_lease_new(memory.engine)
        self.reply = ffi.new("struct tmem_reply *")
        self.facts = ffi.new("struct tmem_facts *")
        self.version = ffi.new("struct tmem_version *")
        self.view = memory.view
        self.fills: dict[int, Fill] = {}
        self.alive = [True]

    def close(self) -> None:
        lib.tmem_lease_free(self.lease)


class SameFile(File):
    """A file as another thread sees it."""

    def __init__(self, shared: View, file: File) -> None:
        self._shared = shared
        self._engine = shared.engine
        self._number = file._number

    def __del__(self) -> None:
        """Leave the handle to the file that has it."""


class Guest:
    """A file with a versioned backing in a small cache over a small pool, and threads that use it."""

    def __init__(self, frames: int = 24, slabs: int = 4) -> None:
        self.source = FaultySource(slabs * SLAB_SIZE)
        self.tmem = Tmem(self.source, cache=CacheFrames(frames, 128))
        self.memory = Memory(self.tmem)
        self.file = self.memory.new_file()
        self.file.size = PAGES * PAGE_SIZE
        self.backing = [0] * PAGES
        self.begun = [0] * PAGES  # the version of the last change that began
        self.done = [0] * PAGES  # and of the last that ended
        self.found = 0  # pages that were in memory
        self.views: list[View] = []
        self.steps: list[Step] = [self.bring_slabs]

    def view(self) -> View:
        self.views.append(View(self.memory))
        return self.views[-1]

    def add(self, step: Step) -> None:
        """Let a thread of its own repeat a step."""
        self.steps.append(step)

    def run(self, seconds: float = SECONDS) -> None:
        """Run all threads for so long, then check the engine."""
        end = time.monotonic() + seconds
        errors: list[BaseException] = []

        def repeat(step: Step, seed: int) -> None:
            source = random.Random(seed)
            try:
                while time.monotonic() < end and not errors:
                    step(source)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=repeat, args=(step, seed)) for seed, step in enumerate(self.steps)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            self.tmem.check()
            time.sleep(0.01)
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        self.tmem.check()
        assert self.found, "no page was in memory: nothing was tested"

    def close(self) -> None:
        for view in self.views:
            view.close()
        del self.file
        self.memory.close()
        self.source.close()

    # -- steps ---------------------------------------------------------------------------------------------------

    def bring_slabs(self, source: random.Random) -> None:
        """Grant slabs: the only step that calls the source, if no other does."""
        self.tmem.restock()
        time.sleep(0.0005)

    def evictor(self) -> Step:
        def evict(source: random.Random) -> None:
            lib.tmem_evict_from_cache(self.memory.engine, source.randrange(1, 16))
            time.sleep(0.0002)

        return evict

    def reader(self, *, fills: bool = True, pages: int = PAGES) -> Step:
        """Read pages and fill those that are absent; every word has the version of the last change, or a later one."""
        file, out = SameFile(self.view(), self.file), bytearray(8 * PAGE_SIZE)

        def read(source: random.Random) -> None:
            first = source.randrange(pages)
            last = min(first + source.choice((0, 0, 3, 7)), pages - 1)
            least = self.done[first : last + 1]
            rest = file.gather(first, last, out, sequential=source.random() < 0.3)
            most = self.begun[first : last + 1]
            absent = {index for start, end, _ in rest for index in range(start, end + 1)}
            for index in set(range(first, last + 1)) - absent:
                place = index - first
                page = bytes(out[place * PAGE_SIZE : (place + 1) * PAGE_SIZE])
                versions = versions_in(page, index) or {most[place]}
                assert least[place] <= min(versions), f"page {index} has {versions} after {least[place]}"
                assert max(versions) <= most[place]
                assert any(page) or least[place] < most[place], f"page {index} is zeros"
                self.found += 1
            for start, end, fill in rest:
                if fill is None and fills:
                    self.fill(file, start, end, source)

        return read

    def fill(self, file: File, first: int, last: int, source: random.Random) -> None:
        fill = file.begin_fill(first, last, ahead=source.random() < 0.3, unread=last + 1)
        data = b"".join(page_of(index, self.backing[index]) for index in range(first, last + 1))
        time.sleep(source.choice((0, 0, 0.0003)))
        fill.finish(data, bypass=source.random() < 0.1)

    def writer(self, change: Callable[[Guest, File, int, int, random.Random], None], pages: int = PAGES) -> Step:
        """Change pages, one change after the other."""
        file = SameFile(self.view(), self.file)

        def write(source: random.Random) -> None:
            first = source.randrange(pages)
            last = min(first + source.choice((0, 0, 5, 20)), pages - 1)
            change(self, file, first, last, source)
            time.sleep(source.choice((0, 0.0003)))

        return write

    def begin(self, first: int, last: int) -> bytes:
        """Begin a change of pages; return their new bytes."""
        for index in range(first, last + 1):
            self.begun[index] += 1
        return b"".join(page_of(index, self.begun[index]) for index in range(first, last + 1))

    def to_backing(self, first: int, last: int) -> None:
        self.backing[first : last + 1] = self.begun[first : last + 1]

    def end(self, first: int, last: int) -> None:
        self.done[first : last + 1] = self.begun[first : last + 1]


@pytest.fixture
def guest() -> Iterator[Guest]:
    """Return a guest; threads switch often, so that more orders of their calls are tried."""
    with switching(0.0001):
        made = Guest()
        yield made
        made.close()


@contextlib.contextmanager
def switching(seconds: float) -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(seconds)
    yield
    sys.setswitchinterval(before)


# -- changes -----------------------------------------------------------------------------------------------------------


def overwrite(guest: Guest, file: File, first: int, last: int, source: random.Random) -> None:
    """Write through: into the backing first, then into memory."""
    data = guest.begin(first, last)
    guest.to_backing(first, last)
    file.overwrite(first * PAGE_SIZE, data)
    guest.end(first, last)


def overwrite_in_parts(guest: Guest, file: File, first: int, last: int, source: random.Random) -> None:
    """Write through, each page in two parts."""
    data = guest.begin(first, last)
    guest.to_backing(first, last)
    half = source.randrange(1, WORDS) * 8
    file.overwrite(first * PAGE_SIZE, data[:half])
    file.overwrite(first * PAGE_SIZE + half, data[half:])
    guest.end(first, last)


def truncate(guest: Guest, file: File, first: int, last: int, source: random.Random) -> None:
    """Cut the file off, and write it again from there on."""
    guest.begin(first, PAGES - 1)
    guest.to_backing(first, PAGES - 1)
    file.truncate(first * PAGE_SIZE)
    file.size = PAGES * PAGE_SIZE
    guest.end(first, PAGES - 1)


def drop(guest: Guest, file: File, first: int, last: int, source: random.Random) -> None:
    """Drop pages that a failed write may have changed."""
    guest.begin(first, last)
    guest.to_backing(first, last)
    file.drop(first, last)
    guest.end(first, last)


def drop_clean(guest: Guest, file: File, first: int, last: int, source: random.Random) -> None:
    """Drop all pages: others have changed the file."""
    guest.begin(first, last)
    guest.to_backing(first, last)
    file.drop_clean()
    guest.end(first, last)


def write_later(guest: Guest, file: File, first: int, last: int, source: random.Random) -> None:
    """Write into dirty pages, and into the backing after a while."""
    last = min(last, first + 5)
    data = guest.begin(first, last)
    if not file.make_dirty(first, last):
        guest.to_backing(first, last)
        file.drop(first, last)
        guest.end(first, last)
        return
    file.overwrite(first * PAGE_SIZE, data)
    guest.end(first, last)
    time.sleep(source.choice((0, 0.0005)))
    guest.to_backing(first, last)
    file.mark_clean(first, last)


CHANGES = [overwrite, overwrite_in_parts, truncate, drop, drop_clean, write_later]


@pytest.mark.parametrize("change", CHANGES)
def test_a_fill_never_brings_back_what_was_changed_meanwhile(
    guest: Guest, change: Callable[[Guest, File, int, int, random.Random], None]
) -> None:
    for _ in range(2):
        guest.add(guest.reader())
    guest.add(guest.writer(change))
    guest.add(guest.evictor())
    guest.run()


# -- evictions, slabs, promotions --------------------------------------------------------------------------------------


def taking_slabs(guest: Guest, how: str) -> Step:
    """Return the step that brings slabs and takes them away again, by the guest's own will or the lender's."""

    def take(source: random.Random) -> None:
        guest.tmem.restock()
        slabs = guest.source.slabs_of(False)
        if how == "give_up" and len(slabs) > 2:
            guest.tmem.give_up(source.randrange(1, 3))
        elif how == "lose" and slabs:
            slab = source.choice(slabs)
            guest.source.revoke(slab)  # the reader may see zeros in a slot from here on
            time.sleep(source.choice((0, 0.0005)))
            guest.tmem.lose(slab)
        time.sleep(source.choice((0.001, 0.01)))

    return take


@pytest.mark.parametrize("how", ["evict", "lose", "give_up"])
def test_a_read_beside_evictions_and_lost_slabs_has_the_right_bytes(guest: Guest, how: str) -> None:
    if how != "evict":
        guest.steps[0] = taking_slabs(guest, how)
    for _ in range(2):
        guest.add(guest.reader())
    guest.add(guest.evictor())
    guest.run()
    stats = guest.memory.pool.stats
    assert stats.reads + stats.succ_gets, "no page was read in its slot"
    assert how != "lose" or guest.tmem.counts().lost_slabs


def test_a_page_that_moves_up_while_it_is_overwritten_has_the_new_bytes(guest: Guest) -> None:
    few = 6
    for _ in range(2):
        guest.add(guest.reader(pages=few))
    guest.add(guest.writer(overwrite, pages=few))
    guest.add(guest.evictor())
    guest.run()
    assert guest.memory.pool.stats.succ_gets, "no page moved up"


# -- shrinks and leases ------------------------------------------------------------------------------------------------


def test_frames_of_a_lease_keep_their_bytes_while_the_cache_shrinks(guest: Guest) -> None:
    file = SameFile(guest.view(), guest.file)

    def read(source: random.Random) -> None:
        first = source.randrange(PAGES)
        last = min(first + source.choice((0, 3, 20)), PAGES - 1)
        size = (last - first + 1) * PAGE_SIZE
        data = file.hit(first * PAGE_SIZE, size, sequential=False) or file.read(
            first * PAGE_SIZE, size, sequential=False
        )
        if data is None:
            guest.fill(file, first, last, source)
            return
        for _ in range(2):
            assert data == b"".join(page_of(index, 0) for index in range(first, last + 1))
            time.sleep(0.0005)
        guest.found += 1

    def resize(source: random.Random) -> None:
        lib.tmem_resize(guest.memory.engine, source.choice((4, 12, 60, 128)))
        while lib.tmem_shrink(guest.memory.engine, source.choice((1, 16, 128))) == 1:
            time.sleep(0)
        time.sleep(0.0005)

    guest.add(read)
    guest.add(guest.reader())
    guest.add(resize)
    guest.run()
    lib.tmem_resize(guest.memory.engine, 4)
    for view in guest.views:
        lib.tmem_release(view.lease)
    while lib.tmem_shrink(guest.memory.engine, 128) in (1, -errno.EBUSY):  # the engine's thread pins pages as well
        pass
    assert guest.memory.settled, "a lease that was released keeps no frame"
    assert guest.memory.resident <= 4


@in_trio
async def test_a_shrink_goes_on_once_pages_are_not_pinned_any_more(guest: Guest) -> None:
    view = guest.view()
    file = SameFile(view, guest.file)
    guest.fill(file, 0, 15, random.Random(1))
    assert lib.tmem_hit(view.lease, file._number, 15 * PAGE_SIZE, PAGE_SIZE, 0) >= 4 * PAGE_SIZE
    async with trio.open_nursery() as nursery:
        nursery.start_soon(guest.memory.resize, 4 * PAGE_SIZE)
        await trio.sleep(0.02)
        assert not guest.memory.settled
        lib.tmem_release(view.lease)
    assert guest.memory.settled
    assert guest.memory.resident <= 4


# -- closing -----------------------------------------------------------------------------------------------------------


def test_a_file_is_freed_while_its_pages_are_moved_to_the_pool(guest: Guest) -> None:
    view = guest.view()

    def live(source: random.Random) -> None:
        file = File(view)
        file.size = PAGES * PAGE_SIZE
        for first in range(0, PAGES, 16):
            guest.fill(file, first, first + 15, source)
        if source.random() < 0.3:
            file.make_dirty(2, 5)
        out = bytearray(PAGE_SIZE)
        index = source.randrange(PAGES)
        if not file.gather(index, index, out, sequential=False) and not file.is_dirty(index):
            assert out == page_of(index, 0)
            guest.found += 1
        del file

    guest.add(live)
    guest.add(guest.reader())
    guest.add(guest.evictor())
    guest.run()
    guest.file.forget()
    while lib.tmem_sweep(guest.memory.engine, 1000):
        pass
    assert guest.memory.resident == guest.memory.pool.stats.pages == 0


def test_an_engine_ends_while_its_thread_waits_for_slabs() -> None:
    guest = Guest()
    assert guest.file.make_dirty(0, 23)  # all frames: the thread wants some, and finds none to empty
    time.sleep(0.005)
    end = threading.Thread(target=guest.memory.close, daemon=True)
    end.start()
    end.join(10)
    assert not end.is_alive()
    guest.source.close()


def test_an_engine_ends_while_its_thread_moves_pages() -> None:
    for seed in range(30):
        guest, source = Guest(), random.Random(seed)
        for first in range(0, PAGES, 8):
            guest.fill(guest.file, first, first + 7, source)
        guest.tmem.restock()
        guest.close()
