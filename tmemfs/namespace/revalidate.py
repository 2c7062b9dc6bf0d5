"""Check at an open that the names of an inode still lead to it: close-to-open consistency for names.

The kernel caches a name for the entry time-out, and OPEN, OPENDIR and READLINK carry no name. So all known names of the
inode, and those of the directories above it, are compared with the backing in the thread call that opens. A name that
leads elsewhere is forgotten, and the answer is ESTALE. The kernel then walks the path once more and looks up each name
in it (LOOKUP_REVAL).

A second ESTALE would reach the caller, so the open after the second walk must succeed, even in two cases: the file is
opened through a descriptor (/proc/self/fd/N) and has no name, or others replace the name many times a second. So the
thread that got ESTALE is remembered. Each inode that it looks up then keeps an open descriptor, and the inode that it
opens at the end is not checked.

Not checked: more than MAX_LOCATIONS names of one file. A file with more names is looked up again at every open. So is a
file with a wrong name, until the kernel's copy of that name has expired.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import trio

from tmemcommon import libc
from tmemfs.backing import Backing
from tmemfs.inodes.inode import MAX_LOCATIONS, Inode
from tmemfs.inodes.inodes import InodeTable

T = TypeVar("T")

RETRY_SECONDS = 2.0  # from one request of the second walk to the next; more than a busy machine needs
MAX_RETRIES = 1024  # threads remembered
MAX_DEPTH = 256  # of a path that one openat2 call walks
# Links are not followed: one that leads into this mount would make us wait for ourselves.
_without_links = libc.PathOpener(libc.RESOLVE_NO_SYMLINKS)
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)


class Name(NamedTuple):
    """A name of an inode in a directory."""

    inode: Inode
    parent: Inode
    name: bytes


class Stale(Exception):
    """Some names do not lead to their inodes any more, or an inode on the path has no known name."""

    def __init__(self, wrong: list[Name]) -> None:
        super().__init__()
        self.wrong = wrong


class _Retry(NamedTuple):
    inode: Inode | None  # may be opened without a check
    until: float


class Revalidator:
    """The checks of names of one guest."""

    def __init__(self, backing: Backing, inodes: InodeTable) -> None:
        self._backing = backing
        self._inodes = inodes
        self._descriptors = inodes.descriptors
        self._retries: OrderedDict[int, _Retry] = OrderedDict()  # by thread

    async def run(self, inode: Inode, thread: int, call: Callable[[], T], *, ends_walk: bool = True) -> T:
        """Run a call on the backing if the known names of the inode lead to it; checked in the same thread call.

        `thread` is the caller's thread id. `ends_walk` is False for readlink, after which the path walk may go on.
        ESTALE if a name does not lead to the inode; OSError as the call raises it.
        """
        if inode.unlinked or self._is_retry(inode, thread, ends_walk):
            return await self._backing.meta(call)
        if self._is_in_doubt(inode):
            raise self._refuse(inode, thread)

        def checked() -> T:
            self._check(inode)
            return call()

        started = self._inodes.start()
        try:
            return await self._backing.meta(checked)
        except Stale as stale:
            self._forget(stale.wrong, started)
            raise self._refuse(inode, thread) from None

    def _is_in_doubt(self, inode: Inode) -> bool:
        """Return whether the kernel may have cached names of the file that are not known here."""
        if trio.current_time() < inode.names_doubted_until:
            return True
        return len(inode.locations) == MAX_LOCATIONS and inode.attr is not None and inode.attr.st_nlink > MAX_LOCATIONS

    def _check(self, inode: Inode) -> None:
        """Compare the names of an inode, and of all directories above it, with the backing. Raise Stale.

        One walk of the whole path is enough if all names are right. Otherwise each name is checked to find the wrong.
        """
        locations = tuple(inode.locations)
        if locations and all(self._path_leads_to(parent, name, inode) for parent, name in locations):
            return
        wrong: list[Name] = []
        unreachable = False
        nodes, seen = [inode], {inode}
        for node in nodes:  # which grows in the loop
            locations = tuple(node.locations)
            unreachable |= not locations and node is not self._inodes.root
            for parent, name in locations:
                if not self._leads_to(parent, name, node):
                    wrong.append(Name(node, parent, name))
                if parent not in seen:
                    seen.add(parent)
                    nodes.append(parent)
        if wrong or unreachable:
            raise Stale(wrong)

    def _path_leads_to(self, parent: Inode, name: bytes, inode: Inode) -> bool:
        """Return whether the path from the root to a name leads to an inode; False also if that cannot be checked."""
        names = [name]
        while parent is not self._inodes.root:
            location = next(iter(parent.locations), None)
            if location is None or len(names) > MAX_DEPTH:  # renames by others can make a cycle
                return False
            parent, name = location
            names.append(name)
        with self._descriptors.use(parent) as root_fd:
            fd = _without_links.open(root_fd, b"/".join(reversed(names)))
        if fd < 0:
            return False
        try:
            return _matches(os.fstat(fd), inode)
        finally:
            os.close(fd)

    def _leads_to(self, parent: Inode, name: bytes, inode: Inode) -> bool:
        """Return whether a name leads to an inode; True also if the backing fails."""
        try:
            with self._descriptors.use(parent) as fd:
                st = os.stat(name, dir_fd=fd, follow_symlinks=False)
        except OSError as error:
            return error.errno not in _GONE
        return _matches(st, inode)

    def _forget(self, wrong: list[Name], started: int) -> None:
        """Forget wrong names, except of inodes that we have changed since: the name may be right again."""
        for inode, parent, name in wrong:
            if self._inodes.is_stale(inode, started):
                continue
            inode.remove_location(parent, name)
            parent.listing = None
            self._inodes.expire(inode)
            if inode.locations:
                inode.names_doubted_until = trio.current_time() + self._inodes.attr_timeout

    # -- the second walk -----------------------------------------------------------------------------------------

    def _refuse(self, inode: Inode, thread: int) -> OSError:
        """Return the ESTALE that starts the second walk of a thread, and remember the thread."""
        self.record_second_lookup(thread, inode)
        return OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    def is_second_walk(self, thread: int) -> bool:
        """Return whether a thread is in the second walk: each inode that it looks up must keep an open descriptor."""
        retry = self._retries.get(thread)
        if retry is None:
            return False
        if trio.current_time() < retry.until:
            return True
        del self._retries[thread]
        return False

    def record_second_lookup(self, thread: int, inode: Inode | None) -> None:
        """Record the inode that the second walk of a thread has reached; None if a name did not exist."""
        self._retries[thread] = _Retry(inode, trio.current_time() + RETRY_SECONDS)
        self._retries.move_to_end(thread)
        if len(self._retries) > MAX_RETRIES:
            self._retries.popitem(last=False)

    def _is_retry(self, inode: Inode, thread: int, ends_walk: bool) -> bool:
        if not self._retries or not self.is_second_walk(thread):
            return False
        allowed = self._retries[thread].inode is inode
        if ends_walk:
            del self._retries[thread]
        return allowed


def _matches(st: os.stat_result, inode: Inode) -> bool:
    """Return whether a stat belongs to an inode, and not to a new file of another type with the same number."""
    same_type = inode.attr is None or stat.S_IFMT(inode.attr.st_mode) == stat.S_IFMT(st.st_mode)
    return same_type and (st.st_dev, st.st_ino) == inode.key
