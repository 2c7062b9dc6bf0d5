"""The command line of tmemfs with a guest that checks itself four times a second and after the last request.

A failed check ends the mount with an error status; otherwise `<log>.checked` is written at the end.
"""

from __future__ import annotations

import os

import trio

import tmemfs.lifecycle.mount
from tests.consistency import check_content
from tests.loopguard import LoopGuard
from tmemfs.cli import main
from tmemfs.guest import Guest

SECONDS = 0.25


class CheckedGuest(Guest):
    """A guest that runs `check()` of its parts between two awaits."""

    def check(self) -> None:
        """Check each part, and the parts together."""
        super().check()
        check_content(self.data.inodes, self.data.memory)
        assert self.data.memory.resident <= self.data.memory.frames or not self.data.memory.settled
        assert sum(inode.opens for inode in self.data.inodes.all()) <= len(self.data.files.by_number)
        for file in self.data.files.by_number.values():
            assert not file.closing
            assert file.inode.opens > 0

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Check the parts until the mount ends."""
        self.guard = LoopGuard(os.fspath(self.config.source))
        async with trio.open_nursery() as nursery:
            await nursery.start(super().run)
            task_status.started()
            while True:
                self.check()
                await trio.sleep(SECONDS)

    async def finish(self) -> None:
        """Check the parts at the end, and that the event loop made no call that may wait for a disk."""
        await super().finish()
        self.guard.active = False
        self.guard.check()
        self.check()
        dirty = [inode.number for inode in self.data.inodes.all() if inode.file.has_dirty]
        assert self.config.log_file is not None
        self.config.log_file.with_suffix(".checked").write_text(f"consistent, dirty {dirty}\n")


if __name__ == "__main__":
    vars(tmemfs.lifecycle.mount)["Guest"] = CheckedGuest
    main()
