"""Report the write-back errors of a file once to each of its open files, as Linux does (errseq_t).

A write-back that fails again when retried is the same error. An error that was reported to nobody is also reported to
the next open of the file, because the writer may have closed it already.
"""

from __future__ import annotations


class WriteErrors:
    """The count of write-back errors of one file; each open file remembers how many it has reported."""

    __slots__ = ("count", "failing", "last", "told")

    def __init__(self) -> None:
        self.count = 0
        self.told = 0  # errors reported to at least one open file
        self.last: OSError | None = None
        self.failing = False  # whether the last write-back failed

    def record_failure(self, error: OSError) -> bool:
        """Record a failed write-back. Return whether it is a new error, not a failed retry."""
        news = not self.failing
        self.count += news
        self.failing, self.last = (
            True,
            OSError(error.errno, error.strerror),
        )  # without its traceback, which holds frames
        return news

    def record_success(self) -> None:
        """Record that nothing is left to be written back."""
        self.failing = False

    def unreported(self, known: int) -> OSError | None:
        """Return the error for an open file that has reported `known` errors, None if there is no newer one."""
        if known >= self.count:
            return None
        self.told = self.count
        return self.last

    def check(self) -> None:
        """Raise AssertionError unless the counts agree."""
        assert 0 <= self.told <= self.count
        assert (self.last is None) == (self.count == 0)
        assert self.count or not self.failing
