"""Read from the cache, the pool and the backing, in this order.

`hit` answers what is in memory. It is the path that matters: one call of the engine, and no copy if the frames of a
request lie side by side, as after a sequential fill. What it returns is valid until the next read; pyfuse3 replies
before it awaits.

`read` is for everything else. A page is counted once: as a hit, as found in the pool, as a wait or as a page of the
backing. After each await everything is checked again: a fill may have failed, been poisoned, or come back short because
the file shrank.
"""

from __future__ import annotations

import trio

from tmem.arena import PAGE_SHIFT, PAGE_SIZE
from tmemfs.backing import Backing
from tmemfs.cache.file import File, Fill
from tmemfs.cache.memory import Memory
from tmemfs.inodes.inodes import InodeTable
from tmemfs.io.files import OpenFile
from tmemfs.io.filler import Filler

_OFFSET = PAGE_SIZE - 1
Run = tuple[int, int]


class Reader:
    """The read path of one guest."""

    def __init__(self, memory: Memory, backing: Backing, inodes: InodeTable) -> None:
        self._backing = backing
        self._filler = Filler(memory, backing, inodes)
        self._nursery: trio.Nursery | None = None  # of read-ahead; there is none before `run`
        self.waits = 0  # pages that a request waited for, because another was already reading them

    # -- the hit path --------------------------------------------------------------------------------------------

    def hit(self, file: OpenFile, offset: int, size: int) -> memoryview | None:
        """Return what is read, if all of it is in memory; None otherwise."""
        inode, stream = file.inode, file.stream
        content = inode.file
        first, last = offset >> PAGE_SHIFT, (offset + size - 1) >> PAGE_SHIFT
        sequential = stream.is_sequential(first)
        data = content.hit(offset, size, sequential=sequential)
        if data is None:
            end = offset + size
            if end > content.size:  # to the end of the file and, while its size is known for sure, no further
                if offset >= content.size or trio.current_time() >= inode.attr_until:
                    return None
                end = content.size
                last = (end - 1) >> PAGE_SHIFT
            data = content.read(offset, end - offset, sequential=sequential)
        if data is None:
            return None
        if last >= stream.marker:
            self._read_ahead(file, first)
        stream.next_page = last + 1
        return data

    # -- everything else -----------------------------------------------------------------------------------------

    async def read(self, file: OpenFile, offset: int, size: int, *, again: bool = False) -> memoryview | bytes:
        """Return up to `size` bytes, fewer only at the end of the file. Raise the backing's OSError."""
        content, stream = file.inode.file, file.stream
        if offset + size > content.size:
            await self._filler.revalidate_size(file)
            if not content.size and content.true_size is None:
                await self._filler.find_end(file)
            size = min(size, content.size - offset)
        if size <= 0:
            return b""
        first, last = offset >> PAGE_SHIFT, (offset + size - 1) >> PAGE_SHIFT
        out = bytearray((last - first + 1) << PAGE_SHIFT)
        limit = offset + size  # the end of the file may turn out to be before it
        absent = content.gather(first, last, out, sequential=stream.is_sequential(first))
        missing = [(start, end) for start, end, fill in absent if fill is None]
        if not missing and last >= stream.marker:
            self._read_ahead(file, first)
        for start, end, fill in absent:
            if fill is None:
                continue
            run = (start, end)
            await fill.done.wait()
            if fill.data is None:  # somebody else's read failed, or was ahead of what it may read: try it ourselves
                missing.append(run)
                continue
            self.waits += end - start + 1
            content.mark_read(start, end)
            limit = min(limit, _copy(fill, run, first, out, content))
        ahead = stream.miss(first, last) if missing and stream.is_sequential(first) else 0
        if len(missing) == 1:
            fill = await self._fetch(file, missing[0], ahead)
            limit = min(limit, _copy(fill, missing[0], first, out, content))
        elif missing:
            limit = min(limit, await self._fetch_all(file, sorted(missing), ahead, first, out))
        if missing and not ahead:
            stream.miss(first, last)
        stream.next_page = last + 1
        limit = max(limit, offset)
        found = memoryview(out)[offset & _OFFSET : limit - (first << PAGE_SHIFT)]
        if limit < offset + size:
            await self._filler.revalidate_size(file, force=True)
            if content.size > limit and not again:  # it grew while a read that began before was under way
                rest = await self.read(file, limit, offset + size - limit, again=True)
                return b"".join((found, rest))
        return found

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
                limits.append(_copy(fill, run, first, out, file.inode.file))

        async with trio.open_nursery() as nursery:
            for run in runs:
                nursery.start_soon(fetch, run, ahead if run is runs[-1] else 0)
        if errors:
            raise errors[0]
        return min(limits)

    async def _fetch(self, file: OpenFile, run: Run, ahead: int) -> Fill:
        """Read a run of missing pages and up to `ahead` pages behind it; put them into the cache."""
        content = file.inode.file
        last_page = max(run[1], (content.size - 1) >> PAGE_SHIFT)
        last = run[1]
        while last < min(run[1] + ahead, last_page) and not content.has(last + 1):
            last += 1
        self._backing.pages += last - run[0] + 1
        self._backing.readahead_pages += last - run[1]
        fill = content.begin_fill(run[0], last, ahead=last > run[1], unread=run[1] + 1)
        await self._filler.run(file, fill)
        if fill.error is not None:
            raise fill.error
        return fill

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
        content = file.inode.file
        start, count = file.stream.reached_marker(first)
        end = min(start + count, (content.size + PAGE_SIZE - 1) >> PAGE_SHIFT)
        if self._nursery is None or count == 0 or start >= end:
            return
        for run in _missing_runs(content, start, end):
            pages = run[1] - run[0] + 1
            self._backing.pages += pages
            self._backing.readahead_pages += pages
            # Both before the task runs: a reader in between must join, and the file may be closed.
            fill = content.begin_fill(*run, ahead=True, unread=run[0])
            file.acquire()
            self._nursery.start_soon(self._fill_ahead, file, fill)

    async def _fill_ahead(self, file: OpenFile, fill: Fill) -> None:
        try:
            await self._filler.run(file, fill)
        finally:
            file.release()


def _copy(fill: Fill, run: Run, first: int, out: bytearray, content: File) -> int:
    """Copy a run out of a fill; return where the file ends, as far as the fill knows."""
    assert fill.data is not None
    start = (run[0] - fill.first) << PAGE_SHIFT
    stop = min(len(fill.data), (run[1] + 1 - fill.first) << PAGE_SHIFT)
    base = (run[0] - first) << PAGE_SHIFT
    if stop > start:
        with memoryview(fill.data) as view:
            out[base : base + stop - start] = view[start:stop]
    if fill.hollow or content.has_dirty or stop == (run[1] + 1 - fill.first) << PAGE_SHIFT:
        return 1 << 63  # what is not written back yet reads as zeros below it
    return (fill.first << PAGE_SHIFT) + len(fill.data)


def _missing_runs(content: File, start: int, end: int) -> list[Run]:
    """Return the runs (first, last) of pages from `start` to before `end` that are neither in memory nor in flight."""
    runs: list[Run] = []
    for index in range(start, end):
        if content.has(index):
            continue
        if runs and runs[-1][1] == index - 1:
            runs[-1] = (runs[-1][0], index)
        else:
            runs.append((index, index))
    return runs
