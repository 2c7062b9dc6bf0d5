"""What is known of one file's content: its size and version, its pages, its dirty pages, its backing reads in flight.

A `File` is a handle of the engine, where all of this is (backend/engine/file.c). A change is made in all places at
once: frames, pool, fills in flight. A change poisons the fills that overlap it: their bytes enter no cache.
"""

from __future__ import annotations

import enum
from collections.abc import Collection
from typing import Any, Protocol

import trio

from tmem.arena import PAGE_SHIFT, PAGE_SIZE
from tmem.engine import MAX_READ_PAGES, ffi, lib

Version = tuple[int, ...]  # of a file's stat: the size first, then what else `--version-by` selects

_NO_FILL = 0
_hit = lib.tmem_hit


class Merge(enum.Enum):
    """What a stat that was merged into a file showed."""

    STALE = lib.TMEM_STALE  # nothing: a newer one is known, or a change of our own is in progress
    SAME = lib.TMEM_SAME  # the recorded version
    NEW = lib.TMEM_NEW  # the first version of this file
    CHANGED = lib.TMEM_CHANGED  # another version: others changed the file


_MERGES = {merge.value: merge for merge in Merge}


class Engine(Protocol):
    """The engine, and what is shared by the calls of all its files."""

    engine: Any  # tmem *
    lease: Any  # struct tmem_lease *
    reply: Any  # struct tmem_reply *
    facts: Any  # struct tmem_facts *
    version: Any  # struct tmem_version *
    view: memoryview  # the frames
    fills: dict[int, Fill]  # in flight, by number
    alive: list[bool]  # empty once the engine has ended


class Fill:
    """A backing read in flight for the pages first..last. `File.begin_fill` makes it; `finish` or `abandon` ends it."""

    __slots__ = (
        "_file",
        "_number",
        "_was_poisoned",
        "ahead",
        "data",
        "done",
        "error",
        "first",
        "hollow",
        "last",
        "unread",
    )

    def __init__(self, file: File, number: int, first: int, last: int, *, ahead: bool, unread: int) -> None:
        self._file: File | None = file  # None: no longer in flight
        self._number = number
        self._was_poisoned = number == _NO_FILL
        self.first = first
        self.last = last
        self.ahead = ahead  # of a stream: some of it was not asked for yet
        self.unread = unread  # from this page on, nobody had asked for them when the read began
        self.done = trio.Event()
        self.hollow = False  # begun while pages behind it were dirty: what the backing lacks reads as zeros
        self.data: bytearray | None = None
        self.error: OSError | None = None

    @property
    def poisoned(self) -> bool:
        """Whether a change overtook this read: its pages do not enter the cache."""
        if self._file is None or self._was_poisoned:
            return self._was_poisoned
        return self._file.is_poisoned(self._number)

    def finish(self, data: bytes | bytearray, *, bypass: bool) -> None:
        """Put the pages that were read into the cache, unless poisoned, and take the fill out of flight.

        `bypass`: they are dropped when they are evicted, instead of put into the pool.
        """
        assert self._file is not None
        if data and not self._was_poisoned:
            self._file.store(self._number, data, bypass)
        self.abandon()

    def abandon(self) -> None:
        """Take the fill out of flight, if it still is: the read failed."""
        if self._file is not None:
            self._was_poisoned = self.poisoned
            if self._number != _NO_FILL:
                self._file.end_fill(self._number)
            self._file = None


