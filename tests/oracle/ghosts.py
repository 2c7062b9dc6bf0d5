"""The ghost list: which handles were evicted lately.

A ghost is 8 bytes in a table: a 32-bit hash of the handle and the number of the eviction. Buckets of eight
are FIFOs of their own (newest first), the bucket is the hash's low bits, and a ghost is too old once more
evictions than the window have passed. (A fingerprint table with timestamps, as in S3-FIFO, SOSP '23, section
4.3.) A set of ints next to a deque costs over 100 bytes a ghost. A false hit, a few in 100,000, sends a page
to the wrong queue.
"""

from __future__ import annotations

from array import array

_WAYS = 8
_MASK = 0xFFFFFFFF


def tag_of(pool: int, obj: int, index: int) -> int:
    """Hash a handle to 32 bits, never 0 (0 marks an empty place)."""
    return hash((pool, obj, index)) & _MASK or 1


class GhostList:
    """A FIFO set of evicted handles, by their tags."""

    def __init__(self) -> None:
        self._buckets = 16
        self._tags = array("I", bytes(4 * _WAYS * self._buckets))
        self._turns = array("I", bytes(4 * _WAYS * self._buckets))
        self._turn = 0

    @property
    def bytes(self) -> int:
        """Memory of the table."""
        return 8 * len(self._tags)

    def add(self, tag: int, window: int) -> None:
        """Note an eviction; the oldest ghost of the bucket falls out."""
        if window * 3 > len(self._tags) * 2:
            self._double()
        self._turn = turn = (self._turn + 1) & _MASK
        start = (tag & (self._buckets - 1)) * _WAYS
        end = start + _WAYS
        tags, turns = self._tags, self._turns
        tags[start + 1 : end] = tags[start : end - 1]
        turns[start + 1 : end] = turns[start : end - 1]
        tags[start] = tag
        turns[start] = turn

    def holds(self, tag: int, window: int) -> bool:
        """Tell whether the tag is among the last `window` evictions."""
        start = (tag & (self._buckets - 1)) * _WAYS
        bucket = self._tags[start : start + _WAYS]
        if tag not in bucket:
            return False
        return (self._turn - self._turns[start + bucket.index(tag)]) & _MASK < window

    def discard(self, tag: int) -> None:
        """Forget a ghost; nothing happens when there is none."""
        start = (tag & (self._buckets - 1)) * _WAYS
        bucket = self._tags[start : start + _WAYS]
        for way, found in enumerate(bucket):
            if found == tag:
                self._tags[start + way] = 0

    def _double(self) -> None:
        """Double the table by repeating it.

        One more bit of the hash chooses the bucket, so in one of its two copies a ghost is never looked up,
        and falls out there in time. That is a copy at memory speed instead of a rehash that stops the pool.
        """
        self._tags += self._tags
        self._turns += self._turns
        self._buckets *= 2

    def check(self) -> None:
        """Raise AssertionError unless the table's parts are of one size."""
        assert len(self._tags) == len(self._turns) == self._buckets * _WAYS
        assert self._buckets & (self._buckets - 1) == 0
