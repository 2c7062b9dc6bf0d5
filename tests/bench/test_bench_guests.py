"""Small seeded runs of claim and peers. Asserted is the shape of their results."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bench import claim, peers
from bench.subjects import guests
from bench.tools.content import MIB


def test_surplus_returns_at_the_balloons_rate_and_is_shared_by_need() -> None:
    slow, quick = guests.BALLOONS["b balloon"], guests.BALLOONS["b quick balloon"]
    assert guests.rebalanced([80, 80], [80, 80], 160, slow) == [80, 80]
    assert guests.rebalanced([80, 80], [0, 200], 160, slow) == [70, 90]
    assert guests.rebalanced([80, 40, 40], [0, 80, 60], 160, slow) == [70, 46, 43]
    assert guests.rebalanced([80, 80], [0, 85], 160, slow) == [70, 85], "nobody gets more than it lacks"
    assert guests.rebalanced([80, 80], [20, 200], 160, quick) == [20, 140], "all of it, at the next look"


def test_a_guest_that_idles_needs_the_least_and_a_busy_one_what_it_missed() -> None:
    before = {"cache_misses": 10.0, "demand_pages": 20.0, "cache_resident_bytes": 0.0}
    idle = {"cache_misses": 20.0, "demand_pages": 40.0, "cache_resident_bytes": 9e6}
    busy = {"cache_misses": 510.0, "demand_pages": 520.0, "cache_resident_bytes": 9e6}
    assert guests.need(before, idle, MIB) == MIB
    assert guests.need(before, busy, MIB) == 9e6 + 500 * 4096
    assert guests.need(before, busy | {"cache_resident_bytes": 0.0}, 4 * MIB) == 4 * MIB, "nobody gets less"


def test_every_arm_has_the_same_memory() -> None:
    shape = guests.Shape(2 * MIB, 24 * MIB)
    assert shape.total(6) == 36 * MIB == 6 * (2 * MIB + 24 * MIB // 6)


@pytest.mark.mount
def test_the_claim_reports_every_arm(tmp_path: Path) -> None:
    if shutil.which("fio") is None:
        pytest.skip("fio is missing")
    arms = ("a static", "d policy", "f limit")
    settings = {"requests": 60, "steps": 2, "only": ["zipf"], "backings": ("0.5 ms",), "count": 2, "arms": arms}
    figures = claim.measure(cache=MIB, **settings).figures  # type: ignore[arg-type]
    (found_arms,) = figures["loads"].values()
    assert tuple(found_arms) == arms
    for arm, found in found_arms.items():
        assert found["backing_pages"] > 0
        assert found["seconds"] == pytest.approx(sum(found["step_seconds"]))
        assert 0 < found["p50_seconds"] <= found["p99_seconds"]
        assert ("most_held_share" in found) == (arm != "f limit")
    claim.picture(figures, tmp_path / "claim.png")
    assert (tmp_path / "claim.png").stat().st_size > 1000


def test_traces_that_are_not_six_are_skipped_with_a_reason(tmp_path: Path) -> None:
    for directory in (None, tmp_path):
        figures = claim.measure(directory=directory, only=["traces"]).figures
        assert figures["loads"] == {}
        assert "skipped" in figures["notes"][0]


@pytest.mark.mount
def test_the_peers_are_measured_cold_and_warm_or_say_why_not() -> None:
    if shutil.which("fio") is None:
        pytest.skip("fio is missing")
    some = ("plain, throttled", "rclone", "tmemfs")
    found = peers.measure(rounds=2, seconds=0.1, latency="0.2ms", size=MIB, only=some).figures
    missing = set(found["skipped_peers"])
    assert len(found["loads"]) == 2 * len(peers.LOADS)
    for rates in found["loads"].values():
        assert set(rates) | missing == {"plain, throttled", "rclone", "tmemfs"}
        assert all(len(some) == 2 and min(some) > 0 for some in rates.values())
