"""Counters are reported by name and consistently, and a reset starts them at zero."""

from __future__ import annotations

import json
import random

import pytest

from tmemfs.stats import Latency, Stats, Value, as_prometheus, as_text, percentile


def test_a_percentile_is_exact_to_an_eighth() -> None:
    generator, latency = random.Random(1), Latency()
    values = sorted(int(generator.lognormvariate(11, 2)) for _ in range(20_000))
    for value in values:
        latency.add(value)
    for fraction in (0.01, 0.5, 0.9, 0.99, 0.999):
        exact = values[int(fraction * len(values)) - 1] / 1e9
        found = percentile(latency.buckets, fraction)
        assert found is not None
        assert exact * 0.999 <= found <= exact * 1.126


@pytest.mark.parametrize("value", [0, 1, 7, 8, 9, 15, 16, 17, 1000, 1 << 40, (1 << 60) - 1])
def test_every_value_has_a_bucket_whose_top_is_no_smaller(value: int) -> None:
    latency = Latency()
    latency.add(value)
    found = percentile(latency.buckets, 1.0)
    assert found is not None
    assert value <= round(found * 1e9) <= max(value * 1.13, value + 1) * (1 + 1e-9)


def test_a_clock_that_steps_back_counts_as_zero() -> None:
    latency = Latency()
    latency.add(-5)
    assert percentile(latency.buckets, 0.5) == 0


def test_a_percentile_without_requests_is_none() -> None:
    assert percentile(Latency().buckets, 0.5) is None


class Counting:
    """A part with counters."""

    def __init__(self) -> None:
        self.hits = self.misses = self.level = 0
        self.stats = Stats()
        self.stats.gauges("part_", lambda: {"level": self.level, "name": "one"})
        self.stats.counters("part_", lambda: {"hits": self.hits, "misses": self.misses})
        self.stats.ratio("part_hit_ratio", ("part_hits",), ("part_hits", "part_misses"))


def test_a_reset_starts_counters_and_histograms_at_zero_and_leaves_gauges() -> None:
    part = Counting()
    part.hits, part.misses, part.level = 5, 2, 9
    part.stats.latency("read").add(1000)
    part.stats.reset()
    part.hits += 1
    now = part.stats.snapshot()
    assert (now["part_hits"], now["part_misses"], now["part_level"], now["part_hit_ratio"]) == (1, 0, 9, 1.0)
    assert now["request_read_count"] == 0
    assert now["request_read_p99_seconds"] is None
    part.stats.latency("read").add(1000)
    part.stats.latency("write").add(1000)
    now = part.stats.snapshot()
    assert now["request_read_count"] == now["request_write_count"] == 1


def test_a_ratio_without_requests_is_a_dash() -> None:
    part = Counting()
    assert part.stats.snapshot()["part_hit_ratio"] is None
    assert "part_hit_ratio -\n" in as_text(part.stats.snapshot())


def test_text_has_one_aligned_name_and_value_per_line() -> None:
    text = as_text({"a": 1, "longer_name": 2.5, "word": "x", "none": None})
    assert text == "a           1\nlonger_name 2.500000\nword        x\nnone        -\n"
    assert as_text({}) == ""


def test_prometheus_output_has_types_and_numbers_only() -> None:
    values: dict[str, Value] = {
        "cache_hits": 3,
        "cache_capacity_bytes": 4096,
        "cache_hit_ratio": None,
        "lender": "none",
    }
    assert as_prometheus(values, {"cache_hits"}) == (
        "# TYPE tmemfs_cache_hits counter\ntmemfs_cache_hits 3\n"
        "# TYPE tmemfs_cache_capacity_bytes gauge\ntmemfs_cache_capacity_bytes 4096\n"
    )


def test_a_snapshot_can_be_written_as_json() -> None:
    part = Counting()
    part.stats.latency("read").add(5)
    assert json.loads(json.dumps(part.stats.snapshot())) == part.stats.snapshot()


def test_counter_names_are_those_of_values_that_only_grow() -> None:
    part = Counting()
    part.stats.latency("read")
    assert part.stats.counter_names() == {"part_hits", "part_misses", "request_read_count"}
