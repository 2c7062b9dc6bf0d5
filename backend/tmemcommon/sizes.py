"""Sizes and durations on the command line.

Sizes are written in one way: a number and a binary unit without "iB", as in 64K or 1.5G. `format_size` writes it.
`parse_size` reads it, and also 64KiB, bytes and percentages. Messages give exact bytes where rounding would mislead.
"""

from __future__ import annotations

import os
import re

KIB = 1 << 10
MIB = 1 << 20

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B?|B|%)?", re.IGNORECASE | re.ASCII)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(us|µs|ms|s|m|h)?", re.ASCII)
_SIZE_UNITS = {"": 1, "B": 1, "K": KIB, "M": MIB, "G": 1 << 30, "T": 1 << 40}
_DURATION_UNITS = {"": 1.0, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_MAX_SECONDS = 1e9  # 31 years: longer ones overflow clocks and time-outs of the kernel
_PREFIXES = ("", "K", "M", "G", "T", "P", "E", "Z", "Y")
_SIZE_HINT = "write a size such as 64M, 1G, 4096 or 10% (of RAM)"


class ConfigError(Exception):
    """Bad input; the message is one line that names the thing and the remedy."""


def parse_size(text: str) -> int:
    """Parse a number of bytes: 4096, 64K, 64MiB, 1.5G, or a percentage of this machine's RAM.

    Units are powers of 1024. Raises ConfigError for other text and for zero.
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
    """Return the size of this machine's RAM."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_ram(what: str, size: int) -> None:
    """Raise ConfigError for more memory than this machine has."""
    ram = ram_bytes()
    if size > ram:
        raise ConfigError(f"{what} of {format_size(size)} is more than all RAM: give at most {ram // MIB}M")


def format_size(size: int) -> str:
    """Format bytes with at most three digits: 0, 100B, 64K, 1.5G."""
    if 0 < size < 1000:
        return f"{size}B"
    number, units = float(size), iter(_PREFIXES)
    unit = next(units)
    while number >= 999.5 and unit != _PREFIXES[-1]:
        number, unit = number / 1024, next(units)
    return f"{number:.0f}{unit}" if number >= 99.95 or number == int(number) else f"{number:.1f}{unit}"


def format_exact_size(size: int) -> str:
    """Format bytes without rounding, in the largest unit that divides them: 0, 100B, 3200K, 1536M."""
    units = iter(_PREFIXES)
    unit = next(units)
    while size and size % 1024 == 0 and unit != "T":
        size, unit = size // 1024, next(units)
    return f"{size}{unit}" if unit or not size else f"{size}B"
