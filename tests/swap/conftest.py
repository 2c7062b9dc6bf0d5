"""Fixtures of the swap tests."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.tools.memcg import VERSIONS
from tests.conftest import Place
from tests.mounted import Mounted
from tests.swap.swapped import SwappedMount
from tmemfs.lifecycle import loopswap

OTHER_SWAP = "other swap is on, and pages would go there"


def other_swap() -> bool:
    """Return whether any swap is on."""
    return len(Path("/proc/swaps").read_text().splitlines()) > 1


@pytest.fixture
def lock() -> Iterator[None]:
    """Hold the lock under which one test of the machine swaps at a time, across processes."""
    control = Path("/dev/loop-control")
    with open(control if os.access(control, os.R_OK) else __file__, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def tried(tmp_path_factory: pytest.TempPathFactory) -> str | None:
    """Try to swap to a plain file; return why that is not possible here, or None."""
    lacking = loopswap.obstacle()
    if lacking is not None:
        return lacking
    if other_swap():
        return OTHER_SWAP
    file = tmp_path_factory.mktemp("swap") / "file"
    file.write_bytes(bytes(1 << 20))
    try:
        loopswap.swap_on(file)
        loopswap.swap_off(file)
    except loopswap.SwapError as error:
        return f"swapping to a file is not possible here: {error}"
    return None


@pytest.fixture
def alone(lock: None, request: pytest.FixtureRequest) -> None:
    """Run as the only test that swaps; skip where swapping is not possible."""
    lacking: str | None = request.getfixturevalue("tried")  # not before the lock is held
    if lacking is None and other_swap():
        lacking = OTHER_SWAP
    if lacking is not None:
        pytest.skip(lacking)


@pytest.fixture
def swapped(place: Place, alone: None) -> Iterator[SwappedMount]:
    """Return a mount to swap to, not started yet."""
    mounted = Mounted(place)
    mounted.patience = 850.0
    made = SwappedMount(place, mounted)
    try:
        yield made
        made.end()
    finally:
        made.clean()
        mounted.stop_watchdog()


@pytest.fixture(params=VERSIONS, ids=lambda version: f"v{version}")
def cgroup_version(request: pytest.FixtureRequest) -> int:
    """Return each version of memory cgroups that the machine has."""
    version: int = request.param
    lacking = VERSIONS[version].lacks()
    if lacking is not None:
        pytest.skip(f"memory cgroup version {version}: {lacking}")
    return version
