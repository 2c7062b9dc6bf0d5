"""`tmemfs top`: read the counters of all mounts of this machine, and compare them with those of the last time.

Mounts are sampled through their control sockets, all at once and in bounded time: one that hangs delays no other. Any
user may mount a filesystem that calls itself tmemfs, so counters are untrusted input. They are validated, and invalid
ones become the trouble of their mount alone.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from msgspec import DecodeError, Meta, Struct, json

from tmem.arena import PAGE_SIZE
from tmemcommon.mountinfo import MountEntry
from tmemcommon.sizes import ConfigError
from tmemfs.kernel.mounttable import is_tmemfs, mount_table
from tmemfs.lifecycle.controlclient import RemoteError, ask

ANSWER_SECONDS = 1.0

_Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]


class Counters(Struct, frozen=True):
    """The values of stats.json that `tmemfs top` uses."""

    demand_hits: _Count
    demand_pages: _Count
    cache_resident_bytes: _Count
    cache_capacity_bytes: _Count
    pool_lent_bytes: _Count
    pool_original_bytes: _Count
    backing_read_bytes: _Count
    backing_write_bytes: _Count
    backing_errors: _Count
    hswap_size_bytes: _Count
    hswap_pool_pages: _Count
    hswap_overflow_pages: _Count
    hswap_lost_pages: _Count
    lender: Annotated[str, Meta(pattern="^(connected|disconnected|evicted)$")] | None = None


_decoder = json.Decoder(Counters)


@dataclass(frozen=True, slots=True)
class Sample:
    """The counters of one mount at a time, or the reason why they are missing."""

    at: float
    counters: Counters | None = None
    trouble: str = ""


def sample_of(at: float, content: bytes) -> Sample:
    """Validate the content of a mount's stats.json."""
    try:
        return Sample(at, _decoder.decode(content))
    except RecursionError:
        reason = "nested too deep"
    except (DecodeError, UnicodeDecodeError) as error:
        reason = str(error)
    return Sample(at, trouble=f"its counters cannot be read: {reason}; check that it is tmemfs of this version")


@dataclass(frozen=True, slots=True)
class Line:
    """The state of one mount, and its rates between two samples; `tmemfs top --json` prints these fields."""

    mountpoint: str
    source: str
    trouble: str  # why the rest is unknown; else empty
    lender: str | None  # state of the connection to tmemd; None for a pool of the mount's own
    cache_bytes: int = 0
    cache_capacity_bytes: int = 0
    pool_bytes: int = 0  # memory in use
    pool_original_bytes: int = 0  # its pages before compression
    swap_bytes: int = 0  # pages of the swap-like file, in the pool and in the overflow file
    swap_capacity_bytes: int = 0
    swap_lost_pages: int = 0  # pages that read as errors
    hit_ratio: float | None = None  # since the last sample; since the mount if there is only one
    seconds: float | None = None  # between the two samples
    asked_bytes_per_second: float | None = None
    backing_read_bytes_per_second: float | None = None
    backing_write_bytes_per_second: float | None = None
    backing_errors_per_second: float | None = None

    def troubles(self) -> list[str]:
        """Return what an operator should look into, each in one short line."""
        found = [self.trouble] if self.trouble else []
        if self.lender == "disconnected":
            found.append("tmemd does not answer: the pool borrows nothing more")
        if self.lender == "evicted":
            found.append("tmemd evicted it: it has no pool until it is mounted again")
        if self.backing_errors_per_second:
            found.append(f"{self.backing_errors_per_second:.3g} errors a second from '{self.source}'")
        if self.swap_lost_pages:
            found.append(f"{self.swap_lost_pages} pages of its swap file are lost: they read as errors")
        return found


def _sum(counters: Counters, names: Iterable[str]) -> int:
    return sum(int(getattr(counters, name)) for name in names)


def line_of(entry: MountEntry, before: Sample | None, now: Sample) -> Line:
    """Compare two samples of a mount."""
    counters = now.counters
    mountpoint, source = str(entry.mountpoint), entry.fsname
    if counters is None:
        return Line(mountpoint, source, now.trouble, None)
    old = before.counters if before is not None else None
    seconds = now.at - before.at if before is not None and old is not None and now.at > before.at else None

    def increase_of(*names: str) -> int:
        # Negative after a reset: then all of the total was counted since.
        total = _sum(counters, names)
        increase = total - (_sum(old, names) if old is not None else 0)
        return increase if increase >= 0 else total

    def rate(*names: str, unit: int = 1) -> float | None:
        return increase_of(*names) * unit / seconds if seconds is not None else None

    hits, asked = increase_of("demand_hits"), increase_of("demand_pages")
    return Line(
        mountpoint,
        source,
        "",
        counters.lender,
        cache_bytes=counters.cache_resident_bytes,
        cache_capacity_bytes=counters.cache_capacity_bytes,
        pool_bytes=counters.pool_lent_bytes,
        pool_original_bytes=counters.pool_original_bytes,
        swap_bytes=(counters.hswap_pool_pages + counters.hswap_overflow_pages) * PAGE_SIZE,
        swap_capacity_bytes=counters.hswap_size_bytes,
        swap_lost_pages=counters.hswap_lost_pages,
        hit_ratio=min(1.0, hits / asked) if asked else None,
        seconds=seconds,
        asked_bytes_per_second=rate("demand_pages", unit=PAGE_SIZE),
        backing_read_bytes_per_second=rate("backing_read_bytes"),
        backing_write_bytes_per_second=rate("backing_write_bytes"),
        backing_errors_per_second=rate("backing_errors"),
    )


def mounts(only: Collection[Path] = ()) -> list[MountEntry]:
    """Return the tmemfs mounts that we see, the uppermost at each mountpoint; `only` restricts the mountpoints."""
    uppermost = {entry.mountpoint: entry for entry in mount_table()}
    found = (entry for entry in uppermost.values() if is_tmemfs(entry) and (not only or entry.mountpoint in only))
    return sorted(found, key=lambda entry: entry.mountpoint)


class Watcher:
    """Samples mounts repeatedly and compares each sample with the one before."""

    def __init__(self, only: Collection[Path] = ()) -> None:
        """Watch all mounts, or `only` some. Raises ConfigError when one of these is no tmemfs mount."""
        for missing in set(only) - {entry.mountpoint for entry in mounts(only)}:
            raise ConfigError(f"'{missing}' is not a tmemfs mount: tmemfs top without a path shows all")
        self._only = only
        self._before: dict[str, Sample] = {}

    def sample(self, seconds: float = ANSWER_SECONDS) -> list[Line]:
        """Sample all mounts at once, for at most `seconds`, and compare with the last samples."""
        found = mounts(self._only)
        with ThreadPoolExecutor(len(found) or 1) as threads:
            samples = list(threads.map(lambda entry: _sample(entry, seconds), found))
        lines = [line_of(entry, self._before.get(entry.device), now) for entry, now in zip(found, samples, strict=True)]
        self._before = {entry.device: now for entry, now in zip(found, samples, strict=True)}
        return lines


def _sample(entry: MountEntry, seconds: float) -> Sample:
    """Read the counters of one mount."""
    try:
        content = ask(entry, "stats.json", seconds=seconds)
    except (RemoteError, ConfigError) as error:
        return Sample(time.monotonic(), trouble=str(error).removeprefix(f"'{entry.mountpoint}' "))
    return sample_of(time.monotonic(), content)
