"""Change files: write, truncate, and everything else that changes a version.

Write-through is the rule: the backing has the bytes before a write returns. Every change of one inode's content or
version holds its write lock, compares the stat just before the change with the recorded version (somebody else may
have been there), and records the stat just after it; both stats are taken in the thread call that makes the change.

The pool is flushed before *and* after the backing write: before, so that a failure in between leaves no old page to be
found; after, because a reader may have brought the old page back. A failed or short write drops the whole range,
because its content is unknown. It never drops dirty pages.

What was opened with O_APPEND is written with O_APPEND, and always through: others may append to the file meanwhile, and
only the backing can give each of them an end of its own. The offset of such a request is where the kernel believes the
end to be, and says nothing. Where the bytes landed is what the sizes just before and just after say.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import TypeVar

from tmem.arena import PAGE_SHIFT, PAGE_SIZE
from tmemfs.backing import Backing, write_some
from tmemfs.inodes.inode import Inode
from tmemfs.inodes.inodes import InodeTable
from tmemfs.io.files import OpenFile
from tmemfs.io.writeback import Writeback

T = TypeVar("T")

_OFFSET = PAGE_SIZE - 1


class Writer:
    """The write path of one guest."""

    def __init__(self, backing: Backing, inodes: InodeTable, writeback: Writeback | None) -> None:
        self._backing = backing
        self._inodes = inodes
        self.writeback = writeback

    async def write(self, file: OpenFile, offset: int, data: bytes) -> int:
        """Write bytes; return how many were taken. Raise the backing's OSError when none were."""
        inode = file.inode
        async with inode.lock():
            if inode.virtual:
                self._inodes.mark_virtual(inode)
            if file.append_to_eof and not _is_of_mapping(file, offset, len(data)):
                return await self._append(file, offset, data)
            if self.writeback is not None:
                privileged = file.strips_privileges and inode.attr is not None and privileges_of(inode.attr.st_mode)
                if not privileged and await self.writeback.store(file, offset, data):
                    return len(data)
                await self.writeback.flush(inode)
            return await self._write_through(file, offset, data)

    async def _append(self, file: OpenFile, offset: int, data: bytes) -> int:
        """Write bytes to the end that the backing has; the kernel believes it to be at `offset`."""
        inode = file.inode
        if self.writeback is not None:
            failure = await self.writeback.flush(inode)
            if failure is not None:  # what was written before is not there yet: the end is in the wrong place
                raise OSError(failure.errno, failure.strerror)
        written = await self._write_through(file, inode.file.size, data, append=True)
        if inode.file.size > offset + written:  # the kernel believes in an end before the real one: a wrong page
            inode.size_in_doubt = True
            self._inodes.observer.invalidate(inode)
        return written

    async def _write_through(self, file: OpenFile, offset: int, data: bytes, *, append: bool = False) -> int:
        inode, content = file.inode, file.inode.file
        call = _overwrite_between_stats if file.append_to_eof and not append else _write_between_stats
        first, last = offset >> PAGE_SHIFT, (offset + len(data) - 1) >> PAGE_SHIFT
        content.flush_pool(first, last)
        started = self._inodes.begin_change(inode)
        written = 0
        landed: int | None = None
        try:
            with file.borrowed() as fd:
                before, written, after = await self._backing.write(
                    inode, len(data), call, fd, data, offset, file.strips_privileges
                )
            if not append:
                landed = offset
            elif before.st_size + written == after.st_size:  # else others wrote at the same time: who knows where
                landed = before.st_size
        finally:  # an error or a cancellation too leaves an unknown range behind
            self._inodes.end_change(inode)
            inode.attr_until = 0.0
            if written and landed is not None:
                content.overwrite(landed, data[:written])
            if written < len(data) or landed is None:
                if append or content.has_dirty:  # acknowledged pages whose write-back fails stay, the clean ones go
                    content.drop_clean()
                else:
                    content.drop((offset + written) >> PAGE_SHIFT, last)
        if landed is None or self._inodes.changed_since_recorded(inode, before):
            self._inodes.invalidate(inode)
        self._inodes.record_own_change(inode, after, started)
        content.size = max(content.size, after.st_size if append else offset + written)  # where it is not recorded
        if inode.virtual or after.st_size < (written if append else offset + written):
            self._inodes.mark_virtual(inode)
        if after.st_mode != before.st_mode:
            self._inodes.observer.invalidate(inode)  # the kernel forgets times and size after a write, not the mode
        return written

    async def change(self, inode: Inode, call: Callable[[], T], stat_of: Callable[[], os.stat_result]) -> T:
        """Run a metadata call that changes the inode's version; `stat_of` gives its stat. Both run in a thread."""
        async with inode.lock():
            return await self._change_locked(inode, call, stat_of)

    async def _change_locked(self, inode: Inode, call: Callable[[], T], stat_of: Callable[[], os.stat_result]) -> T:
        if self.writeback is not None:
            await self.writeback.flush(inode)
        started = self._inodes.begin_change(inode)
        try:
            before, result, after = await self._backing.meta(_call_between_stats, call, stat_of)
        finally:
            self._inodes.end_change(inode)
            inode.attr_until = 0.0  # what failed may have changed something
        if self._inodes.changed_since_recorded(inode, before):
            self._inodes.invalidate(inode)
        self._inodes.record_own_change(inode, after, started)
        return result

    async def truncate(
        self, inode: Inode, size: int, call: Callable[[], None], stat_of: Callable[[], os.stat_result]
    ) -> None:
        """Set the size of a file; `call` does so on the backing."""
        async with inode.lock():
            if inode.virtual:
                self._inodes.mark_virtual(inode)
            old = inode.file.size
            try:
                await self._change_locked(inode, call, stat_of)
            except OSError:
                inode.file.drop_clean()
                raise
            inode.file.size = old  # the pool is flushed up to the end that was
            inode.file.truncate(size)

    async def settle(self, inode: Inode) -> None:
        """Write back before a stat: a write-back changes the ctime, and what was told must still be so after it."""
        if self.writeback is not None and inode in self.writeback.dirty_mtime_ns:
            async with inode.lock():
                await self.writeback.flush(inode)

    async def sync(self, file: OpenFile, *, data_only: bool) -> None:
        """Make the file's bytes survive a crash. Raise the OSError of an earlier write-back that failed."""
        if self.writeback is not None:
            await self.writeback.sync(file)
        with file.borrowed() as fd:
            await self._backing.data(file.inode, 0, os.fdatasync if data_only else os.fsync, fd)


