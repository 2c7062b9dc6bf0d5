"""A backing that fails on command, below the source of a place."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

from tests.conftest import REPOSITORY, SECONDS, Place
from tmemfs.kernel.kernelmount import unmount
from tmemfs.kernel.mounttable import top_mount


class FailingBacking:
    """The process of faultfs.py over `directory`, and the faults that it is told to make."""

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

    def fail(self, *faults: str) -> None:
        """Replace all faults in one step; no faults if none are given."""
        new = self._faults.with_suffix(".new")
        new.write_text("\n".join(faults))
        os.replace(new, self._faults)

    def end(self) -> None:
        """End all faults and unmount."""
        self.fail()
        while top_mount(self.mountpoint) is not None:
            unmount(self.mountpoint, lazy=True)
        self.process.kill()
        self.process.wait(SECONDS)


@pytest.fixture
def backing(place: Place) -> Iterator[FailingBacking]:
    """Yield a backing that can fail; its faults end at teardown."""
    made = FailingBacking(place)
    try:
        yield made
    finally:
        made.end()
