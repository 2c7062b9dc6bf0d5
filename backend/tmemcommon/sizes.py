"""Sizes and durations as people write them on a command line, and the error that says what was wrong."""

from __future__ import annotations

import os
import re

KIB = 1 << 10
MIB = 1 << 20

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B?|B|%)?", re.IGNORECASE | re.ASCII)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(us|µs|ms|s|m|h)?", re.ASCII)
_SIZE_UNITS = {"": 1, "B": 1, "K": KIB, "M": MIB, "G": 1 << 30, "T": 1 << 40}
_DURATION_UNITS = {"": 1.0, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_MAX_SECONDS = 1e9  # 31 years: beyond some such bound clocks and the kernel's time-outs overflow
_LARGER = ("", "K", "M", "G", "T", "P", "E", "Z", "Y")
_SIZE_HINT = "write a size such as 64M, 1G, 4096 or 10% (of RAM)"


class ConfigError(Exception):
    """Report bad input in one line that names the thing and the remedy."""


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
        size = int(ram_bytes() * number / 100)
    else:
        size = int(number * _SIZE_UNITS[unit[:1]])
    if size <= 0:
        raise ConfigError(f"size '{text}' is zero: {_SIZE_HINT}")
    if size >= 1 << 63:
        raise ConfigError(f"size '{text}' is too large: {_SIZE_HINT}")
    return size


def parse_duration(text: str) -> float:
    """Parse a time in seconds: 0.5, 5ms, 100us, 2s, 1m, 1h."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"duration '{text}' is not understood: write for instance 5ms, 0.5, 2s or 1h")
    seconds = float(match[1]) * _DURATION_UNITS[match[2] or ""]
    if seconds > _MAX_SECONDS:
        raise ConfigError(f"duration '{text}' is too long: give at most {_MAX_SECONDS / 3600:.0f}h")
    return seconds


def ram_bytes() -> int:
    """Measure this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_ram(what: str, size: int) -> None:
    """Refuse more memory than this machine has. Raises ConfigError."""
    ram = ram_bytes()
    if size > ram:
        raise ConfigError(f"{what} of {format_size(size)} is more than all RAM: give at most {ram // MIB}M")


def format_size(size: int) -> str:
    """Write a number of bytes for people: 0, 64K, 1.5G, three digits at most."""
    number, units = float(size), iter(_LARGER)
    unit = next(units)
    while number >= 999.5 and unit != _LARGER[-1]:
        number, unit = number / 1024, next(units)
    return f"{number:.0f}{unit}" if number >= 99.95 or number == int(number) else f"{number:.1f}{unit}"
