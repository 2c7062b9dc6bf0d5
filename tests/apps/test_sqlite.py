"""sqlite keeps every row whose COMMIT returned, even if writers or the guest are killed."""

from __future__ import annotations

import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.apps.sqlwriter import TABLE, connect, data_of
from tests.conftest import REPOSITORY, Place, wait_until
from tests.mounted import Mounted
from tmemfs.kernel.kernelmount import unmount
from tmemfs.kernel.mounttable import top_mount

pytestmark = pytest.mark.mount
Options = tuple[str, ...]
WRITERS = 3
KILLS = 8
SEED = 20090701
SECONDS = 120.0  # every commit is several fsyncs, and the disk may be busy


class Writers:
    """Processes that write to one database, and their notes outside of the mount."""

    def __init__(self, database: Path, journal: str, notes: Path) -> None:
        self.database = database
        self.journal = journal
        self.notes = notes
        self.processes: dict[int, subprocess.Popen[str]] = {}

    def begin(self, writer: int, seed: int) -> None:
        """Start a writer."""
        program = REPOSITORY / "tests" / "apps" / "sqlwriter.py"
        words = (program, self.database, self.journal, self.notes / f"{writer}", writer, seed)
        self.processes[writer] = subprocess.Popen(
            [sys.executable, "-P", *map(str, words)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def noted(self, writer: int) -> list[tuple[str, int, int]]:
        """Return the notes of a writer."""
        path = self.notes / f"{writer}"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(mark, int(first), int(last)) for mark, first, last in map(str.split, lines)]

    def kill(self, writer: int) -> str:
        """Kill a writer; return its last mark: `?` within a commit, `!` between two."""
        process = self.processes.pop(writer)
        running = process.poll() is None
        process.kill()
        printed = process.communicate(timeout=SECONDS)[0]
        assert running, f"a writer ended by itself: {printed}"
        return self.noted(writer)[-1][0] if self.noted(writer) else ""

    def finish(self) -> None:
        """End all writers."""
        for process in self.processes.values():
            assert process.stdin is not None
            process.stdin.close()
            process.stdin = None
        for process in self.processes.values():
            printed = process.communicate(timeout=SECONDS)[0]
            assert process.returncode == 0, printed
        self.processes.clear()

    def committed(self) -> set[tuple[int, int]]:
        """Return the rows whose COMMIT returned."""
        return {
            (writer, number)
            for writer in range(WRITERS)
            for mark, first, last in self.noted(writer)
            if mark == "!"
            for number in range(first, last + 1)
        }

    def wait_for_rows(self, rows: int) -> None:
        """Wait until so many more rows are committed."""
        before = len(self.committed())
        wait_until(lambda: len(self.committed()) >= before + rows, "rows are committed", SECONDS)

    def clean(self) -> None:
        """Kill the remaining writers."""
        for process in self.processes.values():
            process.kill()
            process.communicate(timeout=SECONDS)


@pytest.fixture(params=["wal", "delete"])
def writers(request: pytest.FixtureRequest, mounted: Mounted, tmp_path: Path) -> Iterator[Writers]:
    """Yield writers, for both kinds of journal."""
    made = Writers(mounted.root / "rows.db", request.param, tmp_path)
    try:
        yield made
    finally:
        made.clean()


def create(path: Path, journal: str) -> None:
    """Create the database."""
    base = connect(path, journal)
    base.execute(TABLE)
    base.close()


def check(path: Path, committed: set[tuple[int, int]]) -> int:
    """Assert that a database is sound and holds every committed row, and of each transaction all rows or none."""
    base = sqlite3.connect(path, timeout=SECONDS)
    try:
        assert base.execute("pragma integrity_check").fetchall() == [("ok",)]
        found = set()
        transactions: dict[tuple[int, int, int], int] = {}
        for writer, number, first, last, data in base.execute("select * from rows"):
            assert data == data_of(writer, number), f"row {number} of writer {writer} is not as it was written"
            found.add((writer, number))
            transactions[writer, first, last] = transactions.get((writer, first, last), 0) + 1
    finally:
        base.close()
    assert committed <= found, sorted(committed - found)[:10]
    torn = [one for one, count in transactions.items() if count != one[2] - one[1] + 1]
    assert not torn
    return len(found)


def test_writers_are_killed_and_every_commit_stays(mounted: Mounted, writing: Options, writers: Writers) -> None:
    mounted.start(*writing)
    generator = random.Random(f"{SEED} {writers.journal} {writing}")
    create(writers.database, writers.journal)
    for writer in range(WRITERS):
        writers.begin(writer, generator.randrange(1 << 30))
    wait_until(lambda: all(len(writers.noted(writer)) >= 2 for writer in range(WRITERS)), "everybody commits", SECONDS)
    marks = []
    for _ in range(KILLS):
        time.sleep(generator.uniform(0.05, 0.5))
        victim = generator.randrange(WRITERS)
        marks.append(writers.kill(victim))
        writers.wait_for_rows(1)
        writers.begin(victim, generator.randrange(1 << 30))
    wait_until(lambda: writers.database.stat().st_size > 2 << 20, "the database outgrows the cache", SECONDS)
    writers.finish()
    committed = writers.committed()
    assert len(committed) > 200, marks
    rows = check(writers.database, committed)
    assert mounted.stats()["cache_evictions"] > 200
    mounted.end()
    assert check(mounted.source / "rows.db", committed) == rows


def test_the_guest_is_killed_and_every_commit_stays(
    open_place: Place, mounted: Mounted, writing: Options, writers: Writers
) -> None:
    generator = random.Random(f"{SEED} {writers.journal} {writing}")
    mounted.start(*writing)
    create(writers.database, writers.journal)
    for _ in range(2):
        for writer in range(WRITERS):
            writers.begin(writer, generator.randrange(1 << 30))
        writers.wait_for_rows(50)
        time.sleep(generator.uniform(0, 0.3))
        guest, mounted.process = mounted.process, None
        mounted.stop_watchdog()
        assert guest is not None
        guest.kill()
        guest.communicate(timeout=SECONDS)
        for process in writers.processes.values():
            # An error, or SIGBUS if it maps the index of the write-ahead log.
            assert process.wait(timeout=SECONDS) != 0, "a writer must get an error"
            process.communicate(timeout=SECONDS)
        writers.processes.clear()
        while top_mount(mounted.root) is not None:
            unmount(mounted.root, lazy=True)
        check(mounted.source / "rows.db", writers.committed())
        mounted.start(*writing)
    check(writers.database, writers.committed())
