"""Fixtures of the fault tests."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Place
from tests.mounted import VARIANTS, Mounted


@pytest.fixture
def open_place() -> Iterator[Place]:
    """Give a place that other users may walk into, as they may not into pytest's directories."""
    directory = Path(tempfile.mkdtemp(prefix="tmemfs-test-"))
    directory.chmod(0o755)
    place = Place(directory)
    try:
        yield place
    finally:
        place.clean()
        shutil.rmtree(directory, ignore_errors=True)


class Opened:
    """Open files for a test, and close them before the mount is ended: one that is in use would wait."""

    def __init__(self) -> None:
        self._fds: list[int] = []

    def __call__(self, path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> int:
        """Open a file."""
        self._fds.append(os.open(path, flags | os.O_CLOEXEC))
        return self._fds[-1]

    def close(self) -> None:
        """Close everything; errors that a write-back owes are no news here."""
        while self._fds:
            with contextlib.suppress(OSError):
                os.close(self._fds.pop())


@pytest.fixture
def opened(mounted: Mounted) -> Iterator[Opened]:
    """Give a test files that are closed when it ends."""
    made = Opened()
    yield made
    made.close()


@pytest.fixture
def mounted(open_place: Place) -> Iterator[Mounted]:
    """Give a test a place to mount; what it mounted is ended and checked afterwards."""
    made = Mounted(open_place)
    try:
        yield made
        made.end()
    finally:
        made.stop_watchdog()


@pytest.fixture(params=["through", "writeback"])
def writing(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Give the options of both ways of writing."""
    return VARIANTS[request.param]
