"""Notice that SOURCE leads to another mount by now: this one still shows what was there when it was made.

A descriptor holds the old mount, so what replaces it is a lazy unmount and a new mount, or a mount over it. The mount
table tells, and can be waited for; nothing here asks a server that may hang.
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

CHECK_SECONDS = 0.5  # seconds between two looks: a machine may mount many things at once
POLL_SECONDS = 60.0  # seconds that a thread waits for a change
_READ_BYTES = 1 << 16


def mounts_on_way(table: Sequence[MountEntry], path: Path) -> list[MountEntry]:
    """Return the mounts that a path leads through, the one it ends in last."""
    numbers = {entry.mount_id for entry in table}
    upon = {(entry.parent_id, entry.mountpoint): entry for entry in table}
    found = [entry for entry in table if entry.mountpoint == Path("/") and entry.parent_id not in numbers][:1]
    if found:
        for place in (*reversed(path.parents), path):
            while (entry := upon.get((found[-1].mount_id, place))) is not None and entry not in found:
                found.append(entry)
    return found


def leads_to(table: Sequence[MountEntry], path: Path, number: int) -> bool:
    """Tell whether a path leads to the mount with a number, or to mounts of tmemfs over it."""
    way = mounts_on_way(table, path)
    numbers = [entry.mount_id for entry in way]
    return number in numbers and all(is_tmemfs(entry) for entry in way[numbers.index(number) + 1 :])


class SourceMount:
    """The mount that a guest's SOURCE was on when it began."""

    def __init__(self, source_fd: int) -> None:
        self._path = Path(os.readlink(f"/proc/self/fd/{source_fd}"))
        lines = Path(f"/proc/self/fdinfo/{source_fd}").read_text().splitlines()
        self._number = int(next((line.split()[1] for line in lines if line.startswith("mnt_id:")), 0))
        self.replaced = False

    def look(self, table: Sequence[MountEntry]) -> None:
        """Compare with the mount table; say so in the log when SOURCE leads elsewhere, or here again."""
        replaced = not leads_to(table, self._path, self._number)
        if replaced and not self.replaced:
            log.warning(
                "something else is mounted at %s by now, and this mount still shows what was there before:"
                " unmount it and mount it anew",
                self._path,
            )
        elif self.replaced and not replaced:
            log.info("%s is again what this mount shows", self._path)
        self.replaced = replaced

    async def run(self) -> None:
        """Look at the mount table whenever it changes, until cancelled."""
        if not leads_to(mount_table(), self._path, self._number):
            return  # the table does not show where SOURCE is: in another mount namespace, for example
        threads = trio.CapacityLimiter(1)
        fd = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        while True:
            self.look(await trio.to_thread.run_sync(_next_table, fd, limiter=threads, abandon_on_cancel=True))
            await trio.sleep(CHECK_SECONDS)


def _next_table(fd: int) -> list[MountEntry]:
    """Wait until the mount table changes, for a bounded time, and read it. This needs no other descriptor."""
    changed = select.poll()
    changed.register(fd, select.POLLPRI | select.POLLERR)
    changed.poll(POLL_SECONDS * 1000)
    os.lseek(fd, 0, os.SEEK_SET)
    return parse_mountinfo(b"".join(iter(lambda: os.read(fd, _READ_BYTES), b"")))
