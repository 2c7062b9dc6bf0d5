"""Pools against models: an ephemeral pool is a dict that loses pages, a persistent one a dict that may refuse a put."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.tmem.faultysource import FaultySource, every_16th_byte, filled, flipped_bits, page_of
from tests.tmem.implementations import IMPLEMENTATIONS, AnyPool, AnyTmem
from tmem import SLAB_SIZE, PageCorrupt

Handle = tuple[int, int]

OBJECTS = st.integers(0, 2)
INDEXES = st.one_of(st.integers(0, 5), st.integers(2**40, 2**40 + 40))
PAGES = [filled(0), filled(7)] + [
    page_of(seed, size) for seed in range(3) for size in (60, 300, 1000, 1400, 2000, 2060, 3000, 4096)
]
CONTENT = st.sampled_from(range(len(PAGES)))
POOLS = st.sampled_from(["private", "shared", "persistent"])


class PoolMachine(RuleBasedStateMachine):
    """Three pools on one small, faulty slab source. Subclass it for each implementation of the contract."""

    implementation: type[AnyTmem]

    def __init__(self) -> None:
        super().__init__()
        self.source = FaultySource(5 * SLAB_SIZE)
        self.now = 0.0
        self.tmem = self.implementation(self.source, clock=lambda: self.now)
        self.pools: dict[str, AnyPool] = {}
        self.models: dict[str, dict[Handle, bytes]] = {}
        for kind in ("private", "shared", "persistent"):
            self.make(kind)

    def make(self, kind: str) -> None:
        persistent, shared = kind == "persistent", kind == "shared"
        self.pools[kind] = self.tmem.new_pool(persistent=persistent, shared=shared, name=kind)
        self.models[kind] = {}

    @rule(kind=POOLS, obj=OBJECTS, index=INDEXES, content=CONTENT, hot=st.booleans())
    def put(self, kind: str, obj: int, index: int, content: int, hot: bool) -> None:
        pool, model, page = self.pools[kind], self.models[kind], bytearray(PAGES[content])
        refused = pool.stats.rejected_puts
        if pool.put(obj, index, page, hot):
            assert not pool.frozen
            model[obj, index] = bytes(page)
            assert pool.holds(obj, index), "an accepted page is there right after its put"
        else:
            model.pop((obj, index), None)
            assert pool.stats.rejected_puts == refused + 1
            assert not pool.holds(obj, index)
        page[:] = bytes(4096)

    @rule(kind=POOLS, obj=OBJECTS, start=INDEXES, content=CONTENT, count=st.integers(10, 120))
    def put_many(self, kind: str, obj: int, start: int, content: int, count: int) -> None:
        for index in range(start, start + count):
            self.put(kind, obj, index, (content + index % 2) % len(PAGES), False)

    @rule(kind=POOLS, obj=OBJECTS, index=INDEXES)
    def get(self, kind: str, obj: int, index: int) -> None:
        model = self.models[kind]
        page = self.pools[kind].get(obj, index)
        if kind == "persistent":
            assert page == model.get((obj, index))
        elif page is not None:
            assert page == model[obj, index]
        else:
            model.pop((obj, index), None)
        if kind == "private":
            model.pop((obj, index), None)
            assert not self.pools[kind].holds(obj, index)

    @rule(kind=POOLS, obj=OBJECTS, start=INDEXES, step=st.integers(1, 3))
    def get_many(self, kind: str, obj: int, start: int, step: int) -> None:
        for index in range(start, start + 60, step):
            self.get(kind, obj, index)

    @rule(kind=POOLS, obj=OBJECTS, index=INDEXES)
    def flush_page(self, kind: str, obj: int, index: int) -> None:
        held = self.pools[kind].holds(obj, index)
        assert self.pools[kind].flush_page(obj, index) == held
        self.models[kind].pop((obj, index), None)

    @rule(kind=POOLS, obj=OBJECTS)
    def flush_object(self, kind: str, obj: int) -> None:
        pool, model = self.pools[kind], self.models[kind]
        known = [handle for handle in model if handle[0] == obj]
        removed = pool.flush_object(obj)
        assert removed == len(known) if kind == "persistent" else removed <= len(known)
        for handle in known:
            del model[handle]
        assert not pool.has_object(obj)

    @rule(kind=POOLS)
    def freeze_or_thaw(self, kind: str) -> None:
        pool = self.pools[kind]
        if pool.frozen:
            pool.thaw()
        else:
            pool.freeze()

    @rule(kind=POOLS)
    def destroy(self, kind: str) -> None:
        old = self.pools[kind]
        old.destroy()
        assert old.stats.pages == 0
        self.make(kind)

    @rule(slabs=st.integers(1, 3))
    def give_up(self, slabs: int) -> None:
        out = self.source.slabs_out
        assert self.tmem.give_up(slabs) == out - self.source.slabs_out <= slabs

    @rule(which=st.integers(0, 4), late=st.booleans())
    def lose(self, which: int, late: bool) -> None:
        slabs = self.source.slabs_of(False)
        if slabs and not self.source.raises:
            slab = slabs[which % len(slabs)]
            self.source.revoke(slab)
            if late:
                self.get_many("private", 0, 0, 1)
            self.tmem.lose(slab)

    @rule(refuses=st.booleans(), raises=st.booleans(), cap=st.sampled_from([None, 0, 1, 3]))
    def break_source(self, refuses: bool, raises: bool, cap: int | None) -> None:
        self.source.refuses, self.source.raises, self.source.persistent_cap = refuses, raises, cap

    @rule(slabs=st.integers(1, 5), seconds=st.sampled_from([0.1, 2.0]))
    def resize(self, slabs: int, seconds: float) -> None:
        self.now += seconds
        self.source.resize(slabs * SLAB_SIZE)

    @rule(at=st.integers(0, 15))
    def flip(self, at: int) -> None:
        """Flip a bit in every 16 stored bytes: every page that is not same-filled is corrupt meanwhile."""
        with flipped_bits(self.source.fd, every_16th_byte(self.source.fd, at)):
            for (obj, index), page in self.models["persistent"].items():
                try:
                    found = self.pools["persistent"].get(obj, index)
                except PageCorrupt:
                    continue
                assert found == page == page[:8] * (len(page) // 8), "a flipped bit was not detected"

    @invariant()
    def everything_adds_up(self) -> None:
        self.tmem.check()
        self.source.check()
        assert self.tmem.stats().slabs == self.source.slabs_out
        for obj, index in self.models["persistent"]:
            assert self.pools["persistent"].holds(obj, index), "a persistent page was dropped"

    def teardown(self) -> None:
        for kind, model in self.models.items():
            for obj, index in list(model):
                self.get(kind, obj, index)
        self.source.close()


class PythonPoolMachine(PoolMachine):
    implementation = IMPLEMENTATIONS["python"]


TestPythonPoolMachine = PythonPoolMachine.TestCase
TestPythonPoolMachine.settings = settings(max_examples=60, stateful_step_count=50)
