"""Fixtures for mounts that other users can reach; conftest files import them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Place
from tests.mounted import Mounted, mounting


@pytest.fixture
def open_place() -> Iterator[Place]:
    """Yield a place that other users can reach, unlike pytest's directories."""
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
    """Yield a mount to start; it is ended and checked at teardown."""
    with mounting(open_place) as made:
        yield made
