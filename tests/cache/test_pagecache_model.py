"""The cache against a dictionary with losses: clean pages may go, bytes may not change, the bound is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.cache.caches import IMPLEMENTATIONS, AnyCache, free_all
from tests.pagebytes import page_of, pages_of
from tmem.arena import PAGE_SIZE

FILES = st.integers(0, 2)
INDEXES = st.integers(0, 40)
FRAMES = st.integers(1, 48)


class CacheMachine(RuleBasedStateMachine):
    """A page that is found has the bytes that it had last; a dirty page is found. Subclass it for an implementation."""

    implementation: Callable[..., AnyCache]

    def __init__(self) -> None:
        super().__init__()
        self.cache: Any = type(self).implementation(24, limit=48)
        self.files = [self.cache.new_file() for _ in range(3)]
        self.model: list[dict[int, bytes]] = [{}, {}, {}]
        self.dirty: list[set[int]] = [set(), set(), set()]
        self.settled = True

    def pages(self, who: int) -> set[int]:
        found: set[int] = self.cache.pages(self.files[who])
        return found

    def follow_losses(self) -> None:
        """Take lost pages out of the model: any clean page may go."""
        for who, (model, dirty) in enumerate(zip(self.model, self.dirty, strict=True)):
            held = self.pages(who)
            assert dirty <= held, "a dirty page was lost"
            for index in model.keys() - held:
                del model[index]

    @rule(who=FILES, first=INDEXES, count=st.integers(1, 12), seed=st.integers(0, 5), short=st.integers(0, 4095))
    def insert(self, who: int, first: int, count: int, seed: int, short: int) -> None:
        data = pages_of(seed, count)[: count * PAGE_SIZE - short]
        before, model = self.pages(who), self.model[who]
        self.cache.insert(self.files[who], first, data)
        found = self.pages(who)
        if self.settled and self.cache.dirty_pages < self.cache.frames:
            assert first + count - 1 in found
        for number in range(count):
            index, page = first + number, data[number * PAGE_SIZE : (number + 1) * PAGE_SIZE].ljust(PAGE_SIZE, b"\0")
            if index in found and index not in before:
                model[index] = page
            elif index in found and self.cache.page(self.files[who], index) != model[index]:
                # this very insertion drove the page out, and brought it again
                assert index not in self.dirty[who]
                model[index] = page
        self.follow_losses()

    @rule(who=FILES, index=INDEXES)
    def hit(self, who: int, index: int) -> None:
        if index in self.pages(who):
            self.cache.hit(self.files[who], index)

    @rule(who=FILES, index=INDEXES, seed=st.integers(10, 15), start=st.integers(0, 4000), size=st.integers(1, 96))
    def overwrite(self, who: int, index: int, seed: int, start: int, size: int) -> None:
        if index in self.pages(who):
            data, old = page_of(seed, size), self.model[who][index]
            self.cache.overwrite(self.files[who], index, start, data)
            self.model[who][index] = old[:start] + data + old[start + size :]
            self.follow_losses()

    @rule(count=st.integers(1, 30))
    def evict(self, count: int) -> None:
        assert 0 <= self.cache.evict(count) <= count
        self.follow_losses()

    @rule(wanted=st.integers(1, 30))
    def announce(self, wanted: int) -> None:
        self.cache.announce(wanted)
        self.follow_losses()

    @rule(who=FILES, index=INDEXES)
    def mark_dirty(self, who: int, index: int) -> None:
        if index in self.pages(who):
            if self.cache.mark_dirty(self.files[who], index):
                self.dirty[who].add(index)
            self.follow_losses()

    @rule(who=FILES, index=INDEXES)
    def mark_clean(self, who: int, index: int) -> None:
        if index in self.pages(who):
            self.cache.mark_clean(self.files[who], index)
        self.dirty[who].discard(index)

    @rule(who=FILES)
    def mark_all_clean(self, who: int) -> None:
        for index in sorted(self.dirty[who]):
            self.mark_clean(who, index)

    @rule(who=FILES, first=INDEXES, count=st.sampled_from([1, 3, 20, 1 << 40]))
    def remove(self, who: int, first: int, count: int) -> None:
        self.cache.remove(self.files[who], first, first + count - 1)
        self.dirty[who] = {index for index in self.dirty[who] if not first <= index < first + count}
        assert not [index for index in self.pages(who) if first <= index < first + count]
        self.follow_losses()

    @rule(who=FILES)
    def drop_clean(self, who: int) -> None:
        self.cache.drop_clean(self.files[who])
        assert self.pages(who) == self.dirty[who]
        self.follow_losses()

    @rule(most=st.integers(1, 60))
    def free_some(self, most: int) -> None:
        self.cache.free_some(most)

    @rule()
    def free_all(self) -> None:
        free_all(self.cache, self.files)

    @rule(frames=FRAMES)
    def begin_resize(self, frames: int) -> None:
        self.cache.begin_resize(frames)
        self.settled = False
        self.follow_losses()

    @rule(frames=FRAMES)
    def resize(self, frames: int) -> None:
        self.settled = self.cache.resize(frames)
        assert self.settled or self.cache.dirty_pages >= frames
        self.follow_losses()

    @rule(most=st.integers(1, 48))
    def settle(self, most: int) -> None:
        self.settled = self.cache.settle(most)
        self.follow_losses()

    @invariant()
    def consistent(self) -> None:
        self.cache.check()
        assert self.cache.dirty_pages == sum(map(len, self.dirty))
        assert not self.settled or self.cache.resident <= self.cache.frames

    @invariant()
    def bytes_are_equal(self) -> None:
        for who, model in enumerate(self.model):
            assert self.pages(who) == model.keys()
            assert self.cache.dirty(self.files[who]) == self.dirty[who]
            for index, page in model.items():
                assert self.cache.page(self.files[who], index) == page

    def teardown(self) -> None:
        self.files.clear()
        self.cache.close()


def machine_of(name: str) -> Any:
    """Return the test case of an implementation."""
    machine: Any = type(name, (CacheMachine,), {"implementation": staticmethod(IMPLEMENTATIONS[name])})
    case = machine.TestCase
    case.settings = settings(max_examples=40, stateful_step_count=50, deadline=None, derandomize=True)
    return case


TestPythonCache = machine_of("python")
TestPythonCacheWithQueue = machine_of("python with a queue")
TestEngineCache = machine_of("engine")
TestEngineCacheWithPool = machine_of("engine with a pool")
