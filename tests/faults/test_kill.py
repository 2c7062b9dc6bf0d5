"""A guest killed at any moment loses no acknowledged write, and with --writeback no fsynced one."""

from __future__ import annotations

import os
import random
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.calls import GONE, code_of
from tests.conftest import REPOSITORY, Place, has_ended, wait_until
from tests.faults.recorder import FILES, SLOT_BYTES, number_of, record
from tmemfs.kernel.kernelmount import unmount
from tmemfs.kernel.mounttable import top_mount

pytestmark = pytest.mark.mount
SECONDS = 60.0
SMALL = ("--cache", "1M", "--pool", "512K")
WAYS = {"write": (), "fsync": ("--writeback",)}


class Recorder:
    """A recorder process and its notes."""

    def __init__(self, place: Place, notes: Path, seed: int, how: str) -> None:
        self._notes = notes
        self._place = place
        words = [sys.executable, "-P", str(REPOSITORY / "tests" / "faults" / "recorder.py")]
        self.process = subprocess.Popen(
            [*words, str(place.mountpoint), str(notes), str(seed), how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        place.adopt(self.process)

    def write_records(self, acknowledgements: int) -> None:
        """Start writing, and wait until so many more records are acknowledged."""
        assert self.process.stdin is not None
        before = self._count()
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        wait_until(lambda: self._count() >= before + acknowledgements, "records are acknowledged", SECONDS)

    def _count(self) -> int:
        return self._notes.read_bytes().count(b"!") if self._notes.exists() else 0

    def wait_for_error(self) -> None:
        """Wait until it got an error."""
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], SECONDS)[0], "the writer hangs although the mount is gone"
        self.process.stdout.readline()

    def allowed(self) -> dict[tuple[int, int], set[int] | None]:
        """Return the numbers that each slot may hold; None if an unacknowledged write may have torn it."""
        slots: dict[tuple[int, int], set[int] | None] = {}
        for line in self._notes.read_text().splitlines():
            kind, file, slot, number = line.split()
            key = int(file), int(slot)
            if kind == "?":
                slots[key] = None
            else:
                slots[key] = {int(number)}
        return slots


def lost(place: Place, recorder: Recorder) -> list[str]:
    """Compare the backing with the acknowledged records."""
    contents = [(place.source / f"f{file}").read_bytes() for file in range(FILES)]
    wrong = []
    for (file, slot), numbers in recorder.allowed().items():
        data = contents[file][slot * SLOT_BYTES : (slot + 1) * SLOT_BYTES]
        if numbers is not None and number_of(data, file, slot) not in numbers:
            wrong.append(f"file {file} slot {slot}: {numbers} acknowledged, {number_of(data, file, slot)} found")
    return wrong


@pytest.fixture
def places(tmp_path: Path) -> Iterator[dict[str, Place]]:
    """Yield a place for each way of writing."""
    made = {}
    try:
        for how in WAYS:
            (tmp_path / how).mkdir()
            made[how] = Place(tmp_path / how)
        yield made
    finally:
        for place in made.values():
            place.clean()


@pytest.mark.timeout(900)  # each mount starts a Python interpreter
@pytest.mark.parametrize("kills", [50])
def test_a_kill_at_any_moment_loses_nothing_that_was_acknowledged(places: dict[str, Place], kills: int) -> None:
    """Both ways of writing in turn; each mount replaces the dead one at its mountpoint."""
    source = random.Random(kills)
    recorders = {how: Recorder(place, place.log.with_name("notes"), kills, how) for how, place in places.items()}
    for number in range(kills):
        how = list(WAYS)[number % len(WAYS)]
        place, recorder = places[how], recorders[how]
        process = place.serve(*SMALL, *WAYS[how])
        recorder.write_records(source.randrange(1, 40))
        time.sleep(source.random() * 0.02)  # a random moment for the kill
        process.kill()
        process.communicate(timeout=SECONDS)
        recorder.wait_for_error()
        assert lost(place, recorder) == [], f"after kill {number}"
    for how, place in places.items():
        known = [numbers for numbers in recorders[how].allowed().values() if numbers is not None]
        assert len(known) > 50, "the writer was never busy: nothing was tested"
        place.serve(*SMALL, *WAYS[how])
        for file in range(FILES):
            assert (place.mountpoint / f"f{file}").read_bytes() == (place.source / f"f{file}").read_bytes()
        (place.mountpoint / "more").write_text("works")
        assert (place.mountpoint / "more").read_text() == "works"


def test_records_that_are_torn_or_misplaced_are_recognised(places: dict[str, Place]) -> None:
    """Show that the test above would find a loss."""
    good = record(1, 2, 77)
    assert number_of(good, 1, 2) == 77
    assert number_of(good, 1, 3) is None
    assert number_of(good[:5000] + bytes(1) + good[5001:], 1, 2) is None
    assert number_of(bytes(SLOT_BYTES), 1, 2) is None
    assert number_of(good[:-1], 1, 2) is None


def test_a_killed_background_mount_is_unmounted_by_the_command(open_place: Place) -> None:
    assert open_place.mount(*SMALL).returncode == 0
    (open_place.mountpoint / "f").write_bytes(b"acknowledged")
    pid = open_place.logged_pid()
    os.kill(pid, 9)
    wait_until(lambda: has_ended(pid), "the guest is gone")
    assert code_of(lambda: os.listdir(open_place.mountpoint)) in GONE
    assert top_mount(open_place.mountpoint) is not None
    unmount(open_place.mountpoint, lazy=True)
    assert (open_place.source / "f").read_bytes() == b"acknowledged"
    assert open_place.mount(*SMALL).returncode == 0
    assert (open_place.mountpoint / "f").read_bytes() == b"acknowledged"
