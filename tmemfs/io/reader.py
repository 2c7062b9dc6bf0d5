"""Read: cache, victim queue, precache, backing, in this order.

`hit` answers from the cache, or a single page from the pool, and is the path that matters: one lookup a page, no copy
where the frames of a request lie side by side (they do after a sequential fill), a copy a run where they do not. What
it returns is valid until the next await; pyfuse3 replies before it awaits.

`read` is for everything else. Scanning the pages of a request is one stretch without an await: a page is counted
once, as a hit, a succ_get, a wait or a backing page. After each await, the world is looked at anew: a fill may have
failed, been poisoned, or come back short because the file shrank underneath.
"""

from __future__ import annotations

from typing import cast

import trio

from tmemfs.backing import Backing
from tmemfs.cache.content import Content, Fill
from tmemfs.cache.pagecache import PAGE_SHIFT, PAGE_SIZE, USED
from tmemfs.inodes.inode import Inode
from tmemfs.inodes.inodes import InodeTable
from tmemfs.io.files import OpenFile
from tmemfs.io.filler import Filler

_OFFSET = PAGE_SIZE - 1
Run = tuple[int, int]


class Reader:
    """The read path of one guest."""

    def __init__(self, content: Content, backing: Backing, inodes: InodeTable) -> None:
        self._content = content
        self._cache = content.cache
        self._precache = content.precache
        self._backing = backing
        self._filler = Filler(content, backing, inodes)
        self._ref = content.cache.ref
        self._passing = content.cache.passing
        self._unread = content.cache.unread
        self._view = content.cache.view
        # One request's pages: a fresh buffer of 1 MiB for each would cost more in page faults than the copy does.
        self._scratch = memoryview(bytearray(_SCRATCH_PAGES << PAGE_SHIFT))
        self._nursery: trio.Nursery | None = None  # of read-ahead; there is none before `run`
        self.hits = 0  # pages that were in the cache
        self.readahead_hits = 0  # those of them that were read ahead and asked for the first time
        self.misses = 0  # pages that were not in the cache, wherever they came from
        self.waits = 0

    # -- the hit path --------------------------------------------------------------------------------------------

    def hit(self, file: OpenFile, offset: int, size: int) -> memoryview | None:
        """Answer a read from the cache, or of one page from the pool; None when it takes more than that."""
        inode = file.inode
        end = offset + size
        if end > inode.size:  # to the end of the file and, while its size is known for sure, no further
            if offset >= inode.size or trio.current_time() >= inode.attr_until:
                return None
            end = inode.size
            size = end - offset
        first, last = offset >> PAGE_SHIFT, (end - 1) >> PAGE_SHIFT
        stream = file.stream
        if first == last:
            frame = inode.pages.get(first)
            if frame is None:
                return self._exchange(file, first, offset & _OFFSET, size)
            self._ref[frame] = USED
            if not stream.is_sequential(first):
                self._passing[frame] = 0  # used apart from the stream that brought it
            self.hits += 1
            if self._unread[frame]:
                self._unread[frame] = 0
                self.readahead_hits += 1
            start = (frame << PAGE_SHIFT) + (offset & _OFFSET)
            data = self._view[start : start + size]
        else:
            found = self._gather(inode, first, last, offset & _OFFSET, size)
            if found is None:
                return None
            data = found
        if last >= stream.marker:
            self._read_ahead(file, first)
        stream.next_page = last + 1
        return data

    def _gather(self, inode: Inode, first: int, last: int, skip: int, size: int) -> memoryview | None:
        """Collect several pages from the cache; None unless all are there."""
        count = last - first + 1
        frames = list(map(inode.pages.get, range(first, last + 1)))
        base = frames[0]
        if base is None:
            return None
        if frames == list(range(base, base + count)):
            self._use(base, count)
            self.hits += count
            start = (base << PAGE_SHIFT) + skip
            return self._view[start : start + size]
        if None in frames:
            return None
        self.hits += count
        return self._join(cast("list[int]", frames))[skip : skip + size]

    def _exchange(self, file: OpenFile, index: int, skip: int, size: int) -> memoryview | None:
        """Answer a read within one page from the pool; None when it is not there (nothing is counted then).

        Not in `read`: that costs 15 µs more, of the 25 that a page in the pool may cost beyond one in the cache.
        """
        inode, stream = file.inode, file.stream
        if index in inode.fills or not self._precache.holds(inode, index):
            return None
        page = self._precache.get(inode, index)
        if page is None:
            return None  # its checksum was wrong
        self.misses += 1
        self._precache.accept(inode, index, page)
        if index >= stream.marker:
            self._read_ahead(file, index)
        stream.next_page = index + 1
        return memoryview(page)[skip : skip + size]

    def _join(self, frames: list[int]) -> memoryview:
        """Copy frames, a run of neighbours at a time, into a buffer that is used again and again."""
        size, view, ref, unread = len(frames) << PAGE_SHIFT, self._view, self._ref, self._unread
        out = self._scratch if size <= len(self._scratch) else memoryview(bytearray(size))
        done, base, end = 0, frames[0], frames[0]
        for frame in frames:
            ref[frame] = USED
            if unread[frame]:
                unread[frame] = 0
                self.readahead_hits += 1
            if frame != end:
                stop = done + ((end - base) << PAGE_SHIFT)
                out[done:stop] = view[base << PAGE_SHIFT : end << PAGE_SHIFT]
                done, base = stop, frame
            end = frame + 1
        out[done:size] = view[base << PAGE_SHIFT : end << PAGE_SHIFT]
        return out

    def _use(self, base: int, count: int) -> None:
        if self._unread.find(1, base, base + count) >= 0:
            self.readahead_hits += self._unread.count(1, base, base + count)
            self._unread[base : base + count] = bytes(count)
        self._ref[base : base + count] = _ALL_USED[:count] if count <= len(_ALL_USED) else bytes([USED]) * count

    # -- everything else -----------------------------------------------------------------------------------------

    async def read(self, file: OpenFile, offset: int, size: int, *, again: bool = False) -> memoryview | bytes:
        """Return up to `size` bytes, fewer only at the end of the file. Raise the backing's OSError."""
        inode = file.inode
        if offset + size > inode.size:
            await self._filler.revalidate_size(file)
            if not inode.size and inode.true_size is None:
                await self._filler.find_end(file)
            size = min(size, inode.size - offset)
        if size <= 0:
            return b""
        first, last = offset >> PAGE_SHIFT, (offset + size - 1) >> PAGE_SHIFT
        out = bytearray((last - first + 1) << PAGE_SHIFT)
        limit = offset + size  # the end of the file may turn out to be before it
        missing, waiting = self._scan(inode, first, last, out)
        stream = file.stream
        if not missing and last >= stream.marker:
            self._read_ahead(file, first)
        for fill, run in waiting:
            await fill.done.wait()
            if fill.data is None:  # somebody else's read failed, or was ahead of what it may read: try it ourselves
                missing.append(run)
                continue
            self.waits += run[1] - run[0] + 1
            for index in range(run[0], run[1] + 1):
                frame = inode.pages.get(index)
                if frame is not None:
                    self._unread[frame] = 0
            limit = min(limit, self._copy(fill, run, first, out, inode))
        ahead = stream.miss(first, last) if missing and stream.is_sequential(first) else 0
        if len(missing) == 1:
            fill = await self._fetch(file, missing[0], ahead)
            limit = min(limit, self._copy(fill, missing[0], first, out, inode))
        elif missing:
            limit = min(limit, await self._fetch_all(file, sorted(missing), ahead, first, out))
        if missing and not ahead:
            stream.miss(first, last)
        stream.next_page = last + 1
        limit = max(limit, offset)
        found = memoryview(out)[offset & _OFFSET : limit - (first << PAGE_SHIFT)]
        if limit < offset + size:
            await self._filler.revalidate_size(file, force=True)
            if inode.size > limit and not again:  # it grew while a read that began before was under way
                rest = await self.read(file, limit, offset + size - limit, again=True)
                return b"".join((found, rest))
        return found

    def _scan(self, inode: Inode, first: int, last: int, out: bytearray) -> tuple[list[Run], list[tuple[Fill, Run]]]:
        """Copy what is here into `out`; return the runs of missing pages, and the fills to wait for."""
        cache, precache = self._cache, self._precache
        missing: list[Run] = []
        waiting: list[tuple[Fill, Run]] = []
        for index in range(first, last + 1):
            start = (index - first) << PAGE_SHIFT
            frame = inode.pages.get(index)
            if frame is not None:
                cache.ref[frame] = USED
                out[start : start + PAGE_SIZE] = cache.page(frame)
                self.hits += 1
                if self._unread[frame]:
                    self._unread[frame] = 0
                    self.readahead_hits += 1
                continue
            self.misses += 1
            fill = inode.fills.get(index)
            if fill is not None:
                if waiting and waiting[-1][0] is fill and waiting[-1][1][1] == index - 1:
                    waiting[-1] = (fill, (waiting[-1][1][0], index))
                else:
                    waiting.append((fill, (index, index)))
                continue
            page = precache.get(inode, index)
            if page is not None:
                out[start : start + PAGE_SIZE] = page
                precache.accept(inode, index, page)
            elif missing and missing[-1][1] == index - 1:
                missing[-1] = (missing[-1][0], index)
            else:
                missing.append((index, index))
        return missing, waiting

    def _copy(self, fill: Fill, run: Run, first: int, out: bytearray, inode: Inode) -> int:
        """Copy a run out of a fill; return where the file ends, as far as the fill knows."""
        assert fill.data is not None
        start = (run[0] - fill.first) << PAGE_SHIFT
        stop = min(len(fill.data), (run[1] + 1 - fill.first) << PAGE_SHIFT)
        base = (run[0] - first) << PAGE_SHIFT
        if stop > start:
            with memoryview(fill.data) as view:
                out[base : base + stop - start] = view[start:stop]
        if fill.hollow or inode.dirty or stop == (run[1] + 1 - fill.first) << PAGE_SHIFT:
            return 1 << 63  # what is not written back yet reads as zeros below it
        return (fill.first << PAGE_SHIFT) + len(fill.data)

    async def _fetch_all(self, file: OpenFile, runs: list[Run], ahead: int, first: int, out: bytearray) -> int:
        """Fetch several runs at once; return where the file ends, as far as they know."""
        limits: list[int] = []
        errors: list[OSError] = []

        async def fetch(run: Run, more: int) -> None:
            try:
                fill = await self._fetch(file, run, more)
            except OSError as error:
                errors.append(error)
            else:
                limits.append(self._copy(fill, run, first, out, file.inode))

        async with trio.open_nursery() as nursery:
            for run in runs:
                nursery.start_soon(fetch, run, ahead if run is runs[-1] else 0)
        if errors:
            raise errors[0]
        return min(limits)

    async def _fetch(self, file: OpenFile, run: Run, ahead: int) -> Fill:
        """Read a run of missing pages and up to `ahead` pages behind it; put them into the cache."""
        inode = file.inode
        last_page = max(run[1], (inode.size - 1) >> PAGE_SHIFT)
        last = run[1]
        while last < min(run[1] + ahead, last_page) and not self._present(inode, last + 1):
            last += 1
        self._backing.pages += last - run[0] + 1
        self._backing.readahead_pages += last - run[1]
        fill = Fill(run[0], last, ahead=last > run[1], unread=run[1] + 1)
        await self._filler.run(file, fill)
        if fill.error is not None:
            raise fill.error
        return fill

    def _present(self, inode: Inode, index: int) -> bool:
        return index in inode.pages or index in inode.fills or self._precache.holds(inode, index)

    async def run(self) -> None:
        """Read ahead of streams until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    # -- readahead -------------------------------------------------------------------------------------------------

    def _read_ahead(self, file: OpenFile, first: int) -> None:
        """Start the next window of a stream; nobody waits for it."""
        start, count = file.stream.reached_marker(first)
        end = min(start + count, (file.inode.size + PAGE_SIZE - 1) >> PAGE_SHIFT)
        if self._nursery is None or count == 0 or start >= end:
            return
        index = start
        while index < end:
            if self._present(file.inode, index):
                index += 1
                continue
            stop = index + 1
            while stop < end and not self._present(file.inode, stop):
                stop += 1
            self._backing.pages += stop - index
            self._backing.readahead_pages += stop - index
            fill = Fill(index, stop - 1, ahead=True, unread=index)
            for page in range(index, stop):  # before the task runs: a reader in between must join, not read again
                file.inode.fills[page] = fill
            file.acquire()  # before the task runs, too: the file may be closed before it does
            self._nursery.start_soon(self._fill_ahead, file, fill)
            index = stop

    async def _fill_ahead(self, file: OpenFile, fill: Fill) -> None:
        try:
            await self._filler.run(file, fill)
        finally:
            file.release()


_SCRATCH_PAGES = 257  # the largest request, 1 MiB, at any alignment
_ALL_USED = bytes([USED]) * 512
