"""Know the inodes that the kernel knows, and whether their files changed underneath.

A node number is the backing's inode number wherever that is unique (so that `ls -i`, tar and git see what they would
see on the backing), else one of our own. An inode outlives the kernel's interest as long as pages of it are cached:
it is parked, and found again by (device, inode number).

The version of a file is what `version_by` selects of its stat. Every stat that arrives is compared with the recorded
version; on a mismatch all clean pages go. Changes of our own are recorded by whoever makes them, with a stat taken in
the same thread call. Stats overtake each other on their way through threads and listings, so each carries the tick of
its start: one that is older than the last change of our own, or than the last stat taken in, says nothing.

Equal stats prove nothing for pages that were read while another change could have left the same stamps (`stamps.py`).
A file with such pages is *provisional*: the next open drops its clean pages whatever the stats say. So each open within
the grain reads anew, the first one after it does so once more, and then the pages are as good as any. Pages that a
change of our own leaves behind are provisional too, as somebody else's change in the same grain would not be seen,
unless the device gives every change that follows a look a stamp of its own and nobody else has changed the file yet.
"""

from __future__ import annotations

import os
import stat
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager

import trio

from tmemfs.cache.content import Content
from tmemfs.inodes.descriptors import Descriptors
from tmemfs.inodes.inode import Inode
from tmemfs.inodes.stamps import SECOND, Stamps, grain_of
from tmemfs.inodes.versions import newest_of, version_of

ROOT = 1
OWN_NUMBERS = 1 << 48  # from here on: numbers that the backing could not give uniquely


