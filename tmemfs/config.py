"""The configuration of one mount: a frozen MountConfig, and the parsers of its options.

All command-line errors are detected here; the message is one line that names the option and the remedy. A MountConfig
is always valid, so no other module checks it again.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tmemcommon.sizes import KIB, MIB, ConfigError, check_ram, parse_duration, parse_size, ram_bytes
from tmemfs.options import MountOptions

MIN_CACHE_BYTES = MIB
MIN_POOL_BYTES = 64 * KIB  # one slab
IDLE_SECONDS = 10.0
IDLE_TICKS = 8  # decisions of the balloon in one idle window
MIN_IDLE_SECONDS = 0.1  # of a balloon; its tick is an eighth of that
MIN_HSWAP_BYTES = 64 * KIB
MAX_HSWAP_BYTES = 4 << 40
_NAME_BYTES = 255  # NAME_MAX
_SOCKET_PATH_BYTES = 107  # of sockaddr_un

_BALLOON_HINT = "write for instance min=16M,max=256M or min=16M,max=256M,idle=10s"
_THROTTLE_HINT = "write for instance latency=5ms,bandwidth=100M,depth=8"

BackingCache = Literal["drop", "keep"]
VersionBy = Literal["all", "size,mtime"]


@dataclass(frozen=True, slots=True)
class Throttle:
    """The slow device that SOURCE imitates (`--throttle`)."""

    latency: float = 0.0  # seconds for each request
    bandwidth: int = 0  # bytes per second for all requests together; 0: unlimited
    depth: int = 32  # requests at once


@dataclass(frozen=True, slots=True)
class BalloonRange:
    """The smallest and largest cache size in bytes, and the seconds without use after which the cache shrinks."""

    minimum: int
    maximum: int
    idle: float = IDLE_SECONDS

    @property
    def tick(self) -> float:
        """Seconds between two decisions."""
        return self.idle / IDLE_TICKS

    def clamp(self, capacity: int) -> int:
        """Return the nearest allowed size."""
        return max(self.minimum, min(capacity, self.maximum))


@dataclass(frozen=True, slots=True)
class MountConfig:
    """The options of one mount, validated. `source` and `mountpoint` are absolute."""

    source: Path
    mountpoint: Path
    cache_bytes: int = 64 * MIB
    pool_bytes: int = 256 * MIB  # 0: no pool
    pool_socket: str | None = None  # socket of a tmemd to borrow from; pool_bytes is then the most to borrow
    pool_owner: int | None = None  # uid of that tmemd, if neither root nor this user
    compress: bool = True  # pages in the pool
    hswap_bytes: int = 0  # 0: no swap-like file
    hswap_overflow: Path | None = None  # None: in the state directory
    balloon: BalloonRange | None = None  # None: the cache keeps its size until a resize
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
        """The path of the swap-like file, whether the mount has one or not."""
        return self.mountpoint / self.control_name / "hswap"

    def __post_init__(self) -> None:
        """Raise ConfigError for a configuration that cannot work."""
        check_cache_bytes(self.cache_bytes)
        if self.pool_bytes and self.pool_bytes < MIN_POOL_BYTES:
            raise ConfigError(f"pool of {self.pool_bytes} bytes is too small: give --pool at least 64K, or none")
        check_ram("pool", self.pool_bytes)
        if self.pool_socket is not None and not 0 < len(os.fsencode(self.pool_socket)) <= _SOCKET_PATH_BYTES:
            raise ConfigError(
                f"pool 'unix:{self.pool_socket}' is not the path of a socket: give --pool unix:PATH with a PATH of "
                f"at most {_SOCKET_PATH_BYTES} bytes"
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
            raise ConfigError(f"control name '{name}' is not a file name: give one without '/', for instance .tmemfs")

    def _check_hswap(self) -> None:
        """Raise ConfigError for a swap-like file that cannot work."""
        if not self.hswap_bytes:
            if self.hswap_overflow is not None:
                raise ConfigError(f"--hswap-overflow '{self.hswap_overflow}' needs --hswap SIZE: give both")
            return
        if self.hswap_bytes < MIN_HSWAP_BYTES:
            raise ConfigError(f"hswap of {self.hswap_bytes} bytes is too small: give --hswap at least 64K")
        if self.hswap_bytes > MAX_HSWAP_BYTES:
            raise ConfigError(f"hswap of {self.hswap_bytes} bytes is too large: give --hswap at most 4T")
        if not self.pool_bytes and self.pool_socket is None:
            raise ConfigError("hswap needs a pool: give --pool SIZE, or no --hswap")
        if self.options.read_only:
            raise ConfigError("hswap cannot be written on a read-only mount: give no --hswap, or no -o ro")


def check_cache_bytes(size: int, what: str = "cache") -> None:
    """Raise ConfigError for an impossible cache size, at a mount or a resize."""
    if size < MIN_CACHE_BYTES:
        raise ConfigError(f"{what} of {size} bytes is too small: give at least 1M")
    check_ram(what, size)


def parse_throttle(text: str) -> Throttle:
    """Parse latency=5ms,bandwidth=100M,depth=8, in which each part is optional."""
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
    """Parse min=16M,max=256M,idle=10s, in which idle is optional."""
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
    """The value of --pool: the size of a private pool, 0 bytes for none, or the socket of a tmemd."""

    pool_bytes: int
    socket: str | None = None


def parse_pool(text: str) -> PoolChoice:
    """Parse `SIZE`, `none`, or `unix:PATH` (borrow up to all RAM from tmemd)."""
    if text == "none":
        return PoolChoice(0)
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        return PoolChoice(ram_bytes(), os.path.abspath(path) if path else "")
    return PoolChoice(parse_size(text))
