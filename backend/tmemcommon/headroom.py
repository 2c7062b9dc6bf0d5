"""How much memory may still be made real: the machine's, and that of every memory cgroup this process is in.

A slab that cannot be had must be refused before it is made: a memory cgroup at its limit does not return ENOMEM, it
kills. So this is asked before every step, and its answer is a reason that a person understands.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path

from tmemcommon.mountinfo import parse_mountinfo
from tmemcommon.sizes import MIB

CGROUP_RESERVE = 16 * MIB  # what a cgroup keeps for its processes themselves

CORE_ALLOWANCE = MIB // 2  # of each core: 64 pages charged ahead, and batches of up to 31 pages

_UNLIMITED = 1 << 62  # v1 writes a number for "no limit", v2 a word

_Names = tuple[tuple[str, ...], str, str, tuple[str, ...]]
_V1: _Names = (
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    "total_inactive_file",
    ("total_rss", "total_cache"),
)
_V2: _Names = (
    ("memory.max", "memory.high"),
    "memory.current",
    "inactive_file",
    ("anon", "file", "kernel", "sock"),
)


@dataclass(frozen=True, slots=True)
class _Level:
    """One cgroup that bounds this process: itself or an ancestor."""

    path: Path
    limits: tuple[str, ...]
    usage: str
    reclaimable: str  # the line of memory.stat with file pages that nobody used lately
    statistics: tuple[str, ...]  # the lines that name what is charged; the kernel's own memory has a file in version 1

    def spare(self, enough: int) -> int:
        """Count the bytes below the limit; what could be reclaimed only when the rest is not `enough`."""
        limit = min((_number(self.path / name) for name in self.limits), default=_UNLIMITED)
        if limit >= _UNLIMITED:
            return _UNLIMITED
        spare = limit - _number(self.path / self.usage)
        return spare if spare >= enough else spare + self._idle_file_pages()

    def _idle_file_pages(self) -> int:
        for line in (_read(self.path / "memory.stat") or "").splitlines():
            name, _, value = line.partition(" ")
            if name == self.reclaimable:
                return int(value)
        return 0


class Headroom:
    """Say whether so much memory may be made real now.

    `reserve` bytes of the machine's are never touched; None for somebody who is there for a machine without memory.
    """

    def __init__(self, reserve: int | None, root: Path = Path("/")) -> None:
        self._reserve = reserve
        self._root = root
        self._membership: str | None = None
        self._levels: list[_Level] = []

    def refusal(self, wanted: int) -> str | None:
        """Give the reason why `wanted` bytes may not be made real, in one line; None when they may."""
        try:
            return self._refusal(wanted)
        except OSError as error:
            return f"how much memory is left cannot be read: {error.strerror}"

    def pinned(self) -> int | None:
        """Count the bytes charged to this process's memory cgroup that are in none of its statistics; None without one.

        These are pages that were cut off their file while somebody held a reference. What each core has been charged
        ahead, and what it is about to free, looks the same and is allowed for.
        """
        for level in self._bounds()[:1]:
            stat = dict(line.split(" ", 1) for line in (_read(level.path / "memory.stat") or "").splitlines())
            named = sum(int(stat.get(name, 0)) for name in level.statistics)
            kernel = _read(level.path / "memory.kmem.usage_in_bytes")
            charged = _number(level.path / level.usage) - named - int(kernel or 0)
            return max(0, charged - CORE_ALLOWANCE * (os.cpu_count() or 1))
        return None

    def _refusal(self, wanted: int) -> str | None:
        available = self._available() if self._reserve is not None else None
        if self._reserve is not None and available is not None and available - wanted < self._reserve:
            return f"the machine has {available // MIB} MiB left, of which {self._reserve // MIB} MiB are reserved"
        for level in self._bounds():
            spare = level.spare(wanted + CGROUP_RESERVE)
            if spare - wanted < CGROUP_RESERVE:
                return f"the memory cgroup {level.path.name} has {max(0, spare) // MIB} MiB left"
        return None

    def _available(self) -> int | None:
        """Read MemAvailable; None where the kernel does not tell."""
        text = _read(self._root / "proc/meminfo")
        if text is None:
            return None
        _, found, rest = text.partition("MemAvailable:")
        return int(rest.split(maxsplit=1)[0]) * 1024 if found else None

    def _bounds(self) -> list[_Level]:
        """Find the cgroups again when this process was moved."""
        membership = _read(self._root / "proc/self/cgroup")
        if membership is None:
            return []
        if membership != self._membership:
            self._membership = membership
            self._levels = self._find(membership)
        return self._levels

    def _find(self, membership: str) -> list[_Level]:
        """Walk from this process's memory cgroup up to the top of each hierarchy that is mounted here."""
        levels: list[_Level] = []
        for line in membership.splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                names = _V2
            elif "memory" in controllers.split(","):
                names = _V1
            else:
                continue
            for top, below in self._mounted(unified=controllers == ""):
                here = top / os.path.relpath(path, below) if _is_below(path, below) else top
                while _is_below(os.fspath(here), os.fspath(top)):
                    if (here / names[1]).exists():
                        levels.append(_Level(here, *names))
                    here = here.parent
        return levels

    def _mounted(self, *, unified: bool) -> list[tuple[Path, str]]:
        """List where the hierarchy is mounted, and which of its cgroups is seen there."""
        found = []
        for mount in parse_mountinfo((self._root / "proc/self/mountinfo").read_bytes()):
            if mount.fstype == "cgroup2" if unified else mount.fstype == "cgroup" and "memory" in mount.options:
                found.append((self._root / os.fspath(mount.mountpoint).lstrip("/"), mount.root))
        return found[:1]


def _is_below(path: str, top: str) -> bool:
    return path == top or path.startswith(top.rstrip("/") + "/")


def _number(path: Path) -> int:
    """Read a bound; one that is missing or that says max bounds nothing."""
    text = (_read(path) or "").strip()
    return int(text) if text.isdecimal() else _UNLIMITED


def _read(path: Path) -> str | None:
    """Read a file of the kernel's; None when there is none for us. OSError without descriptors or memory for it."""
    try:
        return path.read_text()
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise
        return None
