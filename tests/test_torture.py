"""A mount and a plain directory give the same outcome for every sequence of operations.

Hypothesis generates and shrinks sequences of a single process. Runs of `make torture` with fixed seeds add several
processes, remounts and sizes that are too large to shrink.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from tests.conftest import REPOSITORY, Place
from tests.mounted import Mounted
from tests.torture.generator import DIRECTORIES, FILES, MAPS, OPENINGS
from tests.torture.pair import Difference, Pair, explain
from tests.torture.replica import PAGE, Replica, content
from tests.torture.run import MODES, Torture, TortureError
from tests.torture.trees import first_difference

EXAMPLE_SECONDS = 120.0
BOUNDED = settings(
    max_examples=40,
    stateful_step_count=100,
    derandomize=True,
    deadline=None,
    database=None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
SLOTS = 3  # fewer than in a torture run: a short sequence must return to them
slots = st.integers(0, SLOTS - 1)
maps = st.integers(0, MAPS - 1)
files = st.sampled_from(FILES[:5])
names = st.sampled_from((*FILES, *DIRECTORIES))
tags = st.integers(0, 15)
offsets = st.one_of(
    st.integers(0, 8).map(lambda page: page * PAGE),
    st.builds(lambda page, byte: max(0, page * PAGE + byte), st.integers(0, 8), st.integers(-2, 700)),
    st.integers(0, 400_000),
)
sizes = st.one_of(st.integers(1, 3 * PAGE), st.sampled_from((PAGE, 16 * PAGE, 131_072, 300_000)))


class Comparison(RuleBasedStateMachine):
    """The operations of the torture as rules; one mount serves all examples, each in a new directory."""

    mounted: ClassVar[Mounted]
    plain: ClassVar[Path]
    numbers: ClassVar[Iterator[int]]

    def __init__(self) -> None:
        super().__init__()
        assert self.mounted.process is not None
        self.watchdog = threading.Timer(EXAMPLE_SECONDS, self.mounted.process.kill)
        self.watchdog.start()
        name = f"example{next(self.numbers)}"
        (self.plain / name).mkdir()
        (self.mounted.root / name).mkdir()
        self.pair = Pair(
            self.mounted.root / name, self.plain / name, self.mounted.source / name, self.mounted.root / ".tmemfs"
        )
        self.pair.run(("control", "freeze", "0"))
        self.pair.run(("mkdir", "d0"))
        for slot in range(SLOTS):
            self.pair.run(("open", slot, FILES[slot], os.O_RDWR | os.O_CREAT))

    @rule(slot=slots, name=files, flags=st.sampled_from(OPENINGS))
    def open(self, slot: int, name: str, flags: int) -> None:
        self.pair.run(("open", slot, name, flags))

    @rule(slot=slots, offset=offsets, size=sizes)
    def pread(self, slot: int, offset: int, size: int) -> None:
        self.pair.run(("pread", slot, offset, size))

    @rule(slot=slots, offset=offsets, size=sizes, tag=tags)
    def pwrite(self, slot: int, offset: int, size: int, tag: int) -> None:
        self.pair.run(("pwrite", slot, offset, size, tag))

    @rule(slot=slots, size=sizes)
    def read(self, slot: int, size: int) -> None:
        self.pair.run(("read", slot, size))

    @rule(slot=slots, size=sizes, tag=tags)
    def write(self, slot: int, size: int, tag: int) -> None:
        self.pair.run(("write", slot, size, tag))

    @rule(slot=slots)
    def read_all(self, slot: int) -> None:
        self.pair.run(("pread", slot, 0, 1 << 20))

    @rule(slot=slots, offset=offsets)
    def truncate(self, slot: int, offset: int) -> None:
        self.pair.run(("ftruncate", slot, offset))

    @rule(slot=slots, by=st.integers(-5000, 5000))
    def truncate_near_the_end(self, slot: int, by: int) -> None:
        found = self.pair.run(("fstat", slot))
        if isinstance(found, tuple):
            self.pair.run(("ftruncate", slot, max(0, found[2] + by)))

    @rule(slot=slots, offset=offsets, size=sizes, what=st.sampled_from(("allocate", "punch", "sync", "sync", "close")))
    def use_slot(self, slot: int, offset: int, size: int, what: str) -> None:
        words = {"sync": (offset % 2 == 0,), "close": ()}.get(what, (offset, size))
        self.pair.run((what, slot, *words))

    @rule(number=maps, slot=slots, first=st.integers(0, 30), pages=st.sampled_from((1, 8, 100)), private=st.booleans())
    def map(self, number: int, slot: int, first: int, pages: int, private: bool) -> None:
        self.pair.run(("map", number, slot, first, pages, private))

    @rule(number=maps, offset=offsets, size=sizes)
    def read_mapped(self, number: int, offset: int, size: int) -> None:
        self.pair.run(("mread", number, offset, size))

    @rule(number=maps, offset=offsets, size=sizes, tag=tags)
    def write_mapped(self, number: int, offset: int, size: int, tag: int) -> None:
        self.pair.run(("mwrite", number, offset, size, tag))

    @rule(number=maps, what=st.sampled_from(("msync", "unmap")))
    def end_mapping(self, number: int, what: str) -> None:
        self.pair.run((what, number))

    @rule(old=names, new=names, what=st.sampled_from(("rename", "rename", "link", "symlink")))
    def give_name(self, old: str, new: str, what: str) -> None:
        self.pair.run((what, old, new))

    @rule(name=names, what=st.sampled_from(("unlink", "unlink", "mkdir", "rmdir", "readlink", "stat", "whole", "cut")))
    def use_name(self, name: str, what: str) -> None:
        self.pair.run(("truncate", name, 5000) if what == "cut" else (what, name))

    @rule(size=st.sampled_from(("1M", "1100K", "2M")))
    def resize(self, size: str) -> None:
        self.pair.run(("control", "cache_size", size))

    @rule(what=st.sampled_from((("drop_caches", "1"), ("freeze", "1"), ("freeze", "0"))))
    def drop_freeze_or_thaw(self, what: tuple[str, str]) -> None:
        self.pair.run(("control", *what))

    @invariant()
    def open_files_agree(self) -> None:
        """Compare size and link count of every open file."""
        for slot in self.pair.plain.slots:
            self.pair.run(("fstat", slot))

    def teardown(self) -> None:
        try:
            self.pair.compare()
        finally:
            self.pair.close()
            self.watchdog.cancel()
        self.pair.compare_backing()


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    made = tmp_path / "plain"
    made.mkdir()
    return made


@pytest.mark.mount
@pytest.mark.timeout(600)  # for shrinking a failure
@pytest.mark.parametrize("mode", ["through", "writeback", "watchback"])
def test_every_sequence_has_the_outcome_of_a_plain_directory(place: Place, plain: Path, mode: str) -> None:
    mounted = Mounted(place)
    try:
        mounted.start("--pool", "256K", *MODES[mode])
        mounted.stop_watchdog()  # each example has its own
        machine = type("Machine", (Comparison,), {"mounted": mounted, "plain": plain, "numbers": itertools.count()})
        run_state_machine_as_test(machine, settings=BOUNDED)
        mounted.end()
    finally:
        mounted.stop_watchdog()


@pytest.mark.mount
@pytest.mark.parametrize(
    ("seed", "mode", "processes"),
    [(1, "through", 2), (2, "writeback", 2), (3, "watch", 1), (4, "threadsback", 2), (5, "nopool", 3)],
)
def test_processes_on_a_mount_see_what_a_plain_directory_shows(
    place: Place, plain: Path, seed: int, mode: str, processes: int
) -> None:
    Torture(seed, mode, processes, mounts=2, operations=400).run(place, plain)


# -- the torture program ---------------------------------------------------------------------------------------------


def test_a_difference_is_found_and_described(tmp_path: Path) -> None:
    """Both replicas are plain directories; one is changed in between."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    pair = Pair(tmp_path / "one", tmp_path / "other", tmp_path / "one", tmp_path)
    pair.run(("open", 0, "f", os.O_RDWR | os.O_CREAT))
    pair.run(("pwrite", 0, 100, 5000, 1))
    pair.compare()
    with (tmp_path / "one" / "f").open("r+b") as file:
        file.seek(4097)
        file.write(b"\0")
    with pytest.raises(Difference, match=r"f: the byte at 4097 \(page 1\) differs"):
        pair.compare()
    with pytest.raises(Difference, match="1 of 200 bytes differ, from 97"):
        pair.run(("pread", 0, 4000, 200))
    os.link(tmp_path / "one" / "f", tmp_path / "one" / "g")
    os.link(tmp_path / "other" / "f", tmp_path / "other" / "g")
    (tmp_path / "one" / "g").chmod(0o600)
    with pytest.raises(Difference, match="stat"):
        pair.run(("stat", "g"))
    pair.close()


