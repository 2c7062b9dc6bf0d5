"""Fixtures of the swap tests."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.memcg import VERSIONS
from tests.conftest import Place
from tests.mounted import Mounted
from tests.swap.swapped import SwappedMount
from tmemfs import swapfile


@pytest.fixture
def alone() -> Iterator[None]:
    """Let only one test at a time swap, whichever processes run them; skip where it is not possible."""
    lacking = swapfile.missing()
    if lacking is not None:
        pytest.skip(lacking)
    with open(__file__, "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if len(Path("/proc/swaps").read_text().splitlines()) > 1:
            pytest.skip("other swap is on, and pages would go there")
        yield


@pytest.fixture
def swapped(place: Place, alone: None) -> Iterator[SwappedMount]:
    """Give a test a place for a mount to swap to."""
    mounted = Mounted(place)
    mounted.patience = 450.0
    made = SwappedMount(place, mounted)
    try:
        yield made
        made.end()
    finally:
        made.clean()
        mounted.stop_watchdog()


@pytest.fixture(params=VERSIONS, ids=lambda version: f"v{version}")
def cgroup_version(request: pytest.FixtureRequest) -> int:
    """Give the version of memory cgroup to use, of those that the machine has."""
    version: int = request.param
    lacking = VERSIONS[version].lacks()
    if lacking is not None:
        pytest.skip(f"memory cgroup version {version}: {lacking}")
    return version
