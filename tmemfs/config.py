"""What one mount was asked to be: a frozen MountConfig, and the texts it is read from.

Everything a person can get wrong on a command line is refused here, in one line that names the thing and the
remedy. Whatever holds a MountConfig needs to check nothing again.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tmemfs.options import ConfigError, MountOptions, parse_options

__all__ = [
    "ConfigError",
    "MountConfig",
    "MountOptions",
    "PoolChoice",
    "Throttle",
    "parse_duration",
    "parse_options",
    "parse_pool",
    "parse_size",
    "parse_throttle",
]

KIB = 1 << 10
MIB = 1 << 20
MIN_CACHE_BYTES = MIB
MIN_POOL_BYTES = 64 * KIB  # one slab
_NAME_BYTES = 255  # NAME_MAX

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B?|B|%)?", re.IGNORECASE | re.ASCII)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(us|µs|ms|s|m)?", re.ASCII)
_SIZE_UNITS = {"": 1, "B": 1, "K": KIB, "M": MIB, "G": 1 << 30, "T": 1 << 40}
_DURATION_UNITS = {"": 1.0, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}
_SIZE_HINT = "write a size such as 64M, 1G, 4096 or 10% (of RAM)"
_THROTTLE_HINT = "write for instance latency=5ms,bandwidth=100M,depth=8"

BackingCache = Literal["drop", "keep"]
VersionBy = Literal["all", "size,mtime"]


@dataclass(frozen=True, slots=True)
class Throttle:
    """Describe a slow device for experiments."""

    latency: float = 0.0  # seconds a request
    bandwidth: int = 0  # bytes a second over all requests; 0: unlimited
    depth: int = 32  # requests at once


@dataclass(frozen=True, slots=True)
class MountConfig:
    """Hold what one mount was asked to be. `source` and `mountpoint` are absolute."""

    source: Path
    mountpoint: Path
    cache_bytes: int = 64 * MIB
    pool_bytes: int = 256 * MIB  # 0: no pool
    pool_socket: str | None = None
    writeback: bool = False
    watch: bool = False
    throttle: Throttle | None = None
    attr_timeout: float = 1.0
    negative_timeout: float = 0.0
    backing_cache: BackingCache = "drop"
    version_by: VersionBy = "all"
    control_name: str = ".tmemfs"
    options: MountOptions = field(default_factory=MountOptions)
    foreground: bool = False
    log_file: Path | None = None
    debug: bool = False

    def __post_init__(self) -> None:
        """Refuse what no mount can be."""
        if self.cache_bytes < MIN_CACHE_BYTES:
            raise ConfigError(f"cache of {self.cache_bytes} bytes is too small: give --cache at least 1M")
        if self.pool_bytes and self.pool_bytes < MIN_POOL_BYTES:
            raise ConfigError(f"pool of {self.pool_bytes} bytes is too small: give --pool at least 64K, or none")
        if self.pool_socket is not None:
            raise ConfigError(
                f"pool 'unix:{self.pool_socket}': borrowing from tmemd is not available: give --pool SIZE"
            )
        for name, seconds in (
            ("--attr-timeout", self.attr_timeout),
            ("--negative-timeout", self.negative_timeout),
        ):
            if not (math.isfinite(seconds) and seconds >= 0):
                raise ConfigError(f"{name} {seconds} is not a duration: write 0, 1 or 500ms")
        name = self.control_name
        if not name or name in (".", "..") or "/" in name or "\0" in name or len(os.fsencode(name)) > _NAME_BYTES:
            raise ConfigError(f"control name '{name}' is not a file name: give one without '/', such as .tmemfs")


def parse_size(text: str) -> int:
    """Parse a number of bytes: 4096, 64K, 64MiB, 1.5G, or a percentage of this machine's RAM.

    Units are powers of 1024. Raises ConfigError for anything else, and for a size of zero.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"size '{text}' is not understood: {_SIZE_HINT}")
    number, unit = float(match[1]), (match[2] or "").upper()
    if unit == "%":
        if number > 100:
            raise ConfigError(f"size '{text}' is more than all RAM: {_SIZE_HINT}")
        size = int(_ram_bytes() * number / 100)
    else:
        size = int(number * _SIZE_UNITS[unit[:1]])
    if size <= 0:
        raise ConfigError(f"size '{text}' is zero: {_SIZE_HINT}")
    if size >= 1 << 63:
        raise ConfigError(f"size '{text}' is too large: {_SIZE_HINT}")
    return size


def parse_duration(text: str) -> float:
    """Parse a time in seconds: 0.5, 5ms, 100us, 2s, 1m."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"duration '{text}' is not understood: write for instance 5ms, 0.5 or 2s")
    return float(match[1]) * _DURATION_UNITS[match[2] or ""]


def parse_throttle(text: str) -> Throttle:
    """Parse latency=5ms,bandwidth=100M,depth=8; each part may be left out."""
    latency, bandwidth, depth = 0.0, 0, Throttle().depth
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name == "latency" and value:
            latency = parse_duration(value)
        elif name == "bandwidth" and value:
            bandwidth = parse_size(value)
        elif name == "depth" and value.isdecimal() and 0 < int(value) <= 65536:
            depth = int(value)
        else:
            raise ConfigError(f"throttle '{part}' is not understood: {_THROTTLE_HINT}")
    return Throttle(latency, bandwidth, depth)


@dataclass(frozen=True, slots=True)
class PoolChoice:
    """Say which pool a mount uses: bytes of its own, none (0), or a lender's socket."""

    pool_bytes: int
    socket: str | None = None


def parse_pool(text: str) -> PoolChoice:
    """Parse the value of --pool: a size, none, or unix:PATH."""
    if text == "none":
        return PoolChoice(0)
    if text.startswith("unix:"):
        return PoolChoice(0, text.removeprefix("unix:"))
    return PoolChoice(parse_size(text))


def _ram_bytes() -> int:
    """Measure this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
