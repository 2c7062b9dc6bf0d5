"""The cache against a dictionary with losses: clean pages may go, bytes may not change, the bound is exact."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.cache.caches import CacheUnderTest
from tests.pagebytes import page_of, pages_of
from tmemfs.cache.pagecache import PAGE_SIZE

FILES = st.integers(0, 2)
INDEXES = st.integers(0, 40)
FRAMES = st.integers(1, 48)


class CacheMachine(RuleBasedStateMachine):
    """A cached page has the bytes that it had last; a dirty page is cached. Subclass it for each implementation."""

    implementation = CacheUnderTest
    queueing = True

    def __init__(self) -> None:
        super().__init__()
        self.tested = self.implementation(24 * PAGE_SIZE, queueing=self.queueing, limit=48 * PAGE_SIZE)
        self.cache = self.tested.cache
        self.files = [self.tested.new_file() for _ in range(3)]
        self.model: list[dict[int, bytes]] = [{}, {}, {}]
        self.dirty: list[set[int]] = [set(), set(), set()]
        self.settled = True

    def pages(self, who: int) -> set[int]:
        return self.tested.pages(self.files[who])

    def follow_evictions(self) -> None:
        """Take evicted pages out of the model: any clean page may go."""
        for who, (model, dirty) in enumerate(zip(self.model, self.dirty, strict=True)):
            held = self.pages(who)
            assert dirty <= held, "a dirty page was evicted"
            for index in model.keys() - held:
                del model[index]

    @rule(who=FILES, first=INDEXES, count=st.integers(1, 12), seed=st.integers(0, 5), short=st.integers(0, 4095))
    def insert(self, who: int, first: int, count: int, seed: int, short: int) -> None:
        data = pages_of(seed, count)[: count * PAGE_SIZE - short]
        before, model = self.pages(who), self.model[who]
        stored = self.tested.insert(self.files[who], first, data)
        assert 0 <= stored <= count
        if stored < count:
            assert self.cache.dirty_pages >= self.cache.frames
        pages = {
            first + number: data[number * PAGE_SIZE : (number + 1) * PAGE_SIZE].ljust(PAGE_SIZE, b"\0")
            for number in range(stored)
        }
        for index, page in pages.items():
            if index not in before or index not in model:
                model[index] = page
        # a resident page that this very insert evicted and inserted again has the new bytes
        for index in before & model.keys() & self.pages(who):
            now = self.tested.page(self.files[who], index)
            if index in pages and now != model[index]:
                assert now == pages[index]
                assert index not in self.dirty[who]
                model[index] = now
        self.follow_evictions()

    @rule(who=FILES, index=INDEXES)
    def hit(self, who: int, index: int) -> None:
        if index in self.pages(who):
            self.tested.hit(self.files[who], index)

    @rule(who=FILES, index=INDEXES, seed=st.integers(10, 15), start=st.integers(0, 4000), size=st.integers(1, 96))
    def overwrite(self, who: int, index: int, seed: int, start: int, size: int) -> None:
        if index in self.pages(who):
            data, old = page_of(seed, size), self.model[who][index]
            self.tested.overwrite(self.files[who], index, start, data)
            self.model[who][index] = old[:start] + data + old[start + size :]

    @rule(count=st.integers(1, 30))
    def evict(self, count: int) -> None:
        assert 0 <= self.cache.queue_victims(count) <= count
        self.follow_evictions()

    @rule(wanted=st.integers(1, 30))
    def reserve(self, wanted: int) -> None:
        self.cache.announce(wanted)
        self.cache.announce(-wanted)
        self.follow_evictions()

    @rule(count=st.integers(1, 30))
    def drain(self, count: int) -> None:
        for file, index, page in self.tested.drain(count):
            if file is not None:
                who = self.files.index(file)
                assert index not in self.dirty[who]
                assert page == self.model[who][index]
        self.follow_evictions()

    @rule(who=FILES, index=INDEXES)
    def mark_dirty(self, who: int, index: int) -> None:
        if index in self.pages(who):
            self.tested.mark_dirty(self.files[who], index)
            self.dirty[who].add(index)

    @rule(who=FILES, index=INDEXES)
    def mark_clean(self, who: int, index: int) -> None:
        if index in self.pages(who):
            self.tested.mark_clean(self.files[who], index)
        self.dirty[who].discard(index)

    @rule(who=FILES)
    def mark_all_clean(self, who: int) -> None:
        for index in sorted(self.dirty[who]):
            self.mark_clean(who, index)

    @rule(who=FILES, first=INDEXES, count=st.sampled_from([1, 3, 20, 1 << 40]))
    def remove(self, who: int, first: int, count: int) -> None:
        self.tested.remove(self.files[who], first, first + count - 1)
        self.dirty[who] = {index for index in self.dirty[who] if not first <= index < first + count}
        assert not [index for index in self.pages(who) if first <= index < first + count]
        self.follow_evictions()

    @rule(who=FILES)
    def drop_clean(self, who: int) -> None:
        self.tested.drop_clean(self.files[who])
        assert self.pages(who) == self.dirty[who]
        self.follow_evictions()

    @rule(most=st.integers(1, 12))
    def free_some(self, most: int) -> None:
        self.tested.free_some(most)

    @rule(frames=FRAMES)
    def begin_resize(self, frames: int) -> None:
        self.cache.set_capacity(frames * PAGE_SIZE)
        self.settled = self.cache.settled
        self.follow_evictions()

    @rule(frames=FRAMES)
    def resize(self, frames: int) -> None:
        self.settled = self.tested.resize(frames)
        assert self.settled or self.cache.dirty_pages
        self.follow_evictions()

    @precondition(lambda self: not self.settled)
    @rule(most=st.integers(1, 48))
    def settle(self, most: int) -> None:
        self.settled = self.tested.settle(most)
        self.follow_evictions()

    @invariant()
    def consistent(self) -> None:
        self.tested.check()
        assert self.cache.dirty_pages == sum(map(len, self.dirty))
        assert self.cache.resident == sum(len(self.pages(who)) for who in range(3)) + self.tested.dropped_pages()
        if self.settled:
            assert self.cache.resident <= self.cache.frames

    @invariant()
    def bytes_are_equal(self) -> None:
        for who, model in enumerate(self.model):
            assert self.pages(who) == model.keys()
            for index, page in model.items():
                assert self.tested.page(self.files[who], index) == page

    def teardown(self) -> None:
        self.tested.close()


class UnpooledCacheMachine(CacheMachine):
    """The same without a pool: an evicted page is gone."""

    queueing = False


_SETTINGS = settings(max_examples=60, stateful_step_count=50, deadline=None, derandomize=True)
TestCacheModel = CacheMachine.TestCase
TestCacheModel.settings = _SETTINGS
TestUnpooledCacheModel = UnpooledCacheMachine.TestCase
TestUnpooledCacheModel.settings = _SETTINGS
