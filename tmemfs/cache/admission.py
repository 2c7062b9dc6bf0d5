"""Decide which pages of a stream are put into the pool: those that come again, and those that idle time pays for.

Compressing a page takes 2 µs of processor time, and nothing tells whether the page will be read again. So pages that
were read ahead *bypass* the pool: they are dropped when they are evicted, and counted, unless

* the stream comes again: the extent was read ahead before, and since then no more pages of streams went by than cache
  and pool together can hold (beyond that no pool would have kept them), or
* the guest is idle: a share of the time in which its thread did nothing while a stream was read pays for puts. The
  share is half if the backing is slower than 130 MB/s: there a second pass gains most. Else it is small, because idle
  time need not be free: on a busy machine other programs want it.

An extent is admitted as a whole. Rejected: a sample of single pages. Pages that are found in the pool then cut the next
pass's large reads of the backing into small ones.

Pure: times are arguments. Pages that were not read ahead never bypass the pool.
"""

from __future__ import annotations

import math
from collections import OrderedDict

EXTENT_SHIFT = 9  # 512 pages, the largest window of the readahead
SMALLEST = 32  # pages; a smaller file costs more for its open than for its puts
PUT_SECONDS = 15e-6  # idle time that a put is charged: several times what it takes, so that a scan is not slower
SHARE = 0.03  # of the idle time: a scan becomes so much slower if idle time is not free
SLOW_SECONDS = 30e-6  # a page from a slow backing: 130 MB/s
SLOW_SHARE = 0.5  # of the idle time behind a slow backing: at 30 to 50 µs a page it pays for most puts, beyond for all
FADING = 1.1  # decay of the best rate at each read, so that scheduling delay does not look like a slow backing
MOST = 512.0  # pages: idle time is saved for so many puts at most


class Admission:
    """What went by, and what idle time is left."""

    def __init__(self) -> None:
        # From object and extent to the furthest page, and `_gone_by` then.
        self._extents: OrderedDict[tuple[int, int], tuple[int, int]] = OrderedDict()
        self._gone_by = 0  # pages of streams so far
        self._credit = 0.0  # pages
        self._now = self._busy = 0.0
        self._pace = math.inf  # seconds for a page of the backing

    def should_bypass(
        self, oid: int, first: int, last: int, *, capacity_pages: int, now: float, busy: float, took: float
    ) -> bool:
        """Return whether pages first..last of an object, just read ahead, shall bypass the pool.

        `capacity_pages` is how many pages cache and pool can hold; `now` and `busy` are seconds on the wall's clock and
        on that of the thread's processor time; the backing took `took` seconds.
        """
        idle = min(took, now - self._now) - (busy - self._busy)
        self._now, self._busy = now, busy
        pages = last - first + 1
        self._pace = min(max(took, 1e-6) / pages, self._pace * FADING)
        share = SLOW_SHARE if self._pace > SLOW_SECONDS else SHARE
        self._credit = min(MOST, self._credit + max(0.0, idle) * share / PUT_SECONDS)
        if pages < SMALLEST or self._came_again(oid, first, last, capacity_pages):
            return False
        if self._credit < pages:
            return True
        self._credit -= pages
        return False

    def _came_again(self, oid: int, first: int, last: int, capacity_pages: int) -> bool:
        """Tell whether the stream was here before, and note that it is here now."""
        extents, again = self._extents, False
        for number in range(first >> EXTENT_SHIFT, (last >> EXTENT_SHIFT) + 1):
            seen_to, then = extents.pop((oid, number), (-1, 0))
            again = again or (seen_to >= max(first, number << EXTENT_SHIFT) and self._gone_by - then <= capacity_pages)
            extents[oid, number] = max(last, seen_to), self._gone_by
        self._gone_by += last - first + 1
        while extents and self._gone_by - next(iter(extents.values()))[1] > capacity_pages:
            extents.popitem(last=False)
        return again

    def __len__(self) -> int:
        """Count the extents that are remembered."""
        return len(self._extents)

    def check(self) -> None:
        """Raise AssertionError unless the extents are in the order of their last time."""
        times = [then for _, then in self._extents.values()]
        assert times == sorted(times)
        assert 0 <= self._credit <= MOST
        assert not times or times[-1] <= self._gone_by
