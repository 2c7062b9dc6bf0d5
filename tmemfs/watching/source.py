"""Detect that SOURCE now leads to another mount. This mount keeps showing the old one.

Our descriptor keeps the old mount alive. It can be replaced by a lazy unmount and a new mount, or by a mount over it.
Both show in the mount table. Its changes can be waited for, and reading it does not contact a server that may hang.
"""

from __future__ import annotations

import logging
import os
import select
from collections.abc import Sequence
from pathlib import Path

import trio

from tmemcommon.mountinfo import MountEntry, parse_mountinfo
from tmemfs.kernel.mounttable import is_tmemfs, mount_table

log = logging.getLogger(__name__)

CHECK_SECONDS = 0.5  # between two checks: a machine may mount many things at once
POLL_SECONDS = 60.0  # the longest wait of the thread for a change
_READ_BYTES = 1 << 16


def mounts_on_way(table: Sequence[MountEntry], path: Path) -> list[MountEntry]:
    """Return the mounts that a path leads through; the last one is the mount it ends in."""
    numbers = {entry.mount_id for entry in table}
    upon = {(entry.parent_id, entry.mountpoint): entry for entry in table}
    found = [entry for entry in table if entry.mountpoint == Path("/") and entry.parent_id not in numbers][:1]
    if found:
        for place in (*reversed(path.parents), path):
            while (entry := upon.get((found[-1].mount_id, place))) is not None and entry not in found:
                found.append(entry)
    return found


def leads_to(table: Sequence[MountEntry], path: Path, number: int) -> bool:
    """Return whether a path leads to the mount with a number, or to mounts of tmemfs over it."""
    way = mounts_on_way(table, path)
    numbers = [entry.mount_id for entry in way]
    return number in numbers and all(is_tmemfs(entry) for entry in way[numbers.index(number) + 1 :])


class SourceMount:
    """The mount that a guest's SOURCE was on at the start."""

    def __init__(self, source_fd: int) -> None:
        self._path = Path(os.readlink(f"/proc/self/fd/{source_fd}"))
        lines = Path(f"/proc/self/fdinfo/{source_fd}").read_text().splitlines()
        self._number = int(next((line.split()[1] for line in lines if line.startswith("mnt_id:")), 0))
        self.replaced = False

    def check_table(self, table: Sequence[MountEntry]) -> None:
        """Compare with a mount table. Log when SOURCE leads to another mount, or to this one again."""
        replaced = not leads_to(table, self._path, self._number)
        if replaced and not self.replaced:
            log.warning(
                "something else is mounted at %s now, but this mount still shows what was there before:"
                " unmount it and mount it again",
                self._path,
            )
        elif self.replaced and not replaced:
            log.info("%s leads to what this mount shows again", self._path)
        self.replaced = replaced

    async def run(self) -> None:
        """Check the mount table whenever it changes, until cancelled."""
        if not leads_to(mount_table(), self._path, self._number):
            return  # the table does not contain the mount of SOURCE, for example in another mount namespace
        threads = trio.CapacityLimiter(1)
        fd = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        while True:
            self.check_table(await trio.to_thread.run_sync(_next_table, fd, limiter=threads, abandon_on_cancel=True))
            await trio.sleep(CHECK_SECONDS)


def _next_table(fd: int) -> list[MountEntry]:
    """Wait until the mount table changes, at most POLL_SECONDS, and return it. Opens no descriptor."""
    changed = select.poll()
    changed.register(fd, select.POLLPRI | select.POLLERR)
    changed.poll(POLL_SECONDS * 1000)
    os.lseek(fd, 0, os.SEEK_SET)
    return parse_mountinfo(b"".join(iter(lambda: os.read(fd, _READ_BYTES), b"")))
