"""Fixtures of the fault tests."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fs.conftest import writing
from tests.mounted import Mounted
from tests.public_place import mounted, open_place

__all__ = ["Opened", "mounted", "open_place", "opened", "writing"]


class Opened:
    """Open files for a test, and close them before the unmount, which would be busy otherwise."""

    def __init__(self) -> None:
        self._fds: list[int] = []

    def __call__(self, path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> int:
        """Open a file."""
        self._fds.append(os.open(path, flags | os.O_CLOEXEC))
        return self._fds[-1]

    def close(self) -> None:
        """Close everything; ignore errors of earlier write-backs."""
        while self._fds:
            with contextlib.suppress(OSError):
                os.close(self._fds.pop())


@pytest.fixture
def opened(mounted: Mounted) -> Iterator[Opened]:
    """Yield an opener whose files are closed at teardown."""
    made = Opened()
    yield made
    made.close()
