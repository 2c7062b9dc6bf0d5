"""Check that the names of an inode still lead to it, before it is opened: close-to-open for names.

The kernel believes a name for the entry time-out, and OPEN, OPENDIR and READLINK carry none. So all names that are
known of the inode, and those of the directories above it, are compared with what they lead to now, in the thread call
that opens. Where one of them leads elsewhere, it is forgotten and the answer is ESTALE: the kernel then walks the path
again and asks for each name in it (LOOKUP_REVAL), once.

What that second walk leads to must not be refused again, whatever happened meanwhile, since its ESTALE would reach the
caller: it may have come by a descriptor (/proc/self/fd/N), whose file needs no name, or others may replace the name
many times a second. So the thread that was answered ESTALE is remembered, each name that it looks up then is held by a
descriptor, and the inode that it comes back for is opened as it is.

Not checked: more than MAX_LOCATIONS names of one file. A file that has more is looked up again at every open, and so is
one of which a name was found wrong, as long as the kernel may believe that name.
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
from tmemfs.inodes.descriptors import Descriptors
from tmemfs.inodes.inode import MAX_LOCATIONS, Inode
from tmemfs.inodes.inodes import InodeTable

T = TypeVar("T")

RETRY_SECONDS = 2.0  # from an answer to the next request of a walk: at once, but on a busy machine
MAX_RETRIES = 1024  # threads that are remembered
MAX_DEPTH = 256  # of a path that is walked at once
# A link that others put there may lead into this mount, which would wait for us.
_without_links = libc.PathOpener(libc.RESOLVE_NO_SYMLINKS)
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)


class Name(NamedTuple):
    """A name of an inode in a directory."""

    inode: Inode
    parent: Inode
    name: bytes


class Stale(Exception):
    """Some names do not lead to their inodes any more, or no name of one of the inodes is known."""

    def __init__(self, wrong: list[Name]) -> None:
        super().__init__()
        self.wrong = wrong


class _Retry(NamedTuple):
    inode: Inode | None  # what the thread may open
    until: float


class Revalidator:
    """Check the names of one guest."""

    def __init__(self, backing: Backing, inodes: InodeTable, descriptors: Descriptors) -> None:
        self._backing = backing
        self._inodes = inodes
        self._descriptors = descriptors
        self._retries: OrderedDict[int, _Retry] = OrderedDict()  # by thread

    async def run(self, inode: Inode, thread: int, call: Callable[[], T], *, ends_walk: bool = True) -> T:
        """Run a call on the backing if the inode's names lead to it, checked in the same thread call.

        `thread` is who asks; `ends_walk`: what it asks for is what its path leads to. Raise ESTALE where the names do
        not, and OSError as the call does.
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
        """Tell whether the kernel may believe in names of a file that are not known here."""
        if trio.current_time() < inode.names_doubted_until:
            return True
        return len(inode.locations) == MAX_LOCATIONS and inode.attr is not None and inode.attr.st_nlink > MAX_LOCATIONS

    def _check(self, inode: Inode) -> None:
        """Compare names with what they lead to, of an inode and of all directories above it. Raise Stale.

        One walk of the whole path says for nearly all that they are right; else each is looked at.
        """
        locations = tuple(inode.locations)
        if locations and all(self._path_leads_to(parent, name, inode) for parent, name in locations):
            return
        wrong: list[Name] = []
        unreachable = False
        nodes, seen = [inode], {inode}
        for node in nodes:  # the list grows meanwhile
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
        """Tell whether the path from the root to a name leads to an inode; False too where that cannot be found out."""
        names = [name]
        while parent is not self._inodes.root:
            location = next(iter(parent.locations), None)
            if location is None or len(names) > MAX_DEPTH:  # after renames by others, names can lead in a circle
                return False
            parent, name = location
            names.append(name)
        with self._descriptors.use(parent) as root_fd:
            fd = _without_links.open(root_fd, b"/".join(reversed(names)))
        if fd < 0:
            return False
        try:
            return _is(os.fstat(fd), inode)
        finally:
            os.close(fd)

    def _leads_to(self, parent: Inode, name: bytes, inode: Inode) -> bool:
        """Tell whether a name leads to an inode; where the backing does not say, it is not known to be wrong."""
        try:
            with self._descriptors.use(parent) as fd:
                st = os.stat(name, dir_fd=fd, follow_symlinks=False)
        except OSError as error:
            return error.errno not in _GONE
        return _is(st, inode)

    def _forget(self, wrong: list[Name], started: int) -> None:
        """Forget names, except of inodes that we were changing: theirs may have been right again since."""
        for inode, parent, name in wrong:
            if self._inodes.is_worthless(inode, started):
                continue
            inode.remove_location(parent, name)
            parent.listing = None
            self._inodes.expire(inode)
            if inode.locations:
                inode.names_doubted_until = trio.current_time() + self._inodes.attr_timeout

    # -- the second walk -----------------------------------------------------------------------------------------

    def _refuse(self, inode: Inode, thread: int) -> OSError:
        """Remember who is told to look names up again, and return what says so."""
        self.record_second_lookup(thread, inode)
        return OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    def is_second_walk(self, thread: int) -> bool:
        """Tell whether what a thread looks up now is to be held until it opens it."""
        retry = self._retries.get(thread)
        if retry is None:
            return False
        if trio.current_time() < retry.until:
            return True
        del self._retries[thread]
        return False

    def record_second_lookup(self, thread: int, inode: Inode | None) -> None:
        """Take in what the second walk of a thread has led to by now; None: nowhere."""
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


def _is(st: os.stat_result, inode: Inode) -> bool:
    """Tell whether a stat is an inode's, and not of another that has got its number."""
    same_type = inode.attr is None or stat.S_IFMT(inode.attr.st_mode) == stat.S_IFMT(st.st_mode)
    return same_type and (st.st_dev, st.st_ino) == inode.key