class InodeTable:
    """All inodes by node number and by (device, inode number)."""

    def __init__(
        self,
        root_fd: int,
        descriptors: Descriptors,
        content: Content,
        stamps: Stamps,
        *,
        version_by: str,
        attr_timeout: float,
    ) -> None:
        st = os.fstat(root_fd)
        self._stamps = stamps
        self._newest = newest_of(version_by)
        self._stable_ctimes = version_by == "all"
        self._descriptors = descriptors
        self._content = content
        self._version = version_of(version_by)
        self.attr_timeout = attr_timeout
        self._own_number = OWN_NUMBERS
        self.links_are_counted = st.st_nlink > 0  # there are filesystems that tell of none
        self.root = Inode(ROOT, (st.st_dev, st.st_ino))
        self.root.lookups = 1
        self._by_number: dict[int, Inode] = {ROOT: self.root}
        self._by_key: dict[tuple[int, int], Inode] = {self.root.key: self.root}
        self._retained: OrderedDict[int, Inode] = OrderedDict()
        self.tick = 0
        self._renamed: dict[int, set[Inode]] = {}  # by change of names under way
        self.invalidations = 0  # mismatches: files that others changed
        self.on_mismatch: Callable[[Inode], None] = lambda inode: None
        self.on_first_look: Callable[[Inode], Awaitable[None]] | None = None
        self.on_removed: Callable[[Inode], None] = lambda inode: None  # of watched directories
        self.on_gone: Callable[[Inode], None] = lambda inode: None  # neither a name nor a user is left
        self.on_name_removed: Callable[[Inode, bytes], None] = lambda directory, name: None  # by this mount
        descriptors.pin(self.root, root_fd)

    def __len__(self) -> int:
        return len(self._by_number)

    def get(self, number: int) -> Inode | None:
        """Return the inode with a node number."""
        return self._by_number.get(number)

    def find(self, st: os.stat_result) -> Inode | None:
        """Return the inode that a stat is of, if it is known."""
        return self._by_key.get((st.st_dev, st.st_ino))

    async def ensure_watched(self, directory: Inode) -> None:
        """Have a directory watched before the kernel learns of anything in it."""
        if self.on_first_look is not None and not directory.watch:
            await self.on_first_look(directory)

    def get_or_create(self, parent: Inode, name: bytes, st: os.stat_result, started: int) -> Inode:
        """Return the inode of a stat taken under a name, made if it is new; `started` is the tick before the stat."""
        key = (st.st_dev, st.st_ino)
        inode = self._by_key.get(key)
        if inode is not None and (inode.unlinked or not _same_type(inode, st)):
            inode = self._replace_reused(inode)
        if inode is None:
            inode = Inode(self._number_for(key), key)
            self._by_key[key] = self._by_number[inode.number] = inode
        inode.add_location(parent, name)
        self.observe(inode, st, started)
        return inode

    def get_or_create_if_linked(self, parent: Inode, name: bytes, st: os.stat_result, started: int) -> Inode | None:
        """Return the inode of a stat taken under a name that was found; None where we have removed its last since.

        A descriptor is held of whoever is known and lost its last name, so no new file has its number.
        """
        inode = self.find(st)
        if inode is not None and inode.unlinked and started < inode.recorded_at and (inode.lookups or inode.opens):
            return None
        return self.get_or_create(parent, name, st, started)

    def _number_for(self, key: tuple[int, int]) -> int:
        device, number = key
        if device == self.root.key[0] and ROOT < number < OWN_NUMBERS and number not in self._by_number:
            return number
        self._own_number += 1
        return self._own_number

    def _replace_reused(self, old: Inode) -> Inode | None:
        """Make room for a new file that got the inode number of one that is gone.

        The number stays the backing's, told apart by its generation; only where somebody still has the old one open
        (the backing should not have given its number away) the new one gets a number of its own.
        """
        self._content.forget(old)
        self.touch(old)  # what was said about it is not said again
        if old.opens:
            del self._by_key[old.key]
            return None
        new = Inode(old.number, old.key)
        new.generation = old.generation + 1
        new.lookups = old.lookups
        self._descriptors.drop(old)
        self._retained.pop(old.number, None)
        self._by_key[new.key] = self._by_number[new.number] = new
        return new

    # -- versions ------------------------------------------------------------------------------------------------

    def observe(self, inode: Inode, st: os.stat_result, started: int) -> bool:
        """Take in a stat; return True when somebody else changed the file."""
        if self.is_worthless(inode, started):
            return False
        inode.seen_at = started
        changed = False
        now, wall = trio.current_time(), time.time_ns()
        self._stamps.see(st.st_dev, self._newest(st), now, wall)
        if stat.S_ISREG(st.st_mode):
            changed = self.changed_since_recorded(inode, st)
            if changed:
                self.invalidate(inode)
            if changed or inode.version is None:
                inode.version, inode.true_size = self._version(st), None
                inode.settles_at = self._stamps.settles_at(st.st_dev, self._newest(st), now, wall)
            if inode.dirty:
                return changed  # size and times are ours until the dirty pages are written back
            inode.size = st.st_size if inode.true_size is None else inode.true_size
        self._keep(inode, st, now)
        return changed

    def observe_at_open(self, inode: Inode, st: os.stat_result, started: int) -> None:
        """Take in the stat of an open: what others changed before is not read from memory after it."""
        differs = self.changed_since_recorded(inode, st)
        if not self.observe(inode, st, started) and (differs or inode.provisional):
            self.drop_clean_pages(
                inode
            )  # where it differs and says nothing, a change of ours ended meanwhile, before or after it

    def is_worthless(self, inode: Inode, started: int) -> bool:
        """Tell whether a stat says nothing: older than what is known, or a change of our own is under way."""
        if inode.writers or started < inode.seen_at:
            return True
        return bool(self._renamed) and any(inode in involved for involved in self._renamed.values())

    @contextmanager
    def renaming(self) -> Iterator[set[Inode]]:
        """Yield a set for the inodes whose names, and with them ctimes, change; to be recorded right after the block.

        A thread finds out which they are, just before the change, so this is no matter of `writers`.
        """
        involved: set[Inode] = set()
        self._renamed[id(involved)] = involved
        try:
            yield involved
        finally:
            del self._renamed[id(involved)]

    def is_settled(self, st: os.stat_result, now: float, wall: int) -> bool:
        """Tell whether every change after `now` gives a node other times than those of a stat that was taken then."""
        newest = max(st.st_mtime_ns, st.st_ctime_ns)
        return self._stamps.tells_apart(st.st_dev) or self._stamps.settles_at(st.st_dev, newest, now, wall) <= now

    def invalidate(self, inode: Inode) -> None:
        """Drop the clean pages of a file that somebody else changed, here and in the kernel."""
        self.invalidations += 1
        inode.doubt_size()
        self.drop_clean_pages(inode)
        inode.virtual = False
        inode.changed_by_others = True
        self.on_mismatch(inode)

    def drop_clean_pages(self, inode: Inode) -> None:
        """Drop the clean pages of a file, and what else was learned by reading it."""
        self._content.renew(inode)
        if inode.true_size is not None and inode.attr is not None:
            inode.true_size = None
            if not inode.dirty:  # else the size is that of what has been written since
                inode.size = inode.attr.st_size
        inode.provisional = False
        inode.no_capability_xattr = False
        inode.absent_xattrs = ()

    def mark_virtual(self, inode: Inode) -> None:
        """Take in that a file's size is not what the stat shows: reads find out again what it has."""
        inode.virtual = True
        self.drop_clean_pages(inode)
        if inode.attr is not None and not inode.dirty:
            inode.size = inode.attr.st_size

    def record(self, inode: Inode, st: os.stat_result, started: int) -> None:
        """Take in the stat that a change of our own, begun at tick `started`, has left behind.

        Changes of content and changes of names do not wait for each other. Where another one ended meanwhile, either
        stat may be the older: the later ctime is believed, and attributes are asked for anew.
        """
        overtaken = inode.recorded_at > started
        self.touch(inode)
        inode.recorded_at = inode.seen_at
        if inode.attr is not None and self._stable_ctimes:
            self._stamps.compare(inode.key[0], inode.attr.st_ctime_ns, st.st_ctime_ns)
        if self._stamps.tells_apart(inode.key[0]) and not inode.changed_by_others:
            inode.settles_at = 0.0
        elif stat.S_ISREG(st.st_mode):
            inode.settles_at = trio.current_time() + grain_of(self._newest(st)) / SECOND
            inode.provisional = inode.provisional or self._content.holds(inode)
        if not overtaken or inode.attr is None or st.st_ctime_ns > inode.attr.st_ctime_ns:
            if stat.S_ISREG(st.st_mode):
                inode.version, inode.true_size = self._version(st), None
                if not inode.dirty and not inode.writers:  # else this is a change of names, and its stat may be older
                    inode.size = st.st_size
            self._keep(inode, st, trio.current_time())
        if overtaken:
            inode.attr_until = 0.0
        for parent, _ in inode.locations:
            parent.listing = None  # it may hold the old attributes, and one that is being made too
            self.touch(parent)

    def changed_since_recorded(self, inode: Inode, before: os.stat_result, *others: os.stat_result) -> bool:
        """Tell whether somebody else changed the file before our own change, by the stat taken just before it.

        `others`: of a change in several calls, the stats after the first, before the second, and so on.
        """
        if inode.version is None or inode.version == self._version(before):
            return any(self._version(a) != self._version(b) for a, b in zip(others[::2], others[1::2], strict=True))
        return True

    def _keep(self, inode: Inode, st: os.stat_result, now: float) -> None:
        inode.attr = st
        inode.attr_until = now + self.attr_timeout

    def expire(self, inode: Inode) -> None:
        """Do not answer from the cached attributes any more."""
        inode.attr_until = 0.0
        self.touch(inode)

    def touch(self, inode: Inode) -> None:
        """Make stats that are under way too old to be taken in."""
        inode.seen_at = self.start()
        inode.touched_at = trio.current_time()

    def start(self) -> int:
        """Return the tick that a stat which is about to be taken carries."""
        self.tick += 1
        return self.tick

    # -- lifetime ------------------------------------------------------------------------------------------------

    def record_unlink(self, inode: Inode, survivors: int) -> None:
        """Take in that a name of the inode went and `survivors` links are left."""
        if survivors == 0:
            inode.unlinked = True
            inode.locations.clear()
            if inode.opens == 0:
                self._content.forget(inode)
                self.on_gone(inode)

    def forget(self, number: int, count: int) -> None:
        """Follow the kernel's FORGET; an inode with cached pages is parked, others go."""
        inode = self._by_number.get(number)
        if inode is None or number == ROOT:
            return
        inode.lookups -= count
        if inode.lookups > 0 or inode.opens:
            return
        if self._should_retain(inode):
            self._retained[number] = inode
            inode.listing = None
            self._drop_oldest_retained()
        else:
            self._remove(inode)
        self._descriptors.drop(inode)

    def add_lookup(self, inode: Inode) -> None:
        """Count that the kernel was told of the inode."""
        if inode.lookups == 0:
            self._retained.pop(inode.number, None)
        inode.lookups += 1

    def _should_retain(self, inode: Inode) -> bool:
        return self._content.holds(inode) and not inode.unlinked

    def _drop_oldest_retained(self) -> None:
        """Look at the two inodes parked longest ago, and remove those whose pages have all gone.

        Two for each that comes: so they do not pile up, and nobody waits for a walk over all of them.
        """
        for _ in range(min(2, len(self._retained))):
            number, inode = self._retained.popitem(last=False)
            if self._should_retain(inode):
                self._retained[number] = inode
            else:
                self._remove(inode)

    def _remove(self, inode: Inode) -> None:
        self._content.forget(inode)
        if inode.watch > 0:
            self.on_removed(inode)
        self._retained.pop(inode.number, None)
        del self._by_number[inode.number]
        if self._by_key.get(inode.key) is inode:
            del self._by_key[inode.key]

    def all(self) -> Sequence[Inode]:
        """Return all inodes."""
        return list(self._by_number.values())

    def check(self) -> None:
        """Raise AssertionError unless the two tables agree and parked inodes are forgotten ones."""
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
