"""Detect changes by others at once (`--watch`): inotify on the directories that the kernel looks into.

A directory is watched before the first name in it is looked up or listed. So the kernel holds nothing of it that is
older than the watch. A directory that only appeared in a listing of its parent has no watch: changes of its own size
and times are seen after the attribute time-out.

inotify reports our own changes too. Each of them was recorded with its stat, so the stat after such an event is equal
to the recorded one; after a change by others it differs. With coarse time stamps the two may be equal even so.
Therefore a write event counts as a change by others, whatever the stat says, if we did not write to the file after the
earliest time of the event. That time is the last moment at which the event queue was empty.

Two races:

- The event of our own create or rename, and a stat of its result, may come before the operation has recorded it in the
  inode table. The kernel holds the directory's lock until we have replied. So before removals are matched with our
  own, and again before names are compared, a thread takes this lock once: it invalidates a name that cannot exist.
  Rejected: a set of all names being changed, which every operation on names would have to maintain.
- A stat during a change of our own proves nothing (`InodeTable.merge_stat`). The event is used up by then, so the file
  is checked again when its writer is done.

A name that now leads to another file is invalidated in the kernel, from a thread and only if needed: while the name of
a directory in use is invalid, getcwd(2) in it fails.

Each directory with events has its own task, so one that hangs does not stop the others.

inotify does not report changes on other clients or on the server of a network filesystem, writes through a mapping
before the file is closed, and writes through a hard link in a directory without a watch. These are seen at the next
open, as without `--watch`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import trio

from tmemfs.backing import Backing
from tmemfs.inodes.descriptors import Descriptors
from tmemfs.inodes.inode import Inode
from tmemfs.inodes.inodes import InodeTable
from tmemfs.kernel.kernelcache import KernelCache
from tmemfs.watching.inotify import FILE_CHANGED, MODIFIED, NAME_CHANGED, NAME_REMOVED, SELF, Watches

log = logging.getLogger(__name__)

READ_SECONDS = 0.01  # between two reads of events: a file that is being written costs one stat per interval
BATCH = 256  # names per call on the backing
LOCK_THREADS = 4  # that may wait for the kernel's directory locks: half of the threads that Backing has for control


class NameEvents(NamedTuple):
    """The events of one name: their kinds, how many were removals, and their earliest possible time."""

    mask: int
    removals: int
    since: float


NO_EVENTS = NameEvents(0, 0, 0.0)


class Watch:
    """The watched directories of one guest, and the handling of their events."""

    def __init__(
        self,
        inodes: InodeTable,
        descriptors: Descriptors,
        backing: Backing,
        kernel: KernelCache,
    ) -> None:
        self._inodes = inodes
        self._descriptors = descriptors
        self._backing = backing
        self._kernel = kernel
        self.watches = Watches(descriptors, self._forget_events)
        self._pending: dict[Inode, dict[bytes, NameEvents]] = {}  # events not yet checked, by directory and name
        self._busy: set[Inode] = set()  # directories with a task
        self._rechecks: set[tuple[Inode, bytes]] = set()  # names to check again after a writer is done
        self._removed: dict[Inode, Counter[bytes]] = {}  # removals by this mount whose events have not come yet
        self._lock_threads = trio.CapacityLimiter(LOCK_THREADS)
        self._nursery: trio.Nursery | None = None
        self.overflows = 0

    # -- directories ---------------------------------------------------------------------------------------------

    async def add(self, directory: Inode) -> None:
        """Watch a directory. Log a failure and go on."""
        watches = self.watches
        if not watches.accepting:
            return
        started = self._inodes.start()
        try:
            number, st = await self._backing.meta(watches.add_watch, directory)
        except OSError as error:
            watches.record_failure(directory, error)
            return
        if self._inodes.get(directory.number) is directory:
            watches.record_watch(number, directory)
            self._compare(directory, st, started, NO_EVENTS)  # it may have changed since the kernel learned of it
        elif not watches.is_watched(number):  # the inode was forgotten during the call
            watches.remove(number)

    def remove(self, directory: Inode) -> None:
        """Stop watching a directory that the kernel has forgotten."""
        self.watches.remove(directory.watch)

    def _forget_events(self, directory: Inode) -> None:
        self._pending.pop(directory, None)
        self._removed.pop(directory, None)

    def record_own_removal(self, directory: Inode, name: bytes) -> None:
        """Record that this mount removed a name, so that the event of the removal is ignored."""
        if directory.watch > 0:
            self._removed.setdefault(directory, Counter())[name] += 1

    # -- events --------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Read events and act on them until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            while True:
                events, lost = await self.watches.read()
                for directory, name, mask in events:
                    directory.listing = None  # it contains attributes too
                    self._request_check(directory, name, mask)
                if lost:
                    await self._recover_lost_events()
                await trio.sleep(READ_SECONDS)

    def _request_check(self, directory: Inode, name: bytes, mask: int) -> None:
        """Queue a name for a check, and start the task of its directory."""
        names = self._pending.setdefault(directory, {})
        before = names.get(name, NameEvents(0, 0, self.watches.since))
        names[name] = NameEvents(before.mask | mask, before.removals + bool(mask & NAME_REMOVED), before.since)
        if directory not in self._busy and self._nursery is not None:
            self._busy.add(directory)
            self._nursery.start_soon(self._check_directory, directory)

    async def _check_directory(self, directory: Inode) -> None:
        """Check the queued names of a directory until none is left."""
        try:
            while names := self._pending.pop(directory, None):
                todo = list(names.items())
                for start in range(0, len(todo), BATCH):
                    await self._check_names(directory, dict(todo[start : start + BATCH]))
                    await trio.lowlevel.checkpoint()
        finally:
            self._busy.discard(directory)

    async def _recover_lost_events(self) -> None:
        """Revalidate everything after events were lost.

        Only open files lose their content: a closed file is compared when it is opened. The kernel's negative entries
        are not known here; they expire with the negative time-out.
        """
        self.overflows += 1
        self._removed.clear()
        log.warning("too many changes at once: inotify events were lost; all open files and names are checked again")
        known = self._inodes.all()
        for count, inode in enumerate(known, 1):
            inode.listing = None
            self._inodes.expire(inode)
            if inode.opens:
                inode.file.drop_clean()
                self._inodes.observer.invalidate(inode)
            self._kernel.invalidate_attributes(inode.number)
            for directory, name in inode.locations:
                if directory.watch > 0:
                    self._request_check(directory, name, NAME_CHANGED | FILE_CHANGED & ~MODIFIED)
            if count % BATCH == 0:
                await trio.lowlevel.checkpoint()

    # -- one directory -------------------------------------------------------------------------------------------

    async def _check_names(self, directory: Inode, events: Mapping[bytes, NameEvents]) -> None:
        """Compare names with the backing: which files they lead to, and the attributes of these."""
        names_changed = any(item.mask & NAME_CHANGED for item in events.values())
        if names_changed:
            await self._wait_for_own_changes(directory)
        own = self._take_own_removals(directory, events)
        names = [name for name, item in events.items() if name not in own or item.mask & ~NAME_REMOVED]
        if not names:
            return
        started = self._inodes.start()
        try:
            found = await self._backing.meta(self._stat_all, directory, names)
        except OSError:  # the directory is gone or cannot be reached
            self._forget_attributes(directory)
            return
        if names_changed:
            await self._wait_for_own_changes(directory)  # own changes that the stats may contain
        removed = self._removed.get(directory, Counter())  # names whose event is still to come
        wrong: dict[bytes, os.stat_result | None] = {}
        for name, st in found.items():
            inode = directory if name == SELF else self._find_inode(st)
            if inode is not None and st is not None and not self._compare(inode, st, started, events[name]):
                self._recheck_after_writer(directory, name, inode)
            if name in removed or (st is None and name in own):
                continue
            if events[name].mask & NAME_CHANGED and (inode is None or (directory, name) not in inode.locations):
                wrong[name] = st
        if wrong:
            self._forget_attributes(directory)
            async with self._lock_threads:
                await self._backing.control(self._forget_names, directory, wrong)
            for name, st in wrong.items():
                inode = self._find_inode(st)
                if st is None or inode is None:
                    continue
                if st.st_nlink == 1 or stat.S_ISDIR(st.st_mode):  # moved: it has no other name
                    inode.locations.clear()
                inode.add_location(directory, name)

    async def _wait_for_own_changes(self, directory: Inode) -> None:
        """Wait until our own finished changes of a directory are in the inode table, by taking its lock."""
        async with self._lock_threads:
            await self._backing.control(self._kernel.invalidate_name, directory.number, b"/")

    def _take_own_removals(self, directory: Inode, events: Mapping[bytes, NameEvents]) -> set[bytes]:
        """Match removal events with recorded removals of our own; return the names that only we removed."""
        removed = self._removed.get(directory, Counter())
        own: set[bytes] = set()
        for name, item in events.items():
            ours = min(removed.get(name, 0), item.removals)
            if ours:
                removed[name] -= ours
                if not removed[name]:
                    del removed[name]
                if ours == item.removals:
                    own.add(name)
        return own

    def _stat_all(self, directory: Inode, names: Iterable[bytes]) -> dict[bytes, os.stat_result | None]:
        with self._descriptors.use(directory) as fd:
            return {name: os.fstat(fd) if name == SELF else _stat_or_none(fd, name) for name in names}

    def _find_inode(self, st: os.stat_result | None) -> Inode | None:
        """Return the inode of a stat; None if there is none, or if its number was reused for another file."""
        inode = self._inodes.find(st) if st is not None else None
        if st is None or inode is None or inode.unlinked:
            return None
        same = inode.attr is None or stat.S_IFMT(inode.attr.st_mode) == stat.S_IFMT(st.st_mode)
        return inode if same else None

    def _forget_names(self, directory: Inode, wrong: Mapping[bytes, os.stat_result | None]) -> None:
        """Invalidate names in the kernel (blocks), except those that changed again: another event follows."""
        with contextlib.suppress(OSError), self._descriptors.use(directory) as fd:
            for name, st in wrong.items():
                if _identity(_stat_or_none(fd, name)) == _identity(st):
                    self._kernel.invalidate_name(directory.number, name)

    # -- one inode -----------------------------------------------------------------------------------------------

    def _compare(self, inode: Inode, st: os.stat_result, started: int, events: NameEvents) -> bool:
        """Compare an inode with a stat after an event. Return False if a change of our own makes the stat useless."""
        if self._inodes.is_stale(inode, started):
            return False
        before = inode.attr
        if self._inodes.merge_stat(inode, st, started):
            return True
        if events.mask & MODIFIED and inode.touched_at < events.since:
            self._inodes.invalidate(inode)
        elif before is not None and _visible_attributes(before) != _visible_attributes(st):
            self._kernel.invalidate_attributes(inode.number)
        return True

    def _forget_attributes(self, inode: Inode) -> None:
        inode.listing = None
        self._inodes.expire(inode)
        self._kernel.invalidate_attributes(inode.number)

    def _recheck_after_writer(self, directory: Inode, name: bytes, inode: Inode) -> None:
        """Check a file again when its writer is done."""
        if (directory, name) not in self._rechecks and self._nursery is not None:
            self._rechecks.add((directory, name))
            self._nursery.start_soon(self._wait_for_writer, directory, name, inode)

    async def _wait_for_writer(self, directory: Inode, name: bytes, inode: Inode) -> None:
        async with inode.lock():
            pass
        await trio.sleep(READ_SECONDS)  # one stat per interval, not one per write
        self._rechecks.discard((directory, name))
        if directory.watch > 0:
            self._request_check(directory, name, FILE_CHANGED & ~MODIFIED)

    def check(self) -> None:
        """Raise AssertionError unless every directory with events has a task."""
        self.watches.check()
        assert set(self._pending) <= self._busy or self._nursery is None


def _stat_or_none(fd: int, name: bytes) -> os.stat_result | None:
    """Return a name's stat, None after any error: it is safe to invalidate a valid name."""
    try:
        return os.stat(name, dir_fd=fd, follow_symlinks=False)
    except OSError:
        return None


def _identity(st: os.stat_result | None) -> tuple[int, int] | None:
    return None if st is None else (st.st_dev, st.st_ino)


def _visible_attributes(st: os.stat_result) -> tuple[int, ...]:
    """Return the attributes to compare: all but the access time, which reading changes."""
    owner = (st.st_mode, st.st_nlink, st.st_uid, st.st_gid, st.st_rdev)
    return (*owner, st.st_size, st.st_mtime_ns, st.st_ctime_ns)
