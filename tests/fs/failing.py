"""A backing directory that fails on command, under the source of a place."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

from tests.conftest import REPOSITORY, SECONDS, Place
from tmemfs.kernel.kernelmount import unmount
from tmemfs.kernel.mounttable import top_mount


class Backing:
    """Be the process of faultfs.py, and what it is ordered; `directory` is what is behind it."""

    def __init__(self, place: Place) -> None:
        self.mountpoint = place.source
        self.directory = place.source.parent / "behind"
        self.directory.mkdir()
        self._faults = place.source.parent / "faults"
        self._faults.touch()
        program = REPOSITORY / "tests" / "fs" / "faultfs.py"
        words = (program, self.directory, self.mountpoint, self._faults)
        self.process = place.start(sys.executable, *map(os.fspath, words))
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def fail(self, *orders: str) -> None:
        """Order faults, in one step; no orders end them all."""
        new = self._faults.with_suffix(".new")
        new.write_text("\n".join(orders))
        os.replace(new, self._faults)

    def end(self) -> None:
        """Let go of whatever hangs, and take the mount away."""
        self.fail()
        while top_mount(self.mountpoint) is not None:
            unmount(self.mountpoint, lazy=True)
        self.process.kill()
        self.process.wait(SECONDS)


@pytest.fixture
def backing(place: Place) -> Iterator[Backing]:
    """Give a test a backing that can fail; whatever hangs in it is let go when the test ends."""
    made = Backing(place)
    try:
        yield made
    finally:
        made.end()
