"""See at once what others change in the backing, for `--watch`: inotify on the directories that the kernel looks into.

A directory is watched before the first name in it is looked up or listed, so nothing that the kernel holds of it is
older than its watch. A directory that was only listed by its parent costs no watch, and only its own size and times
wait for the attribute time-out.

inotify tells of our own changes too. They are told apart by what the table knows: a change of our own was recorded
with its stat, so the stat that follows the event compares equal; somebody else's does not. Where stamps are coarse it
may, too. So a write that happened while none of ours was under way is somebody else's whatever the stats say; an event
is no older than the last moment at which there was none. Two races come with that:

- The event of our own create or rename may be read, and its result seen by a stat, before its maker has entered it
  into the table. The kernel holds the directory's lock until we have answered the maker, so before removals are told
  from others', and again before names are judged, a thread takes that lock once (by asking for a name that cannot
  exist to be forgotten). Rejected: remembering every name that is being changed, which every operation on names would
  have to take part in.
- A stat that was overtaken by a change of our own says nothing (InodeTable.observe). The event is used up by then, so
  the file is looked at again once its writer is done.

A name that leads elsewhere than the kernel believes is forgotten from a thread, and never without need: for a
directory in use, it makes getcwd(2) fail until somebody looks the name up again.

Each directory has a task of its own while it has events, so that one that hangs does not stop the others.

What inotify does not see, `--watch` does not: changes made on other clients of a network filesystem or on its server,
writes through a mapping before the file is closed, and writes through a hard link in a directory that nobody looked
into. These are seen as without `--watch`, at the next open.
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
from tmemfs.cache.content import Content
from tmemfs.inodes.descriptors import Descriptors
from tmemfs.inodes.inode import Inode
from tmemfs.inodes.inodes import InodeTable
from tmemfs.kernel.kernelcache import KernelCache
from tmemfs.watching.inotify import FILE_CHANGED, MODIFIED, NAME_CHANGED, NAME_REMOVED, SELF, Watches

log = logging.getLogger(__name__)

READ_SECONDS = 0.01  # seconds between two reads of events: a file that is being written costs one stat in that time
BATCH = 256  # names in one call on the backing
LOCK_THREADS = 4  # threads that may wait for the kernel's directory locks: half of those that Backing has for control


class NameEvents(NamedTuple):
    """What events told of a name: their kinds, how often it went, and when at the earliest they happened."""

    mask: int
    removals: int
    since: float


NO_EVENTS = NameEvents(0, 0, 0.0)


class Watch:
    """The watched directories of one guest, and what is done about events in them."""

    def __init__(
        self,
        inodes: InodeTable,
        descriptors: Descriptors,
        backing: Backing,
        content: Content,
        kernel: KernelCache,
    ) -> None:
        self._inodes = inodes
        self._descriptors = descriptors
        self._backing = backing
        self._content = content
        self._kernel = kernel
        self.watches = Watches(descriptors, self._forget_events)
        self._pending: dict[Inode, dict[bytes, NameEvents]] = {}  # by directory: names with events
        self._busy: set[Inode] = set()  # directories with a task
        self._rechecks: set[tuple[Inode, bytes]] = set()  # names to be looked at again after a writer
        self._removed: dict[Inode, Counter[bytes]] = {}  # by directory: removals through this mount without event yet
        self._lock_threads = trio.CapacityLimiter(LOCK_THREADS)
        self._nursery: trio.Nursery | None = None
        self.overflows = 0

    # -- directories ---------------------------------------------------------------------------------------------

    async def add(self, directory: Inode) -> None:
        """Watch a directory; without success, say why and go on."""
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
            self._compare(directory, st, started, NO_EVENTS)  # it may have changed since the kernel was told of it
        elif not watches.is_watched(number):  # forgotten meanwhile
            watches.remove(number)

    def remove(self, directory: Inode) -> None:
        """Stop watching a directory that the kernel has forgotten."""
        self.watches.remove(directory.watch)

    def _forget_events(self, directory: Inode) -> None:
        self._pending.pop(directory, None)
        self._removed.pop(directory, None)

    def record_own_removal(self, directory: Inode, name: bytes) -> None:
        """Take in that this mount removed a name: the event that will tell so is no events."""
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
                    directory.listing = None  # it holds attributes too
                    self._request_check(directory, name, mask)
                if lost:
                    await self._recover_lost_events()
                await trio.sleep(READ_SECONDS)

    def _request_check(self, directory: Inode, name: bytes, mask: int) -> None:
        """Have a name of a directory looked at."""
        names = self._pending.setdefault(directory, {})
        before = names.get(name, NameEvents(0, 0, self.watches.since))
        names[name] = NameEvents(before.mask | mask, before.removals + bool(mask & NAME_REMOVED), before.since)
        if directory not in self._busy and self._nursery is not None:
            self._busy.add(directory)
            self._nursery.start_soon(self._check_directory, directory)

    async def _check_directory(self, directory: Inode) -> None:
        """Look at the names of a directory until no more come."""
        try:
            while names := self._pending.pop(directory, None):
                todo = list(names.items())
                for start in range(0, len(todo), BATCH):
                    await self._check_names(directory, dict(todo[start : start + BATCH]))
                    await trio.lowlevel.checkpoint()
        finally:
            self._busy.discard(directory)

    async def _recover_lost_events(self) -> None:
        """Make up for lost events: anything may have changed.

        Only open files are read without a comparison, so only theirs is the content that must go; a closed one is
        compared when it is opened. Names that did not exist are not known here: they wait for the negative time-out.
        """
        self.overflows += 1
        self._removed.clear()
        log.warning("too many changes at once: events were lost; open files are read anew, all names looked at again")
        known = self._inodes.all()
        for count, inode in enumerate(known, 1):
            inode.listing = None
            self._inodes.expire(inode)
            if inode.opens:
                self._content.renew(inode)
                self._inodes.observer.invalidate(inode)
            self._kernel.invalidate_attributes(inode.number)
            for directory, name in inode.locations:
                if directory.watch > 0:
                    self._request_check(directory, name, NAME_CHANGED | FILE_CHANGED & ~MODIFIED)
            if count % BATCH == 0:
                await trio.lowlevel.checkpoint()

    # -- one directory -------------------------------------------------------------------------------------------

    async def _check_names(self, directory: Inode, events: Mapping[bytes, NameEvents]) -> None:
        """Compare what names lead to with what is known of them."""
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
        except OSError:  # the directory itself is gone or out of reach
            self._forget_attributes(directory)
            return
        if names_changed:
            await self._wait_for_own_changes(directory)  # those that the stats have seen
        removed = self._removed.get(directory, Counter())  # of these, an event is under way
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
                if st.st_nlink == 1 or stat.S_ISDIR(st.st_mode):  # it was moved: this is its only name
                    inode.locations.clear()
                inode.add_location(directory, name)

    async def _wait_for_own_changes(self, directory: Inode) -> None:
        """Wait until what this mount has changed of a directory's names by now is in the table."""
        async with self._lock_threads:
            await self._backing.control(self._kernel.invalidate_name, directory.number, b"/")

    def _take_own_removals(self, directory: Inode, events: Mapping[bytes, NameEvents]) -> set[bytes]:
        """Use up the removals of our own that events tell of; return the names that nobody else removed."""
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
        """Return the inode of a stat, unless it is one that is gone and whose number has been given away again."""
        inode = self._inodes.find(st) if st is not None else None
        if st is None or inode is None or inode.unlinked:
            return None
        same = inode.attr is None or stat.S_IFMT(inode.attr.st_mode) == stat.S_IFMT(st.st_mode)
        return inode if same else None

    def _forget_names(self, directory: Inode, wrong: Mapping[bytes, os.stat_result | None]) -> None:
        """Have the kernel forget names (in a thread), except those that changed again: their event is under way."""
        with contextlib.suppress(OSError), self._descriptors.use(directory) as fd:
            for name, st in wrong.items():
                if _identity(_stat_or_none(fd, name)) == _identity(st):
                    self._kernel.invalidate_name(directory.number, name)

    # -- one inode -----------------------------------------------------------------------------------------------

    def _compare(self, inode: Inode, st: os.stat_result, started: int, events: NameEvents) -> bool:
        """Take in a stat that followed an event; False when a change of our own makes it worthless."""
        if self._inodes.is_worthless(inode, started):
            return False
        before = inode.attr
        if self._inodes.observe(inode, st, started):
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
        """Look at a file again when its writer is done."""
        if (directory, name) not in self._rechecks and self._nursery is not None:
            self._rechecks.add((directory, name))
            self._nursery.start_soon(self._wait_for_writer, directory, name, inode)

    async def _wait_for_writer(self, directory: Inode, name: bytes, inode: Inode) -> None:
        async with inode.lock():
            pass
        await trio.sleep(READ_SECONDS)  # a busy writer is not to cost a stat for every write
        self._rechecks.discard((directory, name))
        if directory.watch > 0:
            self._request_check(directory, name, FILE_CHANGED & ~MODIFIED)

    def check(self) -> None:
        """Raise AssertionError unless every directory with events has a task."""
        self.watches.check()
        assert set(self._pending) <= self._busy or self._nursery is None


def _stat_or_none(fd: int, name: bytes) -> os.stat_result | None:
    """Return a name's stat; None where there is none to be had (to forget a name too many is safe)."""
    try:
        return os.stat(name, dir_fd=fd, follow_symlinks=False)
    except OSError:
        return None


def _identity(st: os.stat_result | None) -> tuple[int, int] | None:
    return None if st is None else (st.st_dev, st.st_ino)


def _visible_attributes(st: os.stat_result) -> tuple[int, ...]:
    """Return what users see of attributes, without the time of the last access: reading is no change."""
    owner = (st.st_mode, st.st_nlink, st.st_uid, st.st_gid, st.st_rdev)
    return (*owner, st.st_size, st.st_mtime_ns, st.st_ctime_ns)
