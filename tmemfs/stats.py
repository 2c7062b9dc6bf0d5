"""The registry of counters, and their text formats.

Each part of the guest counts in plain integers and registers a function that reads them. So counting costs one
addition, and a reset changes no part: it saves the current values, which are subtracted from later ones.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

Value = int | float | str | None
_SUB_BITS = 3  # 8 buckets for each power of two: a percentile is exact to 12.5 %
_BUCKETS = 64 << _SUB_BITS


class Latency:
    """A histogram of nanoseconds with logarithmic buckets, as in HdrHistogram (Tene)."""

    __slots__ = ("buckets",)

    def __init__(self) -> None:
        self.buckets = array("Q", bytes(8 * _BUCKETS))

    def add(self, nanoseconds: int) -> None:
        """Count one request."""
        bits = nanoseconds.bit_length()
        if bits > _SUB_BITS:
            self.buckets[(bits << _SUB_BITS) + ((nanoseconds >> (bits - 1 - _SUB_BITS)) & 7)] += 1
        else:
            self.buckets[nanoseconds if nanoseconds > 0 else 0] += 1


def _bucket_top(bucket: int) -> int:
    """Return the largest value of a bucket in nanoseconds."""
    bits, sub = bucket >> _SUB_BITS, bucket & 7
    if bits <= _SUB_BITS:
        return bucket
    return ((8 + sub + 1) << (bits - 1 - _SUB_BITS)) - 1


def percentile(buckets: array[int], fraction: float) -> float | None:
    """Return a percentile of the latencies in seconds (0.5: the median); None without requests."""
    total = sum(buckets)
    if not total:
        return None
    wanted, seen = fraction * total, 0
    for bucket, count in enumerate(buckets):
        seen += count
        if count and seen >= wanted:
            return _bucket_top(bucket) / 1e9
    return None


@dataclass(frozen=True, slots=True)
class Ratio:
    """The ratio of two sums of counters since the last reset."""

    part: tuple[str, ...]
    whole: tuple[str, ...]


class Stats:
    """All counters of one guest by name, in the order of registration."""

    def __init__(self) -> None:
        self._sources: list[tuple[str, Callable[[], Mapping[str, Value]], bool]] = []
        self._ratios: dict[str, Ratio] = {}
        self._base: dict[str, float] = {}
        self._latencies: dict[str, Latency] = {}
        self._latency_base: dict[str, array[int]] = {}

    def gauges(self, prefix: str, read: Callable[[], Mapping[str, Value]]) -> None:
        """Register values that describe a state; a reset does not change them."""
        self._sources.append((prefix, read, False))

    def counters(self, prefix: str, read: Callable[[], Mapping[str, int | float]]) -> None:
        """Register values that only grow; a reset sets them to zero."""
        self._sources.append((prefix, read, True))

    def ratio(self, name: str, part: tuple[str, ...], whole: tuple[str, ...]) -> None:
        """Register a ratio of counters, computed at each read."""
        self._ratios[name] = Ratio(part, whole)

    def latency(self, operation: str) -> Latency:
        """Return the histogram of an operation. The first call creates it."""
        latency = self._latencies.get(operation)
        if latency is None:
            latency = self._latencies[operation] = Latency()
        return latency

    def _raw_counters(self) -> dict[str, float]:
        return {
            prefix + name: value
            for prefix, read, counts in self._sources
            if counts
            for name, value in read().items()
            if isinstance(value, int | float)
        }

    def reset(self) -> None:
        """Set all counters and histograms to zero."""
        self._base = self._raw_counters()
        self._latency_base = {name: latency.buckets[:] for name, latency in self._latencies.items()}

    def counter_names(self) -> frozenset[str]:
        """Return the names of the values that only grow."""
        return frozenset(self._raw_counters()) | {f"request_{name}_count" for name in self._latencies}

    def snapshot(self) -> dict[str, Value]:
        """Return the current values."""
        values: dict[str, Value] = {}
        for prefix, read, counts in self._sources:
            for name, value in read().items():
                full = prefix + name
                if counts and isinstance(value, int | float):
                    value = value - self._base.get(full, 0)
                values[full] = value
        for name, ratio in self._ratios.items():
            values[name] = self._quotient(values, ratio)
        for operation, latency in sorted(self._latencies.items()):
            values.update(self._latency_values(operation, latency))
        return values

    @staticmethod
    def _quotient(values: Mapping[str, Value], ratio: Ratio) -> float | None:
        part = sum(float(values.get(name) or 0) for name in ratio.part)
        whole = sum(float(values.get(name) or 0) for name in ratio.whole)
        return round(part / whole, 6) if whole else None

    def _latency_values(self, operation: str, latency: Latency) -> dict[str, Value]:
        base = self._latency_base.get(operation)
        buckets = latency.buckets
        if base is not None:
            buckets = array("Q", [now - then for now, then in zip(buckets, base, strict=True)])
        values: dict[str, Value] = {f"request_{operation}_count": sum(buckets)}
        for label, fraction in (("p50", 0.5), ("p99", 0.99), ("p999", 0.999)):
            values[f"request_{operation}_{label}_seconds"] = percentile(buckets, fraction)
        return values


def as_text(values: Mapping[str, Value]) -> str:
    """Return aligned lines `name value`; a missing value is `-`."""
    width = max((len(name) for name in values), default=0)
    return "".join(f"{name:<{width}} {_format(value)}\n" for name, value in values.items())


def _format(value: Value) -> str:
    if value is None:
        return "-"
    return f"{value:.6f}" if isinstance(value, float) else str(value)


def as_prometheus(values: Mapping[str, Value], counters: Collection[str]) -> str:
    """Return the Prometheus text format, version 0.0.4, without texts and missing values."""
    lines = []
    for name, value in values.items():
        if isinstance(value, int | float):
            kind = "counter" if name in counters else "gauge"
            lines.append(f"# TYPE tmemfs_{name} {kind}\ntmemfs_{name} {value}\n")
    return "".join(lines)
