"""What one mount was asked to be: a frozen MountConfig, and the texts it is read from.

Everything a person can get wrong on a command line is refused here, in one line that names the thing and the
remedy. Whatever holds a MountConfig needs to check nothing again.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tmemcommon.sizes import KIB, MIB, ConfigError, check_ram, parse_duration, parse_size, ram_bytes
from tmemfs.cache.balloon import IDLE_SECONDS, BalloonRange
from tmemfs.options import MountOptions, parse_options

__all__ = [
    "MIB",
    "BalloonRange",
    "ConfigError",
    "MountConfig",
    "MountOptions",
    "PoolChoice",
    "Throttle",
    "check_cache_bytes",
    "parse_balloon",
    "parse_duration",
    "parse_options",
    "parse_pool",
    "parse_size",
    "parse_throttle",
]

MIN_CACHE_BYTES = MIB
MIN_POOL_BYTES = 64 * KIB  # one slab
MIN_IDLE_SECONDS = 0.1  # a balloon looks eight times as often
MIN_HSWAP_BYTES = 64 * KIB
MAX_HSWAP_BYTES = 4 << 40
_NAME_BYTES = 255  # NAME_MAX
_SOCKET_BYTES = 107  # of sockaddr_un

_BALLOON_HINT = "write for instance min=16M,max=256M, and idle=10s if you like"
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
    pool_socket: str | None = None  # tmemd's, to borrow from it; pool_bytes is then the most to borrow
    pool_owner: int | None = None  # uid of who runs it, where that is neither root nor this user
    compress: bool = True  # the pool's pages
    hswap_bytes: int = 0  # 0: no swap-like file
    hswap_overflow: Path | None = None  # None: beside the guest's state
    balloon: BalloonRange | None = None  # None: cache_bytes until somebody resizes
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

    @property
    def hswap_file(self) -> Path:
        """Say where the swap-like file is, if there is one."""
        return self.mountpoint / self.control_name / "hswap"

    def __post_init__(self) -> None:
        """Refuse what no mount can be."""
        check_cache_bytes(self.cache_bytes)
        if self.pool_bytes and self.pool_bytes < MIN_POOL_BYTES:
            raise ConfigError(f"pool of {self.pool_bytes} bytes is too small: give --pool at least 64K, or none")
        check_ram("pool", self.pool_bytes)
        if self.pool_socket is not None and not 0 < len(os.fsencode(self.pool_socket)) <= _SOCKET_BYTES:
            raise ConfigError(
                f"pool 'unix:{self.pool_socket}': no socket has such a name: give --pool unix:PATH of at most "
                f"{_SOCKET_BYTES} bytes"
            )
        self._check_hswap()
        if self.balloon is not None:
            check_cache_bytes(self.balloon.minimum, "balloon's min")
            check_cache_bytes(self.balloon.maximum, "balloon's max")
        for name, seconds in (
            ("--attr-timeout", self.attr_timeout),
            ("--negative-timeout", self.negative_timeout),
        ):
            if not (math.isfinite(seconds) and seconds >= 0):
                raise ConfigError(f"{name} {seconds} is not a duration: write 0, 1 or 500ms")
        name = self.control_name
        if not name or name in (".", "..") or "/" in name or "\0" in name or len(os.fsencode(name)) > _NAME_BYTES:
            raise ConfigError(f"control name '{name}' is not a file name: give one without '/', such as .tmemfs")

    def _check_hswap(self) -> None:
        """Refuse a swap-like file that cannot be."""
        if not self.hswap_bytes:
            if self.hswap_overflow is not None:
                raise ConfigError(f"--hswap-overflow '{self.hswap_overflow}' is for --hswap: give --hswap SIZE, too")
            return
        if self.hswap_bytes < MIN_HSWAP_BYTES:
            raise ConfigError(f"hswap of {self.hswap_bytes} bytes is too small: give --hswap at least 64K")
        if self.hswap_bytes > MAX_HSWAP_BYTES:
            raise ConfigError(f"hswap of {self.hswap_bytes} bytes is too large: give --hswap at most 4T")
        if not self.pool_bytes and self.pool_socket is None:
            raise ConfigError("hswap needs a pool: give --pool SIZE, or no --hswap")
        if self.options.read_only:
            raise ConfigError("hswap could not be written on a read-only mount: give no --hswap, or no -o ro")


def check_cache_bytes(size: int, what: str = "cache") -> None:
    """Refuse a size that no cache can have, at the mount as at a resize."""
    if size < MIN_CACHE_BYTES:
        raise ConfigError(f"{what} of {size} bytes is too small: give at least 1M")
    check_ram(what, size)


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


def parse_balloon(text: str) -> BalloonRange:
    """Parse min=16M,max=256M,idle=10s; idle may be left out."""
    sizes: dict[str, int] = {}
    idle = IDLE_SECONDS
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name in ("min", "max") and value:
            sizes[name] = parse_size(value)
        elif name == "idle" and value:
            idle = parse_duration(value)
        else:
            raise ConfigError(f"balloon '{part}' is not understood: {_BALLOON_HINT}")
    if len(sizes) < 2 or sizes["min"] > sizes["max"]:
        raise ConfigError(f"balloon '{text}' needs a min and a max that is not below it: {_BALLOON_HINT}")
    if idle < MIN_IDLE_SECONDS:
        raise ConfigError(f"balloon '{text}': idle is less than 100ms: {_BALLOON_HINT}")
    return BalloonRange(sizes["min"], sizes["max"], idle)


@dataclass(frozen=True, slots=True)
class PoolChoice:
    """Say which pool a mount uses: bytes of its own, none (0), or a lender's socket."""

    pool_bytes: int
    socket: str | None = None


def parse_pool(text: str) -> PoolChoice:
    """Parse the value of --pool: a size, none, or unix:PATH (and then the most to borrow: all RAM)."""
    if text == "none":
        return PoolChoice(0)
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        return PoolChoice(ram_bytes(), os.path.abspath(path) if path else "")
    return PoolChoice(parse_size(text))