class File:
    """The content of one file, or of another node: these have a size of 0, no version and no pages."""

    __slots__ = ("_engine", "_number", "_shared")

    def __init__(self, shared: Engine) -> None:
        number = lib.tmem_file_new(shared.engine)
        if number < 0:
            raise OSError(-number, "more files than the engine has room for")
        self._shared = shared
        self._engine = shared.engine
        self._number: int = number

    def __del__(self) -> None:
        """Free the handle: nobody can reach the file any more."""
        if hasattr(self, "_number") and self._shared.alive:
            lib.tmem_file_free(self._engine, self._number)

    def _facts(self) -> Any:
        facts = self._shared.facts
        lib.tmem_file_facts(self._engine, self._number, facts)
        return facts

    def _version_struct(self, version: Version) -> Any:
        struct = self._shared.version
        field = struct.field
        field[2] = field[3] = 0
        for place, value in enumerate(version):
            field[place] = value if value < 1 << 63 else value - (1 << 64)
        return struct

    # -- what is known -------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """The size in bytes."""
        size: int = lib.tmem_file_size(self._engine, self._number)
        return size

    @size.setter
    def size(self, size: int) -> None:
        lib.tmem_file_set_size(self._engine, self._number, size)

    @property
    def true_size(self) -> int | None:
        """Where reads of this version ended, if the stat may be wrong."""
        size: int = self._facts().true_size
        return size if size >= 0 else None

    @true_size.setter
    def true_size(self, size: int | None) -> None:
        lib.tmem_file_set_true_size(self._engine, self._number, -1 if size is None else size)

    @property
    def has_version(self) -> bool:
        """Whether a version is recorded."""
        return bool(self._facts().has_version)

    @property
    def settles_at(self) -> float:
        """From then on (monotonic), every change changes the version."""
        return float(self._facts().settles_at)

    @settles_at.setter
    def settles_at(self, time: float) -> None:
        lib.tmem_file_set_settles_at(self._engine, self._number, time)

    @property
    def provisional(self) -> bool:
        """Whether pages were read, or changed by us, before it settled: the next open drops them."""
        return bool(self._facts().provisional)

    @provisional.setter
    def provisional(self, provisional: bool) -> None:
        lib.tmem_file_set_provisional(self._engine, self._number, provisional)

    @property
    def stat_seq(self) -> int:
        """The tick of the last stat accepted, or of the last change of our own."""
        return int(lib.tmem_file_stat_seq(self._engine, self._number))

    @stat_seq.setter
    def stat_seq(self, seq: int) -> None:
        lib.tmem_file_set_stat_seq(self._engine, self._number, seq)

    @property
    def change_seq(self) -> int:
        """The tick of the last `record_own_change`."""
        return int(self._facts().change_seq)

    @property
    def own_changes(self) -> int:
        """Changes of our own in progress."""
        return int(self._facts().own_changes)

    def is_stale(self, started: int) -> bool:
        """Return whether a stat is outdated: a newer one is known, or a change of our own is in progress."""
        return bool(lib.tmem_file_is_stale(self._engine, self._number, started))

    def matches(self, version: Version) -> bool:
        """Return whether a version is the recorded one; True also when none is recorded."""
        return bool(lib.tmem_file_matches(self._engine, self._number, self._version_struct(version)))

    def merge_stat(self, version: Version, size: int, started: int) -> Merge:
        """Accept a stat that began at tick `started`, unless it is stale, and drop the clean pages if it differs.

        After NEW and CHANGED the version is recorded, but not settled: the caller sets `settles_at`. The size stays
        while pages are dirty: until they are written back it is ours.
        """
        struct = self._version_struct(version)
        return _MERGES[lib.tmem_file_merge_stat(self._engine, self._number, struct, size, started)]

    def begin_change(self) -> None:
        """Ignore all stats until `end_change`: a change of our own is in progress."""
        lib.tmem_file_begin_change(self._engine, self._number)

    def end_change(self, seq: int) -> None:
        """End a change of our own at tick `seq`; stats that began before are stale."""
        lib.tmem_file_end_change(self._engine, self._number, seq)

    def record_own_change(self, version: Version | None, seq: int) -> None:
        """Record the version after a change of our own, at tick `seq`; None: keep the recorded one."""
        struct = ffi.NULL if version is None else self._version_struct(version)
        lib.tmem_file_record_own_change(self._engine, self._number, struct, seq)

    # -- reading -------------------------------------------------------------------------------------------------

    def hit(self, offset: int, size: int, *, sequential: bool) -> memoryview | None:
        """Return bytes that lie within the file, and in frames side by side; None otherwise, and nothing is counted.

        They are valid until the next read of any file of this engine.
        """
        shared = self._shared
        start = _hit(shared.lease, self._number, offset, size, sequential)
        return shared.view[start : start + size] if start >= 0 else None

    def read(self, offset: int, size: int, *, sequential: bool) -> memoryview | None:
        """Return bytes whose pages are all in memory; None otherwise, and nothing is counted.

        They are valid until the next read of any file of this engine. The caller has clipped the range to the size;
        `sequential` says that the read continues a stream: then pages of the pool stay there.
        """
        shared = self._shared
        if lib.tmem_read(shared.lease, self._number, offset, size, sequential, shared.reply):
            return None
        return memoryview(ffi.buffer(shared.reply.data, size))

    def gather(self, first: int, last: int, out: bytearray, *, sequential: bool) -> list[tuple[int, int, Fill | None]]:
        """Copy those of the pages first..last that are in memory into `out`, and count hits and misses.

        Return the runs (first, last) of the others, each with the fill to wait for; None: the caller has to read it.
        `sequential` says that the read continues a stream.
        """
        rest: list[tuple[int, int, Fill | None]] = []
        for start in range(first, last + 1, MAX_READ_PAGES):
            self._gather_part(start, min(last, start + MAX_READ_PAGES - 1), first, out, sequential, rest)
        return rest

    def _gather_part(
        self,
        start: int,
        end: int,
        first: int,
        out: bytearray,
        sequential: bool,
        rest: list[tuple[int, int, Fill | None]],
    ) -> None:
        shared, count = self._shared, end - start + 1
        reply, flags = shared.reply, lib.TMEM_PARTIAL | (lib.TMEM_SEQUENTIAL if sequential else 0)
        lib.tmem_read(shared.lease, self._number, start << PAGE_SHIFT, count << PAGE_SHIFT, flags, reply)
        base, data = (start - first) << PAGE_SHIFT, ffi.buffer(reply.data, count << PAGE_SHIFT)
        if not reply.absent:
            out[base : base + (count << PAGE_SHIFT)] = data
            return
        for place, state in enumerate(bytes(ffi.buffer(reply.state, count))):
            index = start + place
            if state == lib.TMEM_PRESENT:
                at = place << PAGE_SHIFT
                out[base + at : base + at + PAGE_SIZE] = data[at : at + PAGE_SIZE]
                continue
            fill = self.fill_of(index) if state == lib.TMEM_IN_FLIGHT else None
            if rest and rest[-1][1:] == (index - 1, fill):
                rest[-1] = (rest[-1][0], index, fill)
            else:
                rest.append((index, index, fill))

    def has(self, index: int) -> bool:
        """Return whether a page is in the cache, in flight or in the pool."""
        return bool(lib.tmem_file_has(self._engine, self._number, index))

    def is_cached(self, index: int) -> bool:
        """Return whether a page is in the cache."""
        return bool(lib.tmem_file_cached(self._engine, self._number, index))

    def is_pooled(self, index: int) -> bool:
        """Return whether a page is in the pool and not in the cache."""
        return bool(lib.tmem_file_pooled(self._engine, self._number, index))

    def held_pages(self) -> int:
        """Return the number of pages in memory: in the cache or in the pool."""
        return int(self._facts().pages)

    @property
    def content(self) -> int:
        """A number that no other content has. It changes when all clean pages are dropped."""
        return int(self._facts().content)

    def holds(self) -> bool:
        """Return whether any page is in memory or in flight."""
        facts = self._facts()
        return bool(facts.pages or facts.fills)

    def mark_read(self, first: int, last: int) -> None:
        """Count pages as asked for: they were read ahead, and a request waited for them."""
        lib.tmem_file_mark_read(self._engine, self._number, first, last)

    # -- fills ---------------------------------------------------------------------------------------------------

    def begin_fill(self, first: int, last: int, *, ahead: bool, unread: int) -> Fill:
        """Register a backing read of pages first..last: later requests for them wait for it.

        `ahead`: some of it was not asked for yet; from page `unread` on, nothing was. Where another fill has a page,
        the new one is poisoned: a change of that page would poison only the other.
        """
        flags = lib.TMEM_AHEAD if ahead else 0
        number = lib.tmem_fill_begin(self._engine, self._number, first, last, flags, unread)
        fill = Fill(self, number, first, last, ahead=ahead, unread=unread)
        if number != _NO_FILL:
            self._shared.fills[number] = fill
        return fill

    def fill_of(self, index: int) -> Fill | None:
        """Return the fill that a page is in flight with."""
        return self._shared.fills.get(lib.tmem_fill_of(self._engine, self._number, index))

    def is_poisoned(self, number: int) -> bool:
        """Return whether a change overtook a fill (for `Fill`)."""
        return bool(lib.tmem_fill_poisoned(self._engine, number))

    def store(self, number: int, data: bytes | bytearray, bypass: bool) -> None:
        """Put the pages of a fill into the cache (for `Fill`)."""
        lib.tmem_fill_store(self._engine, number, ffi.from_buffer(data), len(data), bypass)

    def end_fill(self, number: int) -> None:
        """Take a fill out of flight (for `Fill`)."""
        del self._shared.fills[number]
        if self._shared.alive:
            lib.tmem_fill_end(self._engine, number)

    # -- dropping ------------------------------------------------------------------------------------------------

    def drop(self, first: int, last: int) -> None:
        """Drop pages first..last everywhere, dirty ones too; where they are many, all clean ones."""
        lib.tmem_file_drop(self._engine, self._number, first, last)

    def drop_clean(self) -> None:
        """Drop all clean pages."""
        lib.tmem_file_drop_clean(self._engine, self._number)

    def forget(self) -> None:
        """Drop everything, dirty pages too: nobody can open the file any more."""
        lib.tmem_file_forget(self._engine, self._number)

    def flush_pool(self, first: int, last: int) -> None:
        """Drop pages first..last from the pool; where they are many, all."""
        lib.tmem_file_flush_pool(self._engine, self._number, first, last)

    # -- changing ------------------------------------------------------------------------------------------------

    def overwrite(self, offset: int, data: bytes | memoryview) -> None:
        """Bring resident pages up to date with bytes that the backing has taken."""
        lib.tmem_file_overwrite(self._engine, self._number, offset, ffi.from_buffer(data), len(data))

    def truncate(self, size: int) -> None:
        """Follow a truncation: no page beyond `size` stays, and the last page ends in zeros."""
        lib.tmem_file_truncate(self._engine, self._number, size)

    # -- dirty pages ---------------------------------------------------------------------------------------------

    @property
    def has_dirty(self) -> bool:
        """Whether any page is dirty."""
        return bool(self._facts().dirty_pages)

    def is_dirty(self, index: int) -> bool:
        """Return whether a page is dirty."""
        return bool(lib.tmem_file_is_dirty(self._engine, self._number, index))

    def dirty_pages(self) -> list[int]:
        """Return the numbers of the dirty pages, sorted."""
        count = self._facts().dirty_pages
        indexes = ffi.new("uint64_t[]", max(1, count))
        found = lib.tmem_file_dirty_pages(self._engine, self._number, indexes, count)
        return sorted(ffi.unpack(indexes, found)) if found else []

    def make_dirty(self, first: int, last: int, partial: Collection[int] = ()) -> bool:
        """Make pages first..last dirty; those that are not in the cache become zeros.

        `partial`: those of the two edges whose bytes are needed. Return False, with nothing changed, if one of these is
        not in the cache (the engine's thread may have moved it a moment ago), or if frames run out.
        """
        flags = (lib.TMEM_FIRST_STAYS if first in partial else 0) | (lib.TMEM_LAST_STAYS if last in partial else 0)
        return not lib.tmem_file_make_dirty(self._engine, self._number, first, last, flags)

    def mark_clean(self, first: int, last: int) -> None:
        """Mark those of the pages first..last that are dirty as written back."""
        lib.tmem_file_mark_clean(self._engine, self._number, first, last)

    def copy_out(self, first: int, last: int) -> bytes:
        """Return the bytes of pages first..last, which are in the cache."""
        data = bytearray((last - first + 1) * PAGE_SIZE)
        if lib.tmem_file_copy_out(self._engine, self._number, first, last, ffi.from_buffer(data)):
            raise KeyError(f"a page of {first}..{last} is not in the cache")
        return bytes(data)