def test_the_names_of_one_file_are_compared(tmp_path: Path) -> None:
    for root in (tmp_path / "one", tmp_path / "other"):
        root.mkdir()
        for name in "abcd":
            (root / name).touch()
        (root / "a").unlink()
        (root / "b").unlink()
    os.link(tmp_path / "one" / "c", tmp_path / "one" / "a")
    os.link(tmp_path / "one" / "d", tmp_path / "one" / "b")
    os.link(tmp_path / "other" / "d", tmp_path / "other" / "a")
    os.link(tmp_path / "other" / "c", tmp_path / "other" / "b")
    assert "names of one file" in str(first_difference(tmp_path / "one", tmp_path / "other"))


def test_operations_on_empty_slots_do_nothing(tmp_path: Path) -> None:
    replica = Replica(tmp_path)
    for op in (("pread", 0, 0, 1), ("mwrite", 0, 0, 1, 1), ("close", 0), ("map", 0, 0, 0, 1, False), ("sync", 1, True)):
        assert replica.run(op) == "nothing to do"
    assert replica.run(("stat", "missing")) == "ENOENT"


def test_a_seed_determines_a_run_and_a_tag_its_content() -> None:
    assert Torture.of_seed(7) == Torture.of_seed(7)
    assert str(Torture.of_seed(7, "watch", 2)) == "SEED=7 MODE=watch PROCESSES=2"
    assert len({content(tag, 64) for tag in range(64)}) == 64
    assert explain(b"ab", b"a") == "2 bytes on the plain directory, 1 through the mount"


def test_a_worker_that_fails_ends_the_run(place: Place, plain: Path) -> None:
    """Nothing is mounted, so the control files are missing and the first write to one fails."""
    torture = Torture(1, "through", 1, mounts=1, operations=300)
    with pytest.raises(TortureError, match="its last operations"):
        torture.run_workers(place, Mounted(place), plain, [1])


@pytest.mark.mount
def test_the_program_prints_its_seed_first(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tests.torture", "--seconds", "0", "--seed", "12", "--mode", "through"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, check=False, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("seed 12\nSEED=12 MODE=through PROCESSES=")
