"""The table of inodes that the kernel knows, and the detection of changes that others make to their files.

A node number is the backing's inode number wherever that is unique, so that `ls -i`, tar and git see the numbers of the
backing; otherwise it is a number of our own. An inode whose lookup count is zero is *retained* as long as pages of it
are cached, and found again by (device, inode number).

The version of a file is the part of its stat that `version_by` selects. Every stat that arrives is compared with the
recorded version; on a mismatch all clean pages are dropped. A change of our own records the stat taken just after it,
in the same thread call. Stats are taken in threads and overtake each other, so each carries the tick at which it
started: a stat older than the last one accepted, or than the last change of our own, is ignored.

Equal stats prove nothing for pages that were read while another change could still have left the same stamps
(`stamps.py`). A file with such pages is *provisional*: the next open drops its clean pages even if the stats are equal.
Opens within the grain therefore read again, and so does the first open after it; from then on the pages are trusted. A
change of our own makes the file provisional, too, because a change by others in the same grain would not be seen. The
exception are files that nobody else has changed yet, on devices that give every change after a stat its own stamp.
"""

from __future__ import annotations

import os
import stat
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import trio

from tmemfs.cache.file import Merge, Version
from tmemfs.cache.memory import Memory
from tmemfs.inodes.descriptors import Descriptors
from tmemfs.inodes.inode import Inode
from tmemfs.inodes.observer import InodeObserver
from tmemfs.inodes.stamps import SECOND, Stamps, grain_of

ROOT = 1
OWN_NUMBERS = 1 << 48  # from here on: numbers that the backing could not give uniquely


