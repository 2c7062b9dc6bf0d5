"""Fixtures of the application tests."""

from __future__ import annotations

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
    """Give the options of both ways of writing, with a pool that is too small as well."""
    return ("--pool", "512K", *VARIANTS[request.param])
