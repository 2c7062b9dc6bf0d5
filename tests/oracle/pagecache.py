"""Hold file pages in frames of one anonymous mapping, bounded in bytes.

Eviction is CLOCK (Corbató 1968): a frame has a reference byte, a hit sets it, the hand clears it and takes the first
frame that it finds cleared. The reference bytes of all frames are one bytearray, so that the hand moves at the speed
of `bytearray.find` (3 µs over 16,384 referenced frames, measured) and a hit is one store.

A page that is evicted does not leave its frame at once: the frame is marked QUEUED and stays in its owner's table
until the precache has put the page into the pool. So a hit in the victim queue is an ordinary hit (its store of USED
over QUEUED rescues the page), nothing is copied, and queue and cache share one exact bound. A reserve of free frames
is kept ahead of the readers, and fills announce theirs; where these run out, the oldest queued page is dropped, never
the reader delayed.

Nothing in here awaits: between two awaits of its users the cache does not change.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import compress

from tests.oracle.frames import FREE, IDLE, PAGE_SHIFT, PAGE_SIZE, QUEUED, USED, Frames, PageOwner, PageTable

__all__ = ["FREE", "IDLE", "PAGE_SHIFT", "PAGE_SIZE", "QUEUED", "USED", "PageCache", "PageOwner", "PageTable"]

_AGED = bytes([IDLE, IDLE, QUEUED, FREE]) + bytes(range(4, 256))
_IS_FREE = bytes(mark == FREE for mark in range(256))

NONE = 1 << 62  # beyond every page
MAX_RESERVE = 512
MAX_AHEAD = 4096
EXTRA = 32  # pages queued at once beyond what is missing: one wake-up of the drain for many, not one a page

Buffer = bytes | bytearray | memoryview


class PageCache(Frames):
    """Keep at most `capacity` bytes of pages; `limit` bounds what a later resize may ask for.

    `on_victims` is called when victims wait to be put into the pool; None: there is no pool, and no victim queue.
    """

    def __init__(self, capacity: int, *, limit: int, on_victims: Callable[[], None] | None) -> None:
        super().__init__(capacity, limit)
        self._free: deque[int] = deque(range(self.frames))
        self._announced = 0  # pages of fills in flight, which will want frames
        self._hand = 0
        self._queueing = on_victims is not None
        self.victims: deque[int] = deque()  # frames; entries whose page was rescued are stale and skipped
        self._on_victims = on_victims or _nobody
        self.resident = 0  # pages
        self.dirty_pages = 0
        self.evictions = 0
        self.dropped = 0  # evicted without having been offered to the pool
        self.unused = 0  # read ahead, and gone before anybody asked for them
        self.bypassed = 0  # evicted without having been offered to the pool, because they were marked so
        self._set_bounds()

    def _set_bounds(self) -> None:
        self.reserve_frames = max(1, min(MAX_RESERVE, self.frames // 32)) if self._queueing else 0
        self._extra = min(EXTRA, self.reserve_frames // 2)
        self._ahead_limit = max(self.reserve_frames, min(MAX_AHEAD, self.frames // 4))

    # -- filling -------------------------------------------------------------------------------------------------

    def insert(
        self,
        owner: PageOwner,
        first: int,
        data: Buffer,
        pool_bit: bool = False,
        *,
        ahead: bool = False,
        bypassing: bool = False,
        unread: int = NONE,
    ) -> int:
        """Copy consecutive pages of `owner` from page `first` on; the last may be short and is filled with zeros.

        Pages that were read `ahead` count as used: where all else has been, the hand would take them first, before
        anybody has read them. Return how many pages were stored: fewer than given when every frame is dirty. A page
        that is resident already keeps its frame and content (the copy in the cache is never older than one from below).
        """
        source, pages, stored = memoryview(data), owner.pages, 0
        for start in range(0, len(source), PAGE_SIZE):
            index, piece = first + (start >> PAGE_SHIFT), source[start : start + PAGE_SIZE]
            if index not in pages:
                if not self.insert_page(owner, index, piece, pool_bit, ahead, bypassing):
                    break
                self.unread[pages[index]] = index >= unread
            stored += 1
        return stored

    def insert_page(
        self, owner: PageOwner, index: int, data: Buffer, pool_bit: bool, ahead: bool = False, bypassing: bool = False
    ) -> bool:
        """Copy one page that is not resident into a frame; False when every frame is dirty."""
        frame = self._free.popleft() if self._free else self._take_frame()
        if frame < 0:
            return False
        base, length = frame << PAGE_SHIFT, len(data)
        self.view[base : base + length] = data
        if length < PAGE_SIZE:
            self.view[base + length : base + PAGE_SIZE] = bytes(PAGE_SIZE - length)
        self.ref[frame] = USED if ahead else IDLE
        self.pool_bit[frame] = pool_bit
        self.bypassing[frame] = bypassing
        self.unread[frame] = 0
        self._owner[frame] = owner.pages
        self._index[frame] = index
        owner.pages[index] = frame
        self.resident += 1
        if len(self._free) < self.reserve_frames:
            self._make_ready()
        return True

    def _take_frame(self) -> int:
        """Free a frame by dropping a page, and return it; -1 when every page is dirty."""
        while (frame := self.next_victim()) >= 0:
            self.dropped += 1
            self.evict(frame)
            if self._free:  # not so for a frame that a resize is taking away
                return self._free.popleft()
        while (frame := self._find_victim()) >= 0:
            self.dropped += self._queueing
            self.evict(frame)
            if self._free:
                return self._free.popleft()
        return -1

    def announce(self, pages: int) -> None:
        """Evict ahead of a fill: its frames shall be free when it ends. `pages` negative takes that back."""
        self._announced += pages
        self._make_ready()

    def _make_ready(self) -> None:
        """Queue as many pages as it takes for the reserve and the announced pages to be free after the drain."""
        wanted = min(self.reserve_frames + self._announced, self._ahead_limit)
        missing = wanted - len(self._free) - len(self.victims)
        if self._queueing and missing > 0:
            self.queue_victims(missing + self._extra)

    @property
    def free_frames(self) -> int:
        """Frames that an insert can take without dropping anything."""
        return len(self._free)

    def queue_victims(self, count: int) -> int:
        """Move the coldest `count` pages into the victim queue (free them at once where there is no pool)."""
        for done in range(count):
            frame = self._find_victim()
            if frame < 0:
                return done
            if self._queueing and not self.bypassing[frame]:
                self.ref[frame] = QUEUED
                self.victims.append(frame)
            else:
                self.bypassed += self.bypassing[frame]
                self.evict(frame)
        self._on_victims()
        return count

    def _find_victim(self) -> int:
        """Move the hand to the next clean frame that was not referenced; -1 when there is none."""
        ref, dirty = self.ref, self.dirty
        for _ in range(3):  # the first round may only clear bytes, the second finds; the third is for the hand's start
            hand = self._hand
            while (frame := ref.find(IDLE, hand)) >= 0:
                ref[hand:frame] = ref[hand:frame].translate(_AGED)
                hand = frame + 1
                if not dirty[frame]:
                    self._hand = hand
                    return frame
            ref[hand:] = ref[hand:].translate(_AGED)
            self._hand = 0
        return -1

    # -- emptying ------------------------------------------------------------------------------------------------

    def next_victim(self) -> int:
        """Take the oldest frame of the victim queue whose page was not rescued; -1 when the queue is empty."""
        while self.victims:
            frame = self.victims.popleft()
            if self.ref[frame] == QUEUED:
                return frame
        return -1

    def evict(self, frame: int) -> None:
        """Free the frame of a clean page."""
        self.evictions += 1
        table, index = self.describe(frame)
        del table[index]
        self._release(frame)

    def _release(self, frame: int) -> None:
        self._owner[frame] = None
        self.ref[frame] = FREE
        if self.dirty[frame]:
            self.mark_clean(frame)
        self.unused += self.unread[frame]
        self.resident -= 1
        if frame < self.frames:
            self._free.append(frame)

    def remove(self, owner: PageOwner, first: int, last: int) -> None:
        """Forget the owner's pages first..last, dirty ones too."""
        pages = owner.pages
        if last - first < len(pages):
            found = [index for index in range(first, last + 1) if index in pages]
        else:
            found = [index for index in pages if first <= index <= last]
        for index in found:
            self._release(pages.pop(index))

    def split(self, table: PageTable, kept: Iterable[int]) -> PageTable:
        """Move some pages of a table, and no others, to a new one, and return that; the old one is discarded."""
        new = PageTable()
        for index in kept:
            new[index] = frame = table.pop(index)
            self._owner[frame] = new
        table.discarded = True
        return new

    def free_some(self, table: PageTable, most: int) -> int:
        """Free up to so many pages of a discarded table; return how many."""
        count = min(most, len(table))
        for _ in range(count):
            self._release(table.popitem()[1])
        return count

    # -- dirty pages ---------------------------------------------------------------------------------------------

    def mark_dirty(self, frame: int) -> None:
        """Mark a page dirty: it is not evicted until it is cleaned."""
        self.dirty_pages += 1 - self.dirty[frame]
        self.dirty[frame] = 1
        self.ref[frame] = USED

    def mark_clean(self, frame: int) -> None:
        """Mark a page clean again."""
        self.dirty_pages -= self.dirty[frame]
        self.dirty[frame] = 0

    # -- resize --------------------------------------------------------------------------------------------------

    def set_capacity(self, capacity: int) -> None:
        """Change the bound. After a shrink `excess` pages have to go, then `settle` gives the memory back.

        Raise ValueError when more is asked for than the mapping has room for.
        """
        frames = capacity >> PAGE_SHIFT
        if frames > self._limit:
            raise ValueError(f"the cache can grow to {self._limit << PAGE_SHIFT} bytes at most")
        self._extend(frames)
        self.frames = frames
        self._free = deque(compress(range(frames), self.ref.translate(_IS_FREE)))  # 8 ns a frame
        self._set_bounds()

    @property
    def excess(self) -> int:
        """Pages that are resident beyond the capacity."""
        return max(0, self.resident - self.frames)

    @property
    def settled(self) -> bool:
        """True unless a shrink still waits for dirty pages."""
        return len(self.ref) == self.frames

    def settle(self, most: int) -> bool:
        """Go on with a shrink by up to so many frames; False when there is nothing more to do for now.

        What lives in the highest frames moves below the bound, and their memory is returned to the system.
        """
        first = max(self.frames, len(self.ref) - most)
        for frame in range(first, len(self.ref)):
            if self.ref[frame] != FREE:
                self._move(frame)
        if self.settled or self.ref.count(FREE, first) < len(self.ref) - first:
            return False  # in the second case, dirty pages fill the cache: a later call settles
        self._cut_off(first)
        self.victims = deque(frame for frame in self.victims if frame < first)
        self._hand = min(self._hand, first)
        return not self.settled

    def _move(self, frame: int) -> None:
        """Copy a page from above the bound into a free frame below it, or drop it when it is clean."""
        target = self._free.popleft() if self._free else -1
        if target < 0:
            if not self.dirty[frame]:
                self.dropped += self._queueing
                self.evict(frame)
            return
        self._copy(frame, target)
        if self.ref[target] == QUEUED:
            self.victims.append(target)

    # -- check ---------------------------------------------------------------------------------------------------

    def used_frames(self) -> Iterator[int]:
        """Walk the frames that hold a page."""
        return (frame for frame, owner in enumerate(self._owner) if owner is not None)

    def check(self) -> None:
        """Raise AssertionError unless tables, counts and bounds agree."""
        used = set(self.used_frames())
        assert len(used) == self.resident, (len(used), self.resident)
        assert sum(self.dirty) == self.dirty_pages
        assert len(self.ref) > self.frames or self.resident <= self.frames
        free = set(self._free)
        assert len(free) == len(self._free)
        assert not free & used
        for frame in range(len(self.ref)):
            assert (frame in used) != (self.ref[frame] == FREE)
            assert frame in used or frame in free or frame >= self.frames
        for frame in used:
            table, index = self.describe(frame)
            assert table[index] == frame
            assert self.ref[frame] != QUEUED or frame in self.victims


def _nobody() -> None:
    pass
