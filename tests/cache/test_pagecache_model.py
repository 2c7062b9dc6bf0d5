"""The cache against a dictionary with losses: clean pages may go, bytes may not change, the bound is exact."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.cache.caches import Owner, content, make, resize
from tests.pagebytes import page_of, pages_of
from tmemfs.cache.pagecache import FREE, PAGE_SIZE, USED, PageTable

OWNERS = st.integers(0, 2)
INDEXES = st.integers(0, 40)
FRAMES = st.integers(1, 48)


class CacheMachine(RuleBasedStateMachine):
    """A page that is there has the bytes it had last; a dirty page is there."""

    queueing = True

    def __init__(self) -> None:
        super().__init__()
        self.cache = make(24, queueing=self.queueing, limit=48 * PAGE_SIZE)
        self.owners = [Owner() for _ in range(3)]
        self.model: list[dict[int, bytes]] = [{}, {}, {}]
        self.dirty: list[set[int]] = [set(), set(), set()]
        self.discarded: list[PageTable] = []
        self.settled = True

    def forget_lost(self) -> None:
        """Follow evictions: which page goes is the cache's choice, unless it is dirty."""
        for owner, model, dirty in zip(self.owners, self.model, self.dirty, strict=True):
            assert dirty <= owner.pages.keys(), "a dirty page was evicted"
            for index in model.keys() - owner.pages.keys():
                del model[index]

    @rule(who=OWNERS, first=INDEXES, count=st.integers(1, 12), seed=st.integers(0, 5), short=st.integers(0, 4095))
    def insert(self, who: int, first: int, count: int, seed: int, short: int) -> None:
        data = pages_of(seed, count)[: count * PAGE_SIZE - short]
        there = set(self.owners[who].pages)
        stored = self.cache.insert(self.owners[who], first, data)
        assert 0 <= stored <= count
        if stored < count:
            assert self.cache.dirty_pages >= self.cache.frames
        for position in range(stored):
            if first + position not in there or first + position not in self.model[who]:
                page = data[position * PAGE_SIZE : (position + 1) * PAGE_SIZE]
                self.model[who][first + position] = page.ljust(PAGE_SIZE, b"\0")
        # a page that was resident, evicted by this very insert and inserted again has the new bytes
        for index in there & self.model[who].keys() & self.owners[who].pages.keys():
            now = content(self.cache, self.owners[who], index)
            if first <= index < first + stored and now != self.model[who][index]:
                page = data[(index - first) * PAGE_SIZE : (index - first + 1) * PAGE_SIZE]
                assert now == page.ljust(PAGE_SIZE, b"\0")
                assert index not in self.dirty[who]
                self.model[who][index] = now
        self.forget_lost()

    @rule(who=OWNERS, index=INDEXES)
    def hit(self, who: int, index: int) -> None:
        frame = self.owners[who].pages.get(index)
        if frame is not None:
            self.cache.ref[frame] = USED

    @rule(who=OWNERS, index=INDEXES, seed=st.integers(10, 15), start=st.integers(0, 4000), size=st.integers(1, 96))
    def overwrite(self, who: int, index: int, seed: int, start: int, size: int) -> None:
        frame = self.owners[who].pages.get(index)
        if frame is not None:
            data = page_of(seed, size)
            self.cache.page(frame)[start : start + size] = data
            self.cache.ref[frame] = USED
            old = self.model[who][index]
            self.model[who][index] = old[:start] + data + old[start + size :]

    @rule(count=st.integers(1, 30))
    def evict(self, count: int) -> None:
        assert 0 <= self.cache.queue_victims(count) <= count
        self.forget_lost()

    @rule(wanted=st.integers(1, 30))
    def reserve(self, wanted: int) -> None:
        self.cache.announce(wanted)
        self.cache.announce(-wanted)
        self.forget_lost()

    @rule(count=st.integers(1, 30))
    def drain(self, count: int) -> None:
        for _ in range(count):
            frame = self.cache.next_victim()
            if frame < 0:
                break
            table, index = self.cache.describe(frame)
            if not table.discarded:
                who = next(number for number, one in enumerate(self.owners) if one.pages is table)
                assert index not in self.dirty[who]
                assert bytes(self.cache.page(frame)) == self.model[who][index]
            self.cache.evict(frame)
        self.forget_lost()

    @rule(who=OWNERS, index=INDEXES)
    def soil(self, who: int, index: int) -> None:
        frame = self.owners[who].pages.get(index)
        if frame is not None:
            self.cache.soil(frame)
            self.dirty[who].add(index)

    @rule(who=OWNERS, index=INDEXES)
    def clean(self, who: int, index: int) -> None:
        frame = self.owners[who].pages.get(index)
        if frame is not None:
            self.cache.clean(frame)
        self.dirty[who].discard(index)

    @rule(who=OWNERS)
    def clean_all(self, who: int) -> None:
        for index in sorted(self.dirty[who]):
            self.clean(who, index)

    @rule(who=OWNERS, first=INDEXES, count=st.sampled_from([1, 3, 20, 1 << 40]))
    def remove(self, who: int, first: int, count: int) -> None:
        self.cache.remove(self.owners[who], first, first + count - 1)
        self.dirty[who] = {index for index in self.dirty[who] if not first <= index < first + count}
        assert not [index for index in self.owners[who].pages if first <= index < first + count]
        self.forget_lost()

    @rule(who=OWNERS)
    def renew(self, who: int) -> None:
        old = self.owners[who].pages
        new = self.owners[who].pages = self.cache.split(old, self.dirty[who])
        assert new.keys() == self.dirty[who]
        self.discarded.append(old)
        self.forget_lost()

    @rule(most=st.integers(1, 12))
    def free_some(self, most: int) -> None:
        for table in self.discarded:
            left = len(table)
            assert self.cache.free_some(table, most) == min(most, left) == left - len(table)

    @rule(frames=FRAMES)
    def begin_resize(self, frames: int) -> None:
        self.cache.set_capacity(frames * PAGE_SIZE)
        self.settled = len(self.cache.ref) == frames
        self.forget_lost()

    @rule(frames=FRAMES)
    def resize(self, frames: int) -> None:
        resize(self.cache, frames * PAGE_SIZE)
        self.settled = len(self.cache.ref) == self.cache.frames
        assert self.settled or self.cache.dirty_pages
        self.forget_lost()

    @precondition(lambda self: not self.settled)
    @rule(most=st.integers(1, 48))
    def settle(self, most: int) -> None:
        while self.cache.settle(most):
            pass
        self.settled = len(self.cache.ref) == self.cache.frames
        self.forget_lost()

    @invariant()
    def consistent(self) -> None:
        self.cache.check()
        assert self.cache.dirty_pages == sum(map(len, self.dirty))
        held = [*(owner.pages for owner in self.owners), *self.discarded]
        assert self.cache.resident == sum(map(len, held))
        if self.settled:
            assert self.cache.resident <= self.cache.frames

    @invariant()
    def bytes_are_equal(self) -> None:
        for owner, model in zip(self.owners, self.model, strict=True):
            assert owner.pages.keys() == model.keys()
            for index, frame in owner.pages.items():
                assert self.cache.ref[frame] != FREE
                assert bytes(self.cache.page(frame)) == model[index]

    def teardown(self) -> None:
        self.cache.check()
        self.cache.close()


class UnpooledCacheMachine(CacheMachine):
    """The same without a pool: what is evicted is gone."""

    queueing = False


_SETTINGS = settings(max_examples=60, stateful_step_count=50, deadline=None, derandomize=True)
TestCacheModel = CacheMachine.TestCase
TestCacheModel.settings = _SETTINGS
TestUnpooledCacheModel = UnpooledCacheMachine.TestCase
TestUnpooledCacheModel.settings = _SETTINGS
