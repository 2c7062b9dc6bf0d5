"""The swap-like file against a bytearray, while the pool refuses, the overflow file fails and caps fall."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.hswap.fakes import Area, raw_page
from tests.tmem.faultysource import every_16th_byte, flipped_bits
from tmem import PAGE_SIZE
from tmemfs.hswap.pagemap import HOLE, LOST, POOL

R = TypeVar("R")
X = TypeVar("X")

PAGES = 48
SLABS = 2  # 32 raw pages
CONTENTS = [bytes(PAGE_SIZE), b"\x07" * PAGE_SIZE, *(raw_page(seed) for seed in range(4))]
CONTENTS += [(raw_page(seed)[:600] * 7)[:PAGE_SIZE] for seed in range(3)]

OFFSETS = st.one_of(st.integers(0, PAGES - 1).map(lambda page: page * PAGE_SIZE), st.integers(0, PAGES * PAGE_SIZE - 1))
SIZES = st.one_of(st.sampled_from([1, PAGE_SIZE, 3 * PAGE_SIZE, 20 * PAGE_SIZE]), st.integers(1, 5 * PAGE_SIZE))


def outcome(call: Callable[[int, X], Awaitable[R]], offset: int, what: X) -> R | OSError:
    """Run one call; return its result or its error."""
    try:
        return trio.run(call, offset, what)
    except OSError as error:
        return error


class HswapMachine(RuleBasedStateMachine):
    """A file whose pages have what was written last; after a failed write the old or the new content."""

    def __init__(self) -> None:
        super().__init__()
        self.area = Area(PAGES, SLABS)
        self.model = bytearray(PAGES * PAGE_SIZE)
        self.lost: set[int] = set()

    def page_of_model(self, page: int) -> bytes:
        return bytes(self.model[page * PAGE_SIZE : (page + 1) * PAGE_SIZE])

    @rule(offset=OFFSETS, size=SIZES, content=st.sampled_from(range(len(CONTENTS))))
    def write(self, offset: int, size: int, content: int) -> None:
        source = CONTENTS[content] * (size // PAGE_SIZE + 2)
        data = source[offset % PAGE_SIZE :][:size][: len(self.model) - offset]
        first, last = offset // PAGE_SIZE, (offset + len(data) - 1) // PAGE_SIZE
        done = outcome(self.area.hswap.write, offset, data)
        if isinstance(done, OSError):
            assert done.errno in (errno.EIO, errno.ENOSPC)
            self.settle_failed(first, last, offset, data)
        else:
            assert done == len(data)
            self.model[offset : offset + len(data)] = data
            self.lost -= set(range(first, last + 1))

    def settle_failed(self, first: int, last: int, offset: int, data: bytes) -> None:
        """Update the model after a failed write: each page has its old or its new content, or is lost."""
        after = bytearray(self.model)
        after[offset : offset + len(data)] = data
        for page in range(first, last + 1):
            start = page * PAGE_SIZE
            found = self.look(page)
            if found is None:
                self.lost.add(page)
            else:
                assert found in (self.page_of_model(page), bytes(after[start : start + PAGE_SIZE]))
                assert page not in self.lost or found == bytes(after[start : start + PAGE_SIZE])
                self.lost.discard(page)
                self.model[start : start + PAGE_SIZE] = found

    def look(self, page: int) -> bytes | None:
        """Read a page without injected errors; return None for a lost one."""
        overflow = self.area.overflow
        broken, overflow.broken = overflow.broken, False
        found = outcome(self.area.hswap.read, page * PAGE_SIZE, PAGE_SIZE)
        overflow.broken = broken
        if isinstance(found, OSError):
            assert found.errno == errno.EIO
            assert self.area.hswap.pagemap.location(page) == LOST
            return None
        return found

    @rule(offset=OFFSETS, size=SIZES)
    def read(self, offset: int, size: int) -> None:
        end = min(offset + size, len(self.model))
        pages = range(offset // PAGE_SIZE, (end - 1) // PAGE_SIZE + 1)
        found = outcome(self.area.hswap.read, offset, size)
        if isinstance(found, OSError):
            assert found.errno == errno.EIO
            assert self.lost & set(pages) or self.area.overflow.broken
        else:
            assert not self.lost & set(pages)
            assert found == bytes(self.model[offset:end])

    @rule(refuses=st.booleans(), cap=st.integers(0, SLABS), frozen=st.booleans())
    def change_pool(self, refuses: bool, cap: int, frozen: bool) -> None:
        self.area.source.refuses, self.area.source.cap = refuses, cap
        (self.area.tmem.freeze if frozen else self.area.tmem.thaw)()

    @rule(full=st.booleans(), broken=st.booleans(), turns=st.integers(0, 2))
    def change_overflow(self, full: bool, broken: bool, turns: int) -> None:
        self.area.overflow.full, self.area.overflow.broken, self.area.overflow.turns = full, broken, turns

    @rule(slabs=st.integers(0, SLABS))
    def lower_cap(self, slabs: int) -> None:
        source = self.area.source
        source.cap = slabs
        over = source.persistent_slabs - slabs
        given = trio.run(self.area.hswap.release_slabs, max(0, over))
        overflow = self.area.overflow
        if not (overflow.full or overflow.broken):
            assert given >= max(0, over) or not self.area.hswap.pagemap.pool_pages
            assert source.persistent_slabs <= slabs

    @rule(seconds=st.sampled_from([0.01, 1.0, 5.0]))
    def wait(self, seconds: float) -> None:
        self.area.now += seconds

    @rule(at=st.integers(0, 15))
    def flip(self, at: int) -> None:
        """Flip bits of every page in the pool: reading one is an error, until the bits are back."""
        pagemap = self.area.hswap.pagemap
        kept = (page for page in range(PAGES) if pagemap.location(page) == POOL and not self.is_same_filled(page))
        page = next(kept, None)
        if page is None:
            return
        fd = self.area.source.fd
        with flipped_bits(fd, every_16th_byte(fd, at)):
            found = outcome(self.area.hswap.read, page * PAGE_SIZE, 1)
        assert isinstance(found, OSError), "a flipped bit was not seen"
        assert found.errno == errno.EIO
        assert f"page {page} " in str(found)

    def is_same_filled(self, page: int) -> bool:
        data = self.page_of_model(page)
        return data == data[:8] * (PAGE_SIZE // 8)

    @rule()
    def clear(self) -> None:
        trio.run(self.area.hswap.clear)
        self.model[:] = bytes(len(self.model))
        self.lost.clear()

    @invariant()
    def everything_adds_up(self) -> None:
        self.area.check()
        pagemap = self.area.hswap.pagemap
        for page in range(PAGES):
            assert (pagemap.location(page) == LOST) == (page in self.lost)
            if self.page_of_model(page) != bytes(PAGE_SIZE) and page not in self.lost:
                assert pagemap.location(page) != HOLE
            elif page not in self.lost:
                assert pagemap.location(page) == HOLE, "a page of zeros takes a place"
        assert pagemap.pool_pages == sum(pagemap.location(page) == POOL for page in range(PAGES))

    def teardown(self) -> None:
        self.area.tmem.thaw()
        self.area.overflow.broken = False
        for page in range(PAGES):
            found = self.look(page)
            assert found == (None if page in self.lost else self.page_of_model(page))
        self.area.close()


TestHswapMachine = HswapMachine.TestCase
TestHswapMachine.settings = settings(max_examples=60, stateful_step_count=40)