class InodeTable:
    """All inodes by node number and by (device, inode number)."""

    def __init__(
        self,
        root_fd: int,
        descriptors: Descriptors,
        memory: Memory,
        stamps: Stamps,
        observer: InodeObserver,
        *,
        version_by: str,
        attr_timeout: float,
    ) -> None:
        st = os.fstat(root_fd)
        self._stamps = stamps
        self._by_ctime = version_by == "all"  # else `size,mtime`
        self.descriptors = descriptors
        self._memory = memory
        self.attr_timeout = attr_timeout
        self._own_number = OWN_NUMBERS
        self.links_are_counted = st.st_nlink > 0  # some filesystems always report 0
        self.root = Inode(ROOT, (st.st_dev, st.st_ino), memory.new_file())
        self.root.lookups = 1
        self._by_number: dict[int, Inode] = {ROOT: self.root}
        self._by_key: dict[tuple[int, int], Inode] = {self.root.key: self.root}
        self._retained: OrderedDict[int, Inode] = OrderedDict()  # lookup count 0, but pages are cached
        self.tick = 0
        self._renamed: dict[int, set[Inode]] = {}  # the inodes of each change of names in progress
        self.invalidations = 0  # changes by others that were detected
        self.observer = observer
        self.watches_directories = observer.watches_directories
        descriptors.pin(self.root, root_fd)

    def __len__(self) -> int:
        return len(self._by_number)

    def get(self, number: int) -> Inode | None:
        """Return the inode with a node number, None without one."""
        return self._by_number.get(number)

    def find(self, st: os.stat_result) -> Inode | None:
        """Return the inode with the device and inode number of a stat, None without one."""
        return self._by_key.get((st.st_dev, st.st_ino))

    async def ensure_watched(self, directory: Inode) -> None:
        """Watch a directory (with --watch) before the kernel caches anything in it."""
        if self.watches_directories and not directory.watch:
            await self.observer.before_lookup(directory)

    def get_or_create(self, parent: Inode, name: bytes, st: os.stat_result, started: int) -> Inode:
        """Return the inode of a stat taken of a name, created if new; `started` is the tick before the stat."""
        key = (st.st_dev, st.st_ino)
        inode = self._by_key.get(key)
        if inode is not None and (inode.unlinked or not _same_type(inode, st)):
            inode = self._replace_reused(inode)
        if inode is None:
            inode = Inode(self._number_for(key), key, self._memory.new_file())
            self._by_key[key] = self._by_number[inode.number] = inode
        inode.add_location(parent, name)
        self.merge_stat(inode, st, started)
        return inode

    def get_or_create_if_linked(self, parent: Inode, name: bytes, st: os.stat_result, started: int) -> Inode | None:
        """Return the inode of a stat that a lookup or a listing took; None if we have removed its last name since.

        The inode number cannot belong to a new file by now: while the kernel knows an unlinked inode, a pinned
        descriptor keeps its number in use.
        """
        inode = self.find(st)
        if inode is not None and inode.unlinked and started < inode.file.change_seq and (inode.lookups or inode.opens):
            return None
        return self.get_or_create(parent, name, st, started)

    def _number_for(self, key: tuple[int, int]) -> int:
        device, number = key
        if device == self.root.key[0] and ROOT < number < OWN_NUMBERS and number not in self._by_number:
            return number
        self._own_number += 1
        return self._own_number

    def _replace_reused(self, old: Inode) -> Inode | None:
        """Replace the inode of a file that is gone, because the backing gave its inode number to a new file.

        Return the new inode: the node number stays the same, with the next generation. If the old file is still open
        (the backing should not have reused its number), return None: the new file gets a number of our own.
        """
        old.file.forget()
        self.touch(old)  # cached replies about it become invalid
        if old.opens:
            del self._by_key[old.key]
            return None
        new = Inode(old.number, old.key, self._memory.new_file())
        new.generation = old.generation + 1
        new.lookups = old.lookups
        self.descriptors.drop(old)
        self._retained.pop(old.number, None)
        self._by_key[new.key] = self._by_number[new.number] = new
        return new

    # -- versions ------------------------------------------------------------------------------------------------

    def _version(self, st: os.stat_result) -> Version:
        if self._by_ctime:
            return st.st_size, st.st_mtime_ns, st.st_ctime_ns, st.st_ino
        return st.st_size, st.st_mtime_ns

    def _newest(self, st: os.stat_result) -> int:
        """Return the newest time stamp of a version, in ns."""
        return max(st.st_mtime_ns, st.st_ctime_ns) if self._by_ctime else st.st_mtime_ns

    def merge_stat(self, inode: Inode, st: os.stat_result, started: int) -> bool:
        """Accept a stat, unless it is stale. Return whether it shows that others changed the file."""
        if self.is_stale(inode, started):
            return False
        file, newest = inode.file, self._newest(st)
        now, wall = trio.current_time(), time.time_ns()
        self._stamps.see(st.st_dev, newest, now, wall)
        if not stat.S_ISREG(st.st_mode):
            file.stat_seq = started
            self._keep(inode, st, now)
            return False
        known_size = file.size
        merge = file.merge_stat(self._version(st), st.st_size, started)
        if merge is Merge.CHANGED:
            self._record_change_by_others(inode, known_size)
        if merge is not Merge.SAME:
            file.settles_at = self._stamps.settles_at(st.st_dev, newest, now, wall)
        if not file.has_dirty:  # until the dirty pages are written back, size and times are ours
            self._keep(inode, st, now)
        return merge is Merge.CHANGED

    def merge_stat_at_open(self, inode: Inode, st: os.stat_result, started: int) -> None:
        """Accept the stat of an open: after it, no page is served from before a change that others made before it."""
        differs = self.changed_since_recorded(inode, st)
        if not self.merge_stat(inode, st, started) and (differs or inode.file.provisional):
            # If it differs but was outdated, a change of our own ended in between, before or after this stat.
            self.drop_clean_pages(inode)

    def is_stale(self, inode: Inode, started: int) -> bool:
        """Return whether a stat is outdated: a newer one is known, or a change of our own is in progress."""
        if inode.file.is_stale(started):
            return True
        return bool(self._renamed) and any(inode in involved for involved in self._renamed.values())

    @contextmanager
    def renaming(self) -> Iterator[set[Inode]]:
        """Yield a set that a change of names fills with the inodes whose names change; record them after the block.

        While an inode is in the set, its stats are ignored: a change of names changes its ctime. The thread that makes
        the change finds out which inodes these are, so `File.own_changes` cannot count them.
        """
        involved: set[Inode] = set()
        self._renamed[id(involved)] = involved
        try:
            yield involved
        finally:
            del self._renamed[id(involved)]

    def is_settled(self, st: os.stat_result, now: float, wall: int) -> bool:
        """Return whether any change after `now` will give a node other times than a stat taken at `now`."""
        newest = max(st.st_mtime_ns, st.st_ctime_ns)
        return self._stamps.tells_apart(st.st_dev) or self._stamps.settles_at(st.st_dev, newest, now, wall) <= now

    def invalidate(self, inode: Inode) -> None:
        """Drop the clean pages of a file that others changed, here and in the kernel."""
        known_size = inode.file.size
        self.drop_clean_pages(inode)
        self._record_change_by_others(inode, known_size)

    def _record_change_by_others(self, inode: Inode, known_size: int) -> None:
        """Record a change by others after which the clean pages were dropped; `known_size`: the size before it."""
        self.invalidations += 1
        inode.doubt_size(known_size)
        inode.forget_xattrs()
        inode.virtual = False
        inode.changed_by_others = True
        self.observer.invalidate(inode)

    def drop_clean_pages(self, inode: Inode) -> None:
        """Drop the clean pages of a file and everything else that was learned from reading it."""
        file = inode.file
        file.drop_clean()
        if file.true_size is not None and inode.attr is not None:
            file.true_size = None
            if not file.has_dirty:  # else the size is that of the writes since
                file.size = inode.attr.st_size
        file.provisional = False
        inode.forget_xattrs()

    def mark_virtual(self, inode: Inode) -> None:
        """Mark a file whose stat does not show its real size; reads find the size out again."""
        inode.virtual = True
        self.drop_clean_pages(inode)
        if inode.attr is not None and not inode.file.has_dirty:
            inode.file.size = inode.attr.st_size

    def begin_change(self, inode: Inode) -> int:
        """Begin a change of our own: stats are ignored until it ends. Return its tick."""
        inode.file.begin_change()
        return self.start()

    def end_change(self, inode: Inode) -> None:
        """End a change of our own, successful or not, and make all stats that are being taken outdated."""
        inode.file.end_change(self.start())
        inode.touched_at = trio.current_time()

    def record_own_change(self, inode: Inode, st: os.stat_result, started: int) -> None:
        """Record the stat that was taken just after a change of our own; `started` is the tick before the change.

        Changes of content and changes of names do not exclude each other. If another change ended in between, either
        stat may be the older one: the later ctime wins, and the attributes expire.
        """
        file, is_file = inode.file, stat.S_ISREG(st.st_mode)
        overtaken = file.change_seq > started
        newer = not overtaken or inode.attr is None or st.st_ctime_ns > inode.attr.st_ctime_ns
        self.touch(inode)
        file.record_own_change(self._version(st) if newer and is_file else None, file.stat_seq)
        if inode.attr is not None and self._by_ctime:
            self._stamps.compare(inode.key[0], inode.attr.st_ctime_ns, st.st_ctime_ns)
        if self._stamps.tells_apart(inode.key[0]) and not inode.changed_by_others:
            file.settles_at = 0.0
        elif is_file:
            file.settles_at = trio.current_time() + grain_of(self._newest(st)) / SECOND
            file.provisional = file.provisional or file.holds()
        if newer:
            self._keep(inode, st, trio.current_time())
        if overtaken:
            inode.attr_until = 0.0
        for parent, _ in inode.locations:
            parent.listing = None  # it may hold the old attributes
            self.touch(parent)  # so that a listing in progress is not kept

    def changed_since_recorded(self, inode: Inode, before: os.stat_result, *others: os.stat_result) -> bool:
        """Return whether others changed the file before our own change; `before` was taken just before that.

        `others`, for a change in several calls: the stats after the first call, before the second, and so on.
        """
        if inode.file.matches(self._version(before)):
            return any(self._version(a) != self._version(b) for a, b in zip(others[::2], others[1::2], strict=True))
        return True

    def _keep(self, inode: Inode, st: os.stat_result, now: float) -> None:
        inode.attr = st
        inode.attr_until = now + self.attr_timeout

    def expire(self, inode: Inode) -> None:
        """Expire the cached attributes."""
        inode.attr_until = 0.0
        self.touch(inode)

    def touch(self, inode: Inode) -> None:
        """Make all stats that are being taken outdated."""
        inode.file.stat_seq = self.start()
        inode.touched_at = trio.current_time()

    def start(self) -> int:
        """Return the tick for a stat that is about to be taken."""
        self.tick += 1
        return self.tick

    # -- lifetime ------------------------------------------------------------------------------------------------

    def record_unlink(self, inode: Inode, links_left: int) -> None:
        """Record that a name of the inode was removed and `links_left` links remain."""
        if links_left == 0:
            inode.unlinked = True
            inode.locations.clear()
            if inode.opens == 0:
                inode.file.forget()
                self.observer.orphaned(inode)

    def forget(self, number: int, count: int) -> None:
        """Subtract from the lookup count (FUSE_FORGET). At 0, remove the inode, or retain it if it has cached pages."""
        inode = self._by_number.get(number)
        if inode is None or number == ROOT:
            return
        inode.lookups -= count
        if inode.lookups > 0 or inode.opens:
            return
        if self._should_retain(inode):
            self._retained[number] = inode
            inode.listing = None
            self._check_oldest_retained()
        else:
            self._remove(inode)
        self.descriptors.drop(inode)

    def add_lookup(self, inode: Inode) -> None:
        """Count a reply that told the kernel of the inode."""
        if inode.lookups == 0:
            self._retained.pop(inode.number, None)
        inode.lookups += 1

    def _should_retain(self, inode: Inode) -> bool:
        return inode.file.holds() and not inode.unlinked

    def _check_oldest_retained(self) -> None:
        """Check the two inodes that were retained longest, and remove those without pages.

        Two checks for each new one: the table stays small, and nobody waits for a scan of all.
        """
        for _ in range(min(2, len(self._retained))):
            number, inode = self._retained.popitem(last=False)
            if self._should_retain(inode):
                self._retained[number] = inode
            else:
                self._remove(inode)

    def _remove(self, inode: Inode) -> None:
        inode.file.forget()
        if inode.watch > 0:
            self.observer.evicted(inode)
        self._retained.pop(inode.number, None)
        del self._by_number[inode.number]
        if self._by_key.get(inode.key) is inode:
            del self._by_key[inode.key]

    def all(self) -> Sequence[Inode]:
        """Return all inodes."""
        return list(self._by_number.values())

    def check(self) -> None:
        """Raise AssertionError unless both tables agree and retained inodes have a lookup count of zero."""
        for number, inode in self._by_number.items():
            assert inode.number == number
            assert inode.lookups >= 0
        for key, inode in self._by_key.items():
            assert inode.key == key
            assert self._by_number.get(inode.number) is inode
        for number, inode in self._retained.items():
            assert inode.lookups == 0
            assert self._by_number[number] is inode


def _same_type(inode: Inode, st: os.stat_result) -> bool:
    return inode.attr is None or stat.S_IFMT(inode.attr.st_mode) == stat.S_IFMT(st.st_mode)
