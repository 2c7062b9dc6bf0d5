"""The balloon follows demand in steps with hysteresis; an idle guest reads its pages from the pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import Place, wait_until
from tests.fs.conftest import mounted  # noqa: F401 (a fixture)
from tests.mounted import Mounted
from tests.pagebytes import pages_of
from tmem.arena import PAGE_SIZE
from tmemcommon.sizes import ConfigError
from tmemfs.balloon import Balloon, Signals
from tmemfs.config import BalloonRange, MountConfig, parse_balloon

MIB = 1 << 20
ALLOWED = BalloonRange(16 * MIB, 256 * MIB, idle=8.0)


class Driven:
    """A balloon, and a guest given by its rates in pages a second."""

    def __init__(self, capacity: int) -> None:
        self.balloon = Balloon(ALLOWED)
        self.capacity = capacity
        self.now = self.asked = self.returns = 0.0

    def pass_time(self, seconds: float, *, asked: float = 0.0, returns: float = 0.0, full: bool = True) -> int:
        """Advance the clock at these rates; return how often the size changed."""
        changes = 0
        for _ in range(round(seconds / ALLOWED.tick)):
            self.now += ALLOWED.tick
            self.asked += asked * ALLOWED.tick
            self.returns += returns * ALLOWED.tick
            signals = Signals(int(self.asked), int(self.returns), full)
            wanted = self.balloon.decide(self.now, signals, self.capacity)
            self.balloon.check()
            changes += wanted != self.capacity
            self.capacity = wanted
        return changes


def test_an_idle_guest_halves_down_to_its_minimum() -> None:
    guest = Driven(256 * MIB)
    assert guest.pass_time(8.0) == 0, "a pause is not idleness yet"
    sizes = {guest.capacity}
    for _ in range(60):
        guest.pass_time(1.0)
        sizes.add(guest.capacity // MIB)
    assert {128, 64, 32, 16} <= sizes
    assert guest.capacity == 16 * MIB
    assert (guest.balloon.grows, guest.balloon.shrinks) == (0, 4)


def test_misses_on_pages_cached_before_grow_a_cache_to_its_maximum() -> None:
    guest = Driven(16 * MIB)
    guest.pass_time(20.0)
    guest.pass_time(4.0, asked=30_000, returns=25_000)
    assert guest.capacity == 256 * MIB


def test_first_reads_do_not_grow_a_cache() -> None:
    guest = Driven(16 * MIB)
    assert guest.pass_time(60.0, asked=30_000) == 0


def test_a_cache_with_room_left_does_not_grow() -> None:
    guest = Driven(16 * MIB)
    assert guest.pass_time(60.0, asked=30_000, returns=25_000, full=False) == 0


def test_a_guest_that_hits_keeps_its_size() -> None:
    guest = Driven(64 * MIB)
    assert guest.pass_time(120.0, asked=5_000, returns=5) == 0


@given(rate=st.floats(0, 20_000), start=st.sampled_from([16, 32, 64, 128, 256]))
def test_the_size_does_not_oscillate_at_a_steady_rate(rate: float, start: int) -> None:
    guest = Driven(start * MIB)
    guest.pass_time(100.0, asked=rate, returns=rate)
    assert guest.pass_time(300.0, asked=rate, returns=rate) == 0
    assert not (guest.balloon.grows and guest.balloon.shrinks)


def test_a_size_outside_the_range_is_moved_into_it() -> None:
    guest = Driven(512 * MIB)
    guest.pass_time(1.0, asked=100_000)
    assert guest.capacity == 256 * MIB


def test_a_balloon_option_is_parsed() -> None:
    assert parse_balloon("min=16M,max=256M") == BalloonRange(16 * MIB, 256 * MIB)
    assert parse_balloon("max=2M, min=1M,idle=500ms") == BalloonRange(MIB, 2 * MIB, 0.5)


@pytest.mark.parametrize("text", ["", "min=16M", "min=2M,max=1M", "min=1M,max=2M,idle=0", "min=1M,max=x", "high=1M"])
def test_an_invalid_balloon_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_balloon(text)
    assert "\n" not in str(caught.value)


def test_an_impossible_minimum_is_refused() -> None:
    with pytest.raises(ConfigError, match="min of 4096 bytes is too small: give at least 1M"):
        MountConfig(Path("/"), Path("/mnt"), balloon=BalloonRange(4096, MIB))


@pytest.mark.mount
def test_a_guest_that_was_idle_reads_from_the_pool_not_the_backing(mounted: Mounted) -> None:  # noqa: F811
    data = pages_of(1, 6 * 256)
    (mounted.source / "f").write_bytes(data)
    root = mounted.start("--cache", "8M", "--pool", "32M", "--balloon", "min=1M,max=8M,idle=400ms")
    counted: list[dict[str, Any]] = []

    def busy() -> bool:
        """Read everything; return whether the cache is at its maximum and holds every page."""
        with open(root / "f", "rb", buffering=0) as file:
            for offset in range(0, len(data), 65536):
                assert file.read(65536) == data[offset : offset + 65536]
        counted.append(mounted.stats())
        held = counted[-1]["cache_resident_bytes"] + counted[-1]["pool_pages"] * PAGE_SIZE
        return bool(counted[-1]["cache_capacity_bytes"] == 8 * MIB and held == len(data))

    # A busy machine may find the guest idle before and while it is read for the first time.
    wait_until(busy, "the guest holds everything")
    before = counted[-1]
    wait_until(lambda: mounted.stats()["cache_capacity_bytes"] == MIB, "the idle guest is at its minimum")
    wait_until(busy, "the busy guest is at its maximum")
    after = counted[-1]
    for name in ("backing_pages", "precache_dropped"):
        assert after[name] == before[name], name
    for name in ("balloon_shrinks", "balloon_grows"):
        assert after[name] >= before[name] + 3, name


@pytest.mark.mount
def test_a_bad_balloon_is_one_line_and_nothing_is_mounted(place: Place) -> None:
    done = place.mount("--balloon", "min=2G,max=1G")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--balloon" in done.stderr
    assert not place.is_mounted()
