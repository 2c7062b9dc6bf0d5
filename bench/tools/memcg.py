"""A memory cgroup (version 1 or 2) with a limit, removed at the end."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.tools.children import BenchError, undisturbed

_PATIENCE_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """Where memory cgroups are made, and the name of their limit."""

    root: Path
    limit: str

    def lacks(self) -> str | None:
        """Return why no cgroup can be made here; None if one can."""
        if os.geteuid() != 0:
            return "needs root"
        if not self.root.is_dir():
            return f"there is no memory cgroup hierarchy at {self.root}"
        controllers = self.root / "cgroup.controllers"
        if controllers.exists() and "memory" not in controllers.read_text().split():
            return f"{self.root} has no memory controller: it is in the other version's hierarchy"
        return None


def _unified() -> Path:
    """Return the hierarchy of version 2, which older systems mount below that of version 1."""
    roots = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")
    return next((root for root in roots if (root / "cgroup.controllers").exists()), roots[0])


VERSIONS = {
    1: Hierarchy(Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
    2: Hierarchy(_unified(), "memory.max"),
}


@contextlib.contextmanager
def limited(size: int, version: int | None = None) -> Iterator[Path]:
    """Yield the directory of a new cgroup with a limit of `size` bytes. Its processes must end before it does."""
    hierarchy = VERSIONS[version] if version is not None else _any()
    lacking = hierarchy.lacks()
    if lacking is not None:
        raise BenchError(lacking)
    directory = hierarchy.root / f"tmemfs-{os.getpid()}-{secrets.token_hex(4)}"
    if (hierarchy.root / "cgroup.subtree_control").exists():
        (hierarchy.root / "cgroup.subtree_control").write_text("+memory")
    directory.mkdir()
    try:
        set_limit(directory, hierarchy, size)
        yield directory
    finally:
        with undisturbed():
            _remove(directory)


def set_limit(directory: Path, hierarchy: Hierarchy | int, size: int) -> None:
    """Change the limit of a cgroup."""
    found = VERSIONS[hierarchy] if isinstance(hierarchy, int) else hierarchy
    (directory / found.limit).write_text(str(size))


def join(directory: Path, pid: int) -> None:
    """Move a process into a cgroup; only memory that it takes afterwards is counted there."""
    (directory / "cgroup.procs").write_text(str(pid))


def _any() -> Hierarchy:
    """Return the version that works on this machine."""
    return next((one for one in VERSIONS.values() if one.lacks() is None), VERSIONS[1])


def _remove(directory: Path) -> None:
    """Remove a cgroup once the kernel has released its last process."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            directory.rmdir()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
