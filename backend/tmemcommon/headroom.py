"""How much more memory may be allocated: of the machine, and in every memory cgroup of this process.

A slab that does not fit must be refused before it is allocated: a memory cgroup at its limit does not return ENOMEM, it
kills a process. So every step is checked first, and a refusal has a reason that an operator understands.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path

from tmemcommon.mountinfo import parse_mountinfo
from tmemcommon.sizes import MIB

CGROUP_RESERVE = 16 * MIB  # left in a cgroup for its processes themselves
CORE_ALLOWANCE = MIB // 2  # for each core: it charges 64 pages in advance and frees batches of up to 31 pages
_UNLIMITED = 1 << 62  # version 1 writes "no limit" as a huge number, version 2 as a word

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
    """The memory cgroup of this process, or an ancestor of it."""

    path: Path
    limits: tuple[str, ...]
    usage: str
    reclaimable: str  # the line of memory.stat with inactive file pages
    statistics: tuple[str, ...]  # the lines that add up to the usage; version 1 has kernel memory in another file

    def spare(self, enough: int) -> int:
        """Return the bytes below the limit; if they are fewer than `enough`, add those that can be reclaimed."""
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
    """Checks whether memory may be allocated.

    `reserve` bytes of the machine stay free. With None the machine is not checked, only cgroups: for swap, which is
    needed just when the machine has no memory left.
    """

    def __init__(self, reserve: int | None, root: Path = Path("/")) -> None:
        self._reserve = reserve
        self._root = root
        self._membership: str | None = None
        self._levels: list[_Level] = []

    def refusal(self, wanted: int) -> str | None:
        """Return why `wanted` bytes may not be allocated, as one line; None if they may."""
        try:
            return self._refusal(wanted)
        except OSError as error:
            return f"how much memory is left cannot be read: {error.strerror}"

    def pinned(self) -> int | None:
        """Return the bytes charged to this process's memory cgroup that no statistic contains; None without a cgroup.

        These are pages that were truncated from their file while a reference to them was held. Pages that a core has
        charged in advance or is about to free look the same, so CORE_ALLOWANCE is subtracted.
        """
        for level in self._current_levels()[:1]:
            stat = dict(line.split(" ", 1) for line in (_read(level.path / "memory.stat") or "").splitlines())
            counted = sum(int(stat.get(name, 0)) for name in level.statistics)
            kernel = _read(level.path / "memory.kmem.usage_in_bytes")
            charged = _number(level.path / level.usage) - counted - int(kernel or 0)
            return max(0, charged - CORE_ALLOWANCE * (os.cpu_count() or 1))
        return None

    def _refusal(self, wanted: int) -> str | None:
        available = self._available() if self._reserve is not None else None
        if self._reserve is not None and available is not None and available - wanted < self._reserve:
            return f"the machine has {available // MIB}M left, of which {self._reserve // MIB}M are reserved"
        for level in self._current_levels():
            spare = level.spare(wanted + CGROUP_RESERVE)
            if spare - wanted < CGROUP_RESERVE:
                return f"the memory cgroup {level.path.name} has {max(0, spare) // MIB}M left"
        return None

    def _available(self) -> int | None:
        """Return MemAvailable; None if the kernel does not have it."""
        text = _read(self._root / "proc/meminfo")
        if text is None:
            return None
        _, found, rest = text.partition("MemAvailable:")
        return int(rest.split(maxsplit=1)[0]) * 1024 if found else None

    def _current_levels(self) -> list[_Level]:
        """Return the cgroups of this process; search them again if it was moved."""
        membership = _read(self._root / "proc/self/cgroup")
        if membership is None:
            return []
        if membership != self._membership:
            self._membership = membership
            self._levels = self._find(membership)
        return self._levels

    def _find(self, membership: str) -> list[_Level]:
        """Return this process's memory cgroup and its ancestors, in each hierarchy that is mounted here."""
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
        """Return the first mount of the hierarchy: its path, and the cgroup that is mounted there."""
        found = []
        for mount in parse_mountinfo((self._root / "proc/self/mountinfo").read_bytes()):
            if mount.fstype == "cgroup2" if unified else mount.fstype == "cgroup" and "memory" in mount.options:
                found.append((self._root / os.fspath(mount.mountpoint).lstrip("/"), mount.root))
        return found[:1]


def _is_below(path: str, top: str) -> bool:
    return path == top or path.startswith(top.rstrip("/") + "/")


def _number(path: Path) -> int:
    """Read a limit; a missing one and the word max are _UNLIMITED."""
    text = (_read(path) or "").strip()
    return int(text) if text.isdecimal() else _UNLIMITED


def _read(path: Path) -> str | None:
    """Read a file of the kernel; None if it is missing or unreadable. Raises OSError without descriptors or memory."""
    try:
        return path.read_text()
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise
        return None
