"""Short runs of the benchmarks of tmemd: they run and report figures."""

from __future__ import annotations

from bench import lendspeed, scale
from bench.tools.content import MIB


def test_the_speed_of_lending_is_measured_from_guests_of_both_kinds() -> None:
    outcome = lendspeed.measure(8 * MIB, guests=4, rounds=1)
    for kind in ("answering", "silent"):
        (first,), (rate,) = outcome.figures[kind]["first_seconds"], outcome.figures[kind]["bytes_a_second"]
        assert first > 0
        assert rate > 0
    assert [goal.goal for goal in outcome.goals] == ["≤ 50 ms", "≥ 200 MB/s"] * 2


def test_what_tmemd_costs_is_measured_for_guests_and_arenas() -> None:
    outcome = scale.measure(slabs=300, quiet=0.5, guests=(1, 3), arenas=(64 * MIB, 16384 * MIB))
    assert [found["guests"] for found in outcome.figures["by_guests"]] == [1, 3]
    assert [found["arena_bytes"] for found in outcome.figures["by_arena"]] == [64 * MIB, 16384 * MIB]
    assert all(share >= 0 for share in outcome.figures["quiet_shares_of_a_core"])