def _is_of_mapping(file: OpenFile, offset: int, size: int) -> bool:
    """Tell whether a write through a descriptor with O_APPEND has the shape of dirty pages of a mapping.

    These come through any descriptor that was mapped, and go where they belong: whole pages, up to the end of the
    file. The kernel holds none where this is the only descriptor to read by and nobody did. Appended bytes come from
    where the kernel believes the end to be: at the one known here or, since others changed it, at one of before.
    """
    inode, known, end = file.inode, file.inode.file.size, offset + size
    if not file.readable or (inode.readable_opens == 1 and not file.stream.next_page):
        return False
    if offset >= known or offset in inode.former_sizes:
        return False
    return not offset & _OFFSET and (not end & _OFFSET or end == known)


Written = tuple[os.stat_result, int, os.stat_result]  # the stats before and after, and how many bytes were taken


def _write_between_stats(fd: int, data: bytes, offset: int, strip: bool) -> Written:
    """Write all of `data`, or as much as is taken before an error; raise the error when that is nothing.

    A descriptor with O_APPEND writes to the end, whatever the offset is (pwrite(2), under "Bugs").
    `strip`: take set-user-ID and set-group-ID away, as a write by anybody but root does. The backing does not do it
    where it is root who writes.
    """
    before = os.fstat(fd)
    done = 0
    with memoryview(data) as view:
        while done < len(data):
            try:
                done += write_some(fd, view[done:], offset + done)
            except OSError:
                if not done:
                    raise
                break
    privileges = privileges_of(before.st_mode)
    if strip and privileges:
        os.fchmod(fd, stat.S_IMODE(before.st_mode) & ~privileges)
    return before, done, os.fstat(fd)


def _overwrite_between_stats(fd: int, data: bytes, offset: int, strip: bool) -> Written:
    """Write to an offset of a file that was opened with O_APPEND, so through another descriptor."""
    other = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        return _write_between_stats(other, data, offset, strip)
    finally:
        os.close(other)


def privileges_of(mode: int) -> int:
    """Return the bits of a mode that a write takes away (set-group-ID without group execution is another thing)."""
    return mode & (stat.S_ISUID | (stat.S_ISGID if mode & stat.S_IXGRP else 0))


def _call_between_stats(
    call: Callable[[], T], stat_of: Callable[[], os.stat_result]
) -> tuple[os.stat_result, T, os.stat_result]:
    before = stat_of()
    result = call()
    return before, result, stat_of()
