"""What mounts tell of themselves, checked, and what they did between two looks.

Anybody may mount a filesystem that calls itself tmemfs, so what one tells may be anything: it is taken whole and in its
bounds, or it is the trouble of that mount alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from msgspec import DecodeError, Meta, Struct, json

from tmem.arena import PAGE_SIZE
from tmemcommon.mountinfo import MountEntry

_Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]


class Told(Struct, frozen=True):
    """The values of stats.json that are looked at."""

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


_decoder = json.Decoder(Told)


@dataclass(frozen=True, slots=True)
class Sample:
    """What one mount told, and when; `trouble` instead when it did not."""

    at: float
    told: Told | None = None
    trouble: str = ""


def sample_of(at: float, content: bytes) -> Sample:
    """Check what a mount told, which is the content of its stats.json."""
    try:
        return Sample(at, _decoder.decode(content))
    except RecursionError:
        reason = "it is nested too deep"
    except (DecodeError, UnicodeDecodeError) as error:
        reason = str(error)
    return Sample(at, trouble=f"its counters cannot be read: {reason}; is it tmemfs of this version?")


@dataclass(frozen=True, slots=True)
class Line:
    """One mount: its state, and what it did between two samples (since it was mounted, when there is only one)."""

    mountpoint: str
    source: str
    trouble: str  # why nothing is known of it
    lender: str | None  # connected, disconnected, evicted, or None with a pool of its own
    cache_bytes: int = 0
    cache_capacity_bytes: int = 0
    pool_bytes: int = 0  # memory
    pool_original_bytes: int = 0  # size of the pages in it
    swap_bytes: int = 0  # pages of the swap-like file, wherever they are
    swap_capacity_bytes: int = 0
    swap_lost_pages: int = 0  # that read as errors
    hit_ratio: float | None = None
    seconds: float | None = None  # between the two samples
    asked_bytes_per_second: float | None = None
    backing_read_bytes_per_second: float | None = None
    backing_write_bytes_per_second: float | None = None
    backing_errors_per_second: float | None = None

    def troubles(self) -> list[str]:
        """Say what somebody should look into, each in a few words."""
        found = [self.trouble] if self.trouble else []
        if self.lender == "disconnected":
            found.append("tmemd does not answer: the pool borrows nothing more")
        if self.lender == "evicted":
            found.append("it was evicted from tmemd: it has no pool until it is mounted anew")
        if self.backing_errors_per_second:
            found.append(f"{self.backing_errors_per_second:.3g} errors a second from '{self.source}'")
        if self.swap_lost_pages:
            found.append(f"{self.swap_lost_pages} pages of its swap file are lost: they read as errors")
        return found


def _sum(told: Told, names: Iterable[str]) -> int:
    return sum(int(getattr(told, name)) for name in names)


def line_of(entry: MountEntry, before: Sample | None, now: Sample) -> Line:
    """Compare two samples of a mount."""
    told = now.told
    mountpoint, source = str(entry.mountpoint), entry.fsname
    if told is None:
        return Line(mountpoint, source, now.trouble, None)
    old = before.told if before is not None else None
    seconds = now.at - before.at if before is not None and old is not None and now.at > before.at else None

    def grown(*names: str) -> int:
        # A reset in between makes it negative: then what there is was counted since.
        total = _sum(told, names)
        rise = total - (_sum(old, names) if old is not None else 0)
        return rise if rise >= 0 else total

    def rate(*names: str, unit: int = 1) -> float | None:
        return grown(*names) * unit / seconds if seconds is not None else None

    hits, asked = grown("demand_hits"), grown("demand_pages")
    return Line(
        mountpoint,
        source,
        "",
        told.lender,
        cache_bytes=told.cache_resident_bytes,
        cache_capacity_bytes=told.cache_capacity_bytes,
        pool_bytes=told.pool_lent_bytes,
        pool_original_bytes=told.pool_original_bytes,
        swap_bytes=(told.hswap_pool_pages + told.hswap_overflow_pages) * PAGE_SIZE,
        swap_capacity_bytes=told.hswap_size_bytes,
        swap_lost_pages=told.hswap_lost_pages,
        hit_ratio=min(1.0, hits / asked) if asked else None,
        seconds=seconds,
        asked_bytes_per_second=rate("demand_pages", unit=PAGE_SIZE),
        backing_read_bytes_per_second=rate("backing_read_bytes"),
        backing_write_bytes_per_second=rate("backing_write_bytes"),
        backing_errors_per_second=rate("backing_errors"),
    )
